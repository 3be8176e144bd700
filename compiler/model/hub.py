"""Fetches models from the hub: with limits on waiting, a message from the first second on, and none of it offline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.progress import bar, note

if TYPE_CHECKING:
    import httpx2

# The longest wait, in seconds, for a connection, and for the next bytes of an answer.
WAITS = {"connect": 5.0, "read": 15.0, "write": 15.0, "pool": 15.0}


def offline() -> bool:
    """Whether the environment forbids the network, as the hub's client reads it: HF_HUB_OFFLINE=1, on, yes or true."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def snapshot(
    repository: str, revision: str | None, wanted: Sequence[str], unwanted: Sequence[str], local: bool
) -> Path:
    """The folder with the files of a model that match a pattern in ``wanted`` and none in ``unwanted``.

    With ``local``, it is the one in the hub's cache, and nothing goes over the network. Else the files are fetched into
    that cache, and stderr says from where. Raises the exceptions of the hub's client.
    """
    from huggingface_hub import constants, snapshot_download

    if not local:
        note(f"fetching {repository} from {constants.ENDPOINT}")
        with bar(f"ask {constants.ENDPOINT}", 1):
            _ask(repository, revision)
    return Path(
        snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(unwanted),
            local_files_only=local,
        )
    )


def _ask(repository: str, revision: str | None) -> None:
    """Find out whether the hub answers, with one request: the client repeats each of its own for minutes."""
    from huggingface_hub import HfApi, get_session

    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:
        hooks.append(_limit)
    HfApi().model_info(repository, revision=revision, timeout=WAITS["read"])


def _limit(request: httpx2.Request) -> None:
    """Let no request wait longer than WAITS: most requests of the client have no limit of their own."""
    given = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {kind: min(given.get(kind) or limit, limit) for kind, limit in WAITS.items()}
