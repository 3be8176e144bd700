"""``erasec verify``: proof of a build for somebody who has it from somebody else.

``erasec check`` says whether a folder is what was built and runs here. This says more, and nothing about running: no
file is without a digest, the signature is that of a key, report and card belong to these bytes, tensors that no edit
changes are those of the base, and each artifact holds exactly the merged weights. The first thing that is wrong ends
it. What cannot be verified here is said, and never counts as verified.
"""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erasec.base import Target
from erasec.checkpoint import manifest, signature
from erasec.checkpoint.folder import EXTRAS_FILE, Folder, only_variant
from erasec.checkpoint.safetensors import content_digest, read_header
from erasec.commands import belonging
from erasec.commands.belonging import Bundle
from erasec.commands.diff import same_bytes
from erasec.commands.plan import make_target
from erasec.errors import CheckFailed, ErasecError, MissingTool, reason
from erasec.model import loading
from erasec.model.threads import fixed_threads
from erasec.progress import bar
from erasec.recipe.recipe import code_file, parse_named_options

if TYPE_CHECKING:
    from erasec.base import Check, EditTarget
    from erasec.model.view import Model

State = Literal["verified", "not verified", "wrong"]
STATES = {
    "lost": "is missing: it is listed in",
    "changed": "is not the file that was built, by size and sha256 in",
    "added": "is there, and is not listed in",
}
GIT_FILE = ".gitattributes"
CODE = "its weights: its target is a Python file, which may be anybody's and is not run"
MEASURED = (
    "What the report says of pictures and attacks was measured by who built this, and not again: erasec check runs it, "
    "erasec audit attacks it."
)


@dataclass(frozen=True)
class Finding:
    """What was verified, or could not be, or is wrong; ``how`` is one sentence."""

    what: str
    state: State
    how: str


@dataclass(frozen=True)
class Verification:
    """All findings, the wrong one last, and sentences that the receiver must know besides."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def wrong(self) -> str:
        """The first thing that is wrong, as a sentence; "" if nothing is."""
        return next((finding.how for finding in self.findings if finding.state == "wrong"), "")

    @property
    def outcome(self) -> str:
        """ "verified", "verified in part" or "wrong"."""
        if self.wrong:
            return "wrong"
        return "verified in part" if any(item.state == "not verified" for item in self.findings) else "verified"


class _Unverified(Exception):
    """Raised by a step that cannot verify anything here, with the reason."""


@fixed_threads()
def verify(
    root: Path,
    base: str = "",
    key: Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> Verification:
    """Verify the build in ``root``. ``base`` is the model that was edited, and ``key`` the public key of who signed it.

    Raises ErasecError where ``root`` is no build, or where the base or the key cannot be read, and MissingTool where
    the library for a signature is missing and a ``key`` is given.
    """
    root = root.expanduser()
    if not (root / manifest.FILE).is_file():
        around = manifest.find(root)
        raise ErasecError(
            f"{root} is no build",
            why=f"it has no {manifest.FILE}" + (f", but {around} has one" if around else ""),
            fix="give the output folder of erasec build",
        )
    if key is not None:
        signature.check_public_key(key)
    findings: list[Finding] = []
    for what, step in _steps(root, base, key, (revision, variant, allow_pickle)):
        try:
            findings.append(Finding(what, "verified", step()))
        except _Unverified as error:
            findings.append(Finding(what, "not verified", str(error)))
        except MissingTool as error:
            findings.append(Finding(what, "not verified", f"{error.what} ({error.why}): {error.fix}"))
        except ErasecError as error:
            findings.append(Finding(what, "wrong", ": ".join(filter(None, (error.what, error.why)))))
            return Verification(tuple(findings))
    bundle = Bundle(root, manifest.read(root)[0])
    inside = [item for item in bundle.report["undoing"] if item["inside"] and (root / item["path"]).exists()]
    notes = [f"{item['path']} can undo the erasure: {item['undoes']}." for item in inside]
    if bundle.report["outcome"] == "not judged":
        notes.append("No judge could see a concept of this build in its pictures: look at report.html.")
    return Verification(tuple(findings), (*notes, MEASURED))


def _steps(
    root: Path, base: str, key: Path | None, options: tuple[str | None, str | None, bool]
) -> Iterator[tuple[str, Callable[[], str]]]:
    """The steps by name, in their order. Later ones rely on what earlier ones verified."""
    yield "files", lambda: _files(root)
    yield "signature", lambda: _signature(root, key)
    bundle = Bundle(root, manifest.read(root)[0])
    if (root / GIT_FILE).is_file() and GIT_FILE not in bundle.content.files:
        yield GIT_FILE, partial(_raise_unverified, "its content: hubs add it, and only git reads it")
    yield "report", lambda: belonging.report(bundle)
    yield "card", lambda: belonging.card(bundle)
    yield "recipe", lambda: belonging.recipe(bundle)
    yield "provenance", lambda: belonging.provenance(bundle)
    yield "bill of materials", lambda: belonging.bill(bundle)
    texts = {parse_named_options(text, "--target").name: text for text in bundle.recipe.targets}
    merged_name = next(iter(texts))
    merged = Folder(root / merged_name, bundle.recipe.variant or only_variant(root / merged_name))
    model = _load_base(base, bundle, *options) if base else None
    yield f"{merged_name} and the base", lambda: _same_as_base(bundle, merged, model)
    written = [item["target"] for item in bundle.report["written"]]  # each is a folder: belonging.report
    for name in written:
        if name != merged_name:
            yield name, partial(_artifact, root / name, texts.get(name), merged, model)
    for name in written:
        if name in texts and (why := _unread_reason(texts[name])):
            yield f"inside {name}", partial(_raise_unverified, why)


def _raise_unverified(why: str) -> str:
    raise _Unverified(why)


def _files(root: Path) -> str:
    """Every file has the size and digest of the manifest, and there is no other."""
    content, digest = manifest.read(root)
    differences = manifest.compare(root, content, strict=True)
    for state, what in STATES.items():
        for name in getattr(differences, state):
            if state != "added" or not _is_git_file(root, name):
                raise CheckFailed(f"{name} {what} {manifest.FILE}")
    if (root / manifest.FILE).is_symlink() or (root / manifest.SIGNATURE).is_symlink():
        raise CheckFailed(f"{manifest.FILE} or {manifest.SIGNATURE} is a link")
    if content.renewed:
        raise CheckFailed(f"{content.renewed[0]} was changed after the build, by a relink or an edit in place")
    away = [name for name in content.movable if not (root / name).exists()]  # a key, which may be kept elsewhere
    how = f"{len(content.files) - len(away)} files are those of {manifest.FILE} (sha256 {digest[:12]}...)"
    how += f", and there is no other file{f' but {GIT_FILE}' if GIT_FILE in differences.added else ''}"
    return how + (f"; {', '.join(away)} was taken away, as it may be" if away else "")


def _is_git_file(root: Path, name: str) -> bool:
    """Whether a file is the one that hubs add to a repository. Only git reads it, and no digest covers it."""
    return name == GIT_FILE and (root / name).is_file() and not (root / name).is_symlink()


def _signature(root: Path, key: Path | None) -> str:
    signed = (root / manifest.SIGNATURE).is_file()
    if key is None:
        if not signed:
            raise _Unverified(f"who made the build: it has no {manifest.SIGNATURE}")
        why = "give the public key of who signed it, --key"
        raise _Unverified(f"{manifest.SIGNATURE}, neither who made it nor which files it covers: {why}")
    if not signed:
        raise CheckFailed(f"there is no {manifest.SIGNATURE}: nobody signed this build")
    if fault := signature.find_fault(root, key):
        raise CheckFailed(fault)
    return f"{manifest.SIGNATURE} was made with the key {key.name}, over every other file"


def _load_base(name: str, bundle: Bundle, revision: str | None, variant: str | None, allow_pickle: bool) -> Model:
    """The base. For a model of the hub, the revision of the build by default. Raises ErasecError."""
    local = name in loading.BUNDLED or Path(name).expanduser().exists()
    if revision is None and not local:
        revision = bundle.report["model"]["revision"] or None
    return loading.load(name, revision, variant or bundle.recipe.variant, allow_pickle)


def _same_as_base(bundle: Bundle, merged: Folder, base: Model | None) -> str:
    """Tensors that the provenance does not list as edited are the base's, and so are all other files."""
    if base is None:
        raise _Unverified("whether what was not edited is the base's: give the model that was edited, --base MODEL")
    if base.digest != bundle.report["model"]["digest"]:
        raise CheckFailed(f"{base.name} is not the base of this build: its weights have another digest than the report")
    edited = bundle.statement["predicate"]["buildDefinition"]["internalParameters"]["edited"]
    unknown, count = {*edited}, 0
    with bar("compare with the base", len(base.family.components)) as advance:
        for component in base.family.components:
            before, after = base.entries(component), merged.entries(component)
            if differ := sorted(before.keys() ^ after.keys()):
                raise CheckFailed(f"{component}/{differ[0]} is a tensor of only one of the base and {merged.root.name}")
            for key, entry in before.items():
                name, stored = f"{component}/{key}", after[key]
                if (entry.dtype, entry.shape) != (stored.dtype, stored.shape):
                    raise CheckFailed(f"{name} has another dtype or shape than in the base")
                if name in edited:
                    unknown.discard(name)
                    if content_digest({key: entry}) != edited[name]:
                        raise CheckFailed(f"{name} of the base is not the tensor that the provenance says was edited")
                elif not same_bytes(entry, stored):
                    raise CheckFailed(f"{name} is not the base's, and the provenance does not list it as edited")
                count += 1
            advance(note=component)
    if unknown:
        raise CheckFailed(f"the provenance lists {min(unknown)} as edited, and the base has no such tensor")
    how = f"{count - len(edited)} tensors are those of {base.name}, and the {len(edited)} others are listed as edited"
    if type(base.source) is not Folder:
        return f"{how}; a single file has no configs to compare"
    return f"{how}; so are {_same_files(base, merged, {name.split('/', 1)[0] for name in edited})} other files"


def _same_files(base: Model, merged: Folder, changed: set[str]) -> int:
    """Count the files without edited tensors, which are the base's byte for byte; headers of the others are too."""
    edited = {file.name: file for component in changed for file in base.source.weight_files(component)}
    weights = {file.relative_to(base.source.root) for file in edited.values()}
    expected = {*base.source.files()} - {*base.source.other_copies(changed)} - {Path(EXTRAS_FILE)}
    if differ := sorted(expected ^ ({*merged.files()} - {Path(EXTRAS_FILE)})):
        raise CheckFailed(f"{differ[0].as_posix()} is a file of only one of the base and {merged.root.name}")
    for name in sorted(expected):
        before, after = base.source.root / name, merged.root / name
        same = read_header(before)[1] == read_header(after)[1] if name in weights else filecmp.cmp(before, after, False)
        if not same:
            raise CheckFailed(f"{name.as_posix()} is not the base's")
    return len(expected - weights)


def _target(text: str) -> Target | EditTarget:
    """The target with its options. Raises _Unverified where it is not installed here, and for a class in a Python file,
    which is not run."""
    if code_file(parse_named_options(text, "--target").name) is not None:
        raise _Unverified(CODE)
    try:
        return make_target(text)
    except ErasecError as error:
        raise _Unverified(f"its weights: {error.what}") from error


def _unread_reason(text: str) -> str:
    try:
        return _target(text).unread_reason()
    except _Unverified:
        return ""


def _artifact(out: Path, text: str | None, merged: Folder, base: Model | None) -> str:
    """The artifact in ``out`` holds exactly the weights of ``merged``. ``text`` is its target in the recipe; None where
    that is a class in a Python file, whose name the file has."""
    if text is None:
        raise _Unverified(CODE)
    target = _target(text)
    if not isinstance(target, Target) and base is None:
        raise _Unverified("whether the base with this edit is the merged checkpoint: give the base, --base MODEL")
    try:
        checks = _compare(target, out, merged, base)
    except ErasecError:
        raise
    except Exception as error:  # of any library that reads the format
        raise CheckFailed(f"{target.name} cannot be read: {reason(error)}") from error
    if not checks:
        raise _Unverified(f"its weights: the target {target.name} cannot compare them")
    for check in checks:
        if not check.passed:
            raise CheckFailed(f"{target.name} does not hold the merged weights: {check.how}")
    if loose := [check for check in checks if check.limit is None]:
        raise _Unverified(f"whether all of it is what was merged: {loose[0].value:.2g} {loose[0].how}")
    return f"holds exactly the weights of {merged.root.name} ({len(checks)} comparisons)"


def _compare(target: Any, out: Path, merged: Folder, base: Model | None) -> tuple[Check, ...] | None:
    compared: tuple[Check, ...] | None
    compared = target.compare(merged, out) if isinstance(target, Target) else target.compare(base, merged, out)
    return compared


def raise_for_fault(verification: Verification, root: Path) -> None:
    """Raise CheckFailed with the first thing that is wrong."""
    if verification.wrong:
        fix = "fetch it again from who built it; do not use this one"
        raise CheckFailed(verification.wrong, where=str(root), fix=fix)
