"""The manifest of a folder that erasec wrote: the size and sha256 of every file below it, in ``erasec.manifest.json``.

It is written last, so a folder with a manifest is whole. It proves that nothing changed by accident. Nothing in the
folder proves who wrote it: whoever rewrites files can rewrite the manifest too. Its own sha256, kept or signed
elsewhere, is what shows that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from erasec.checkpoint.safetensors import atomic_write, file_digest
from erasec.documents import read_text
from erasec.errors import ErasecError
from erasec.progress import bar

FILE = "erasec.manifest.json"
SIGNATURE = "model.sig"  # signs the manifest too, so the manifest cannot list it
SCHEMA = "erasec.manifest/1"
REJECTED = ".rejected"  # a rejected build inside the folder of an earlier one; it has a manifest of its own


class FileRecord(BaseModel):
    """The size in bytes and the sha256 of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """``files`` by their paths below the folder, and the ``folders`` that are empty. ``renewed`` are those of the files
    that erasec changed later, by a relink or an edit in place: a report describes them as they were before. ``movable``
    are those that may be taken away, such as keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Annotated[Literal["erasec.manifest/1"], Field(alias="schema")]
    files: dict[str, FileRecord]
    folders: tuple[str, ...] = ()
    renewed: tuple[str, ...] = ()
    movable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Differences:
    """What differs from a manifest, by paths below its folder. A folder that is empty or a link ends with "/"."""

    lost: tuple[str, ...]
    changed: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.lost + self.changed + self.added

    def below(self, folder: str) -> bool:
        """Whether anything differs below ``folder``, which is "." for the folder of the manifest."""
        return any(folder == "." or name.startswith(f"{folder}/") for name in self.all)


def find(path: Path) -> Path | None:
    """The nearest folder with a manifest: ``path`` itself or one above it. None where there is none."""
    path = path.resolve()
    return next((folder for folder in (path, *path.parents) if (folder / FILE).is_file()), None)


def write(root: Path, known: Mapping[str, FileRecord] | None = None, movable: Iterable[str] = ()) -> None:
    """Write the manifest of all that is below ``root`` now. Files in ``known`` are not read again; those in ``movable``
    may be taken away later."""
    files, folders = _contents(root)
    content = {"schema": SCHEMA, "files": records(root, files, known), "folders": folders, "movable": sorted(movable)}
    _save(root, Manifest.model_validate(content))


def records(root: Path, names: Iterable[str], known: Mapping[str, FileRecord] | None = None) -> dict[str, FileRecord]:
    """The records of files below ``root``. Files in ``known`` are not read; a file with several names is read once.

    Files are read side by side, as a digest is limited by its processor.
    """
    result, names = dict(known or {}), list(names)
    by_inode: dict[tuple[int, int], list[str]] = {}
    for name in names:
        if name not in result:
            status = (root / name).stat()
            by_inode.setdefault((status.st_dev, status.st_ino), []).append(name)
    # The largest file first: it takes the longest.
    groups = sorted(by_inode.values(), key=lambda group: -(root / group[0]).stat().st_size)
    with bar("digest", len(groups)) as advance, ThreadPoolExecutor(os.cpu_count()) as threads:
        for group, record in zip(groups, threads.map(lambda group: _record(root / group[0]), groups), strict=True):
            result |= dict.fromkeys(group, record)
            advance(note=group[0])
    return {name: result[name] for name in names}


def _record(file: Path) -> FileRecord:
    return FileRecord(bytes=file.stat().st_size, sha256=file_digest(file))


def read(root: Path) -> tuple[Manifest, str]:
    """The manifest of ``root``, and its own sha256. Raises ErasecError where it is not as ``write`` writes it."""
    fix = "fetch the folder again or build it again"
    data = read_text(root / FILE, fix).encode()
    try:
        content = Manifest.model_validate_json(data)
        if _text(content) != data:
            raise ValueError("it is not as erasec writes it")
        if foreign := sorted({*content.renewed, *content.movable} - content.files.keys()):
            raise ValueError(f"it does not list {foreign[0]}")
    except (ValueError, RecursionError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ErasecError(f"{FILE} is damaged", why=first, where=str(root), fix=fix) from error
    return content, hashlib.sha256(data).hexdigest()


def compare(root: Path, content: Manifest, strict: bool = False) -> Differences:
    """Compare all that is below ``root`` with a manifest. Every listed file of the right size is read.

    Hidden files that are not listed are left out: systems and download tools write them, and nothing loads them. With
    ``strict``, they are not, nor is a rejected build; and neither a file nor a folder may be a link, listed or not.
    """
    files, folders = _contents(root, strict)
    changed = []
    present = set(files)
    listed = sorted(content.files.keys() & present)

    def is_same(name: str) -> bool:
        file, record = root / name, content.files[name]
        if not file.is_file() or (strict and file.is_symlink()):
            return False
        return file.stat().st_size == record.bytes and file_digest(file) == record.sha256

    with bar("compare", len(listed)) as advance, ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, same in zip(listed, threads.map(is_same, listed), strict=True):
            changed += [] if same else [name]
            advance(note=name)
    links = {name for name in folders if strict and (root / name.rstrip("/")).is_symlink()}
    unlisted = sorted((present - content.files.keys()) | (set(folders) - set(content.folders)) | links)
    added = (name for name in unlisted if strict or not any(part.startswith(".") for part in name.split("/")))
    lost = content.files.keys() - present - set(content.movable)
    return Differences(tuple(sorted(lost)), tuple(changed), tuple(added))


def renew(files: Iterable[Path], known: Mapping[Path, FileRecord] | None = None) -> None:
    """Record in the manifests above ``files`` that erasec has changed these files. Others keep their records, so a
    manifest still tells where they differ. Files in ``known`` are not read again."""
    by_root: dict[Path, list[Path]] = {}
    known = {path.resolve(): record for path, record in (known or {}).items()}
    for file in files:
        if root := find(file):
            by_root.setdefault(root, []).append(file.resolve())
    for root, changed in by_root.items():
        content, _ = read(root)
        names = {path.relative_to(root).as_posix(): path for path in changed}
        again = records(root, names, {name: known[path] for name, path in names.items() if path in known})
        renewed = tuple(sorted({*content.renewed, *names}))
        _save(root, content.model_copy(update={"files": content.files | again, "renewed": renewed}))


def check_readable(files: Iterable[Path]) -> None:
    """Raise ErasecError if a manifest above one of ``files`` is damaged, so that ``renew`` could not change it."""
    for root in {root for file in files if (root := find(file))}:
        read(root)


def combined_digest(files: Mapping[str, FileRecord]) -> str:
    """One sha256 for many files: that of a line "SHA256  PATH" for each, sorted by path, as ``sha256sum`` prints."""
    lines = (f"{record.sha256}  {name}\n" for name, record in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def contents(root: Path) -> list[str]:
    """The files below ``root`` that a manifest lists."""
    return _contents(root)[0]


def _contents(root: Path, whole: bool = False) -> tuple[list[str], list[str]]:
    """The files below ``root`` and the folders that are empty or links, without the manifest, its signature and,
    unless ``whole``, a rejected build."""
    files, folders = [], []
    for folder, inside, names in os.walk(root):
        where = Path(folder).relative_to(root)
        if where == Path():
            inside[:] = [name for name in inside if whole or name != REJECTED]
            names = [name for name in names if name not in (FILE, SIGNATURE)]
        elif not inside and not names:
            folders.append(f"{where.as_posix()}/")
        files += [(where / name).as_posix() for name in names]
        folders += [f"{(where / name).as_posix()}/" for name in inside if (root / where / name).is_symlink()]
    return sorted(files), sorted(folders)


def _save(root: Path, content: Manifest) -> None:
    with atomic_write(root / FILE) as temporary:
        temporary.write_bytes(_text(content))


def _text(content: Manifest) -> bytes:
    data = content.model_dump(mode="json", by_alias=True)
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
