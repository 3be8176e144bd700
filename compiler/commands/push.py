"""``erasec push``: a verified bundle becomes one commit of a repository on the hub.

Nothing is sent before the bundle is verified and what can undo the erasure is refused or allowed. The files go up as
they are, in one commit, so that the repository holds the whole bundle or none of it. What the hub holds is compared
with the bundle before, to send nothing twice, and afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint import manifest
from erasec.checkpoint.manifest import FileRecord
from erasec.commands.belonging import Bundle
from erasec.commands.output_paths import BESIDE
from erasec.commands.verify import raise_for_fault, verify
from erasec.errors import CheckFailed, ErasecError, reason, suggestion, words
from erasec.model import hub
from erasec.progress import note

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

SCHEME = "hub:"
MAIN = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
# The hub writes this file into every repository: it says which files are large. Nothing loads it.
OF_THE_HUB = ".gitattributes"
AGAIN = "push again: a commit is made whole or not at all, and what the hub holds already is not sent twice"


@dataclass(frozen=True)
class Upload:
    """A verified bundle and where it goes. ``files`` are its files by their paths in the repository, with the record of
    each. ``undoing`` are the paths in it that can undo the erasure, and ``digest`` is the sha256 of the manifest."""

    bundle: Path
    repository: str
    files: dict[str, tuple[Path, FileRecord]]
    outcome: str
    verdict: str
    unjudged: tuple[str, ...]
    undoing: tuple[str, ...]
    digest: str

    @property
    def bytes(self) -> int:
        return sum(record.bytes for _, record in self.files.values())


@dataclass(frozen=True)
class Pushed:
    """What ``push`` did: the address and the commit that hold the bundle, whether this push made the commit (``new``),
    and the files of earlier pushes that it removed."""

    url: str
    commit: str
    new: bool
    removed: tuple[str, ...]
    private: bool
    gated: bool


def prepare(
    bundle: Path, destination: str, artifact: str = "", with_undoing: bool = False, gate: bool = False
) -> Upload:
    """Verify ``bundle`` and say what would be sent to ``destination``, "hub:ORG/NAME". Sends nothing.

    With ``artifact``, the files of that folder lie at the root of the repository, beside those that describe the build.
    Raises CheckFailed where the bundle is damaged or rejected, or not judged with ``gate``; ErasecError where it is no
    build, has no such artifact, or holds what can undo the erasure without ``with_undoing``.
    """
    repository = parse_destination(destination)
    bundle = bundle.expanduser()
    raise_for_fault(verify(bundle), bundle)
    content, digest = manifest.read(bundle)
    report = Bundle(bundle, content).report
    unjudged = tuple(report["unjudged"])
    if gate and report["outcome"] != "passed":
        raise CheckFailed(
            f"the build is {report['outcome']}",
            why=f"no judge could see {words(unjudged)} in its pictures, and --gate demands a build that passed",
            where=str(bundle),
            fix="build it with a judge that can see the concept (docs/judges.md); or push without --gate",
        )
    names = manifest.contents(bundle)
    beside = [name for name in (manifest.FILE, manifest.SIGNATURE) if (bundle / name).is_file()]
    paths = {name: name for name in (*names, *beside)}
    if artifact:
        paths = _of_artifact(artifact, names, [item["path"] for item in report["written"]])
    undoing = [item for item in report["undoing"] if item["inside"] and _holds(paths.values(), item["path"])]
    reasons = [f"{item['path']} ({item['undoes']})" for item in undoing]
    reasons += [f"the weights, which show {concept} again" for concept in report["extras"]["keys"]]
    if reasons and not with_undoing:
        raise ErasecError(
            "the bundle can undo its own erasure",
            why=f"it holds {words(reasons)}",
            where=str(bundle),
            fix="build it with --publish, which keeps that apart; or give --with-undoing, which makes the repository "
            "gated",
        )
    known = manifest.records(bundle, paths.values(), content.files)
    files = {path: (bundle / name, known[name]) for path, name in sorted(paths.items())}
    return Upload(
        bundle,
        repository,
        files,
        report["outcome"],
        report["verdict"],
        unjudged,
        tuple(item["path"] for item in undoing) + tuple(f"weights: {name}" for name in report["extras"]["keys"]),
        digest,
    )


def parse_destination(text: str) -> str:
    """The repository "ORG/NAME" of "hub:ORG/NAME". Raises ErasecError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # it is one of its public names

    repository = text.removeprefix(SCHEME)
    try:
        validate_repo_id(repository)
        if repository == text or repository.count("/") != 1:
            raise HFValidationError(f"it is not of the form {SCHEME}ORG/NAME")
    except HFValidationError as error:
        fix = f"give {SCHEME}ORG/NAME, such as {SCHEME}our-team/sd14-without-nudity"
        raise ErasecError(f"{text!r} is no repository of the hub", why=reason(error), fix=fix) from error
    return repository


def _of_artifact(artifact: str, names: Sequence[str], written: Sequence[str]) -> dict[str, str]:
    """The files of an artifact at the root, and beside them what describes the build. Manifest and signature are about
    the paths in the bundle, and are left out; so is a card of the base model inside the artifact."""
    if artifact not in written:
        raise ErasecError(
            f"the bundle has no artifact {artifact!r}", why=suggestion(artifact, written), fix="name a folder of it"
        )
    folder = f"{artifact}/"
    paths = {name.removeprefix(folder): name for name in names if name.startswith(folder)}
    return paths | {name: name for name in BESIDE if name in names}


def _holds(names: Iterable[str], path: str) -> bool:
    return any(name == path or name.startswith(f"{path}/") for name in names)


def push(upload: Upload, revision: str = "", private: bool | None = None) -> Pushed:
    """Send ``upload`` to the branch ``revision`` of its repository, which is made where it does not exist: private,
    unless ``private`` is False. An existing repository stays as private as it is.

    Raises ErasecError where the hub refuses, where nobody is logged in, or where the hub afterwards holds anything
    else.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    branch = revision or MAIN
    _check_reachable(branch)
    api, repository = HfApi(), upload.repository
    with _hub_errors(repository, api.endpoint):
        info = _open(api, repository, private)
        if upload.undoing and info.gated != "manual":
            info = _gate(api, repository)
        if branch != MAIN:
            api.create_branch(repository, branch=branch, exist_ok=True)
        before = api.model_info(repository, revision=branch, files_metadata=True)
        wrong, foreign = _differences(upload, before.siblings or [])
        commit = str(before.sha)
        if wrong or foreign:
            additions = [CommitOperationAdd(path, str(file)) for path, (file, _) in upload.files.items()]
            made = api.create_commit(
                repository,
                [*additions, *(CommitOperationDelete(path, is_folder=False) for path in foreign)],
                commit_message=f"erasec: {upload.verdict}",
                commit_description=f"sha256 of {manifest.FILE}: {upload.digest}",
                revision=branch,
                parent_commit=before.sha,
            )
            commit = made.oid
            after = api.model_info(repository, revision=commit, files_metadata=True)
            for left in _differences(upload, after.siblings or []):
                _raise_for_rest(repository, left)
    url = f"{api.endpoint}/{repository}/commit/{commit}"
    return Pushed(url, commit, bool(wrong or foreign), tuple(foreign), bool(info.private), bool(info.gated))


def _raise_for_rest(repository: str, paths: Sequence[str]) -> None:
    if paths:
        what = f"{repository} does not hold what was pushed"
        raise CheckFailed(what, why=f"{paths[0]} is not the file of the bundle", fix=AGAIN)


def _check_reachable(branch: str) -> None:
    """Raise ErasecError where a push cannot work, before anything is sent."""
    from huggingface_hub import get_token

    if hub.offline():
        raise ErasecError(
            "a push needs the network", why="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set", fix="unset it"
        )
    if COMMIT.fullmatch(branch):
        raise ErasecError(
            f"{branch} is a commit", why="commits never change", fix="give the name of a branch with --revision"
        )
    if not get_token():
        raise ErasecError(
            "nobody is logged in to the hub",
            why="there is no token",
            fix="set HF_TOKEN to a token that may write, or run: hf auth login",
        )


def _open(api: HfApi, repository: str, private: bool | None) -> ModelInfo:
    """The repository, which is made if it does not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private is not False, exist_ok=True)
        return api.model_info(repository)
    if private is not None and bool(info.private) != private:
        state = "private" if info.private else "public"
        raise ErasecError(
            f"{repository} is {state}",
            why="a push does not change who may see a repository that exists",
            fix=f"leave out --{'private' if private else 'public'}, or change it in the settings of the repository",
        )
    return info


def _gate(api: HfApi, repository: str) -> ModelInfo:
    """Make a repository gated: each access is granted by hand. Raises CheckFailed where the hub did not do it."""
    api.update_repo_settings(repository, gated="manual")
    info = api.model_info(repository)
    if info.gated != "manual":
        raise CheckFailed(
            f"{repository} is not gated",
            why="the hub did not take the setting, and the bundle holds what can undo the erasure",
            fix="gate it in the settings of the repository; nothing was sent",
        )
    note(f"{repository} is gated now: its owners grant each access by hand")
    return info


def _differences(upload: Upload, siblings: Sequence[RepoSibling]) -> tuple[list[str], list[str]]:
    """The paths of ``upload`` that the hub lacks or holds with other bytes; and those that only the hub has."""
    held = {item.rfilename: item for item in siblings}
    wrong = [path for path, (file, record) in upload.files.items() if not _same(held.get(path), file, record)]
    return wrong, sorted(held.keys() - upload.files.keys() - {OF_THE_HUB})


def _same(held: RepoSibling | None, file: Path, record: FileRecord) -> bool:
    """Whether the hub holds these bytes. It names large files by their sha256, and others as git does."""
    from huggingface_hub.utils.sha import git_hash

    if held is None:
        return False
    if held.lfs is not None:
        return held.lfs.sha256 == record.sha256
    return held.size == record.bytes and held.blob_id == git_hash(file.read_bytes())


@contextmanager
def _hub_errors(repository: str, endpoint: str) -> Iterator[None]:
    """Turn what the client of the hub raises into ErasecError. The client never puts the token into a message."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except ErasecError:
        raise
    except HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        fix = "use a token that may write to it: set HF_TOKEN, or run: hf auth login" if refused else AGAIN
        why = f"{error.response.status_code}: {error.server_message or reason(error)}"
        raise ErasecError(f"the hub refused the push to {repository}", why=why, where=endpoint, fix=fix) from error
    except (HTTPError, RuntimeError, ValueError, OSError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise ErasecError(f"the push to {repository} failed", why=reason(cause), where=endpoint, fix=AGAIN) from error
