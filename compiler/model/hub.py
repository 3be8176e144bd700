"""Fetches models from the hub: with limits on waiting, a message from the first second on, and none of it offline."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.errors import ErasecError
from erasec.progress import bar, note

if TYPE_CHECKING:
    import httpx2

# The longest wait, in seconds, for a connection, and for the next bytes of an answer.
WAITS = {"connect": 5.0, "read": 15.0, "write": 15.0, "pool": 15.0}
# How often one request is sent that nothing new comes of. A hub that goes silent is given up after as many waits, with
# the client's pauses of a few seconds between them: after about a minute.
ATTEMPTS = 3


def offline() -> bool:
    """Whether the environment forbids the network, as the hub's client reads it: HF_HUB_OFFLINE=1, on, yes or true."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def snapshot(
    repository: str, revision: str | None, wanted: Sequence[str], unwanted: Sequence[str], local: bool
) -> Path:
    """The folder with the files of a model that match a pattern in ``wanted`` and none in ``unwanted``.

    With ``local``, it is the one in the hub's cache, and nothing goes over the network. Else the files are fetched into
    that cache, and stderr says from where. Raises ErasecError where the hub goes silent, and the exceptions of the
    hub's client.
    """
    from huggingface_hub import constants, snapshot_download

    if not local:
        _limit_requests()
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
    """Find out whether the hub answers, with one request: the client repeats each of its own."""
    from huggingface_hub import HfApi

    HfApi().model_info(repository, revision=revision, timeout=WAITS["read"])


def _limit_requests() -> None:
    """Limit what the client sends from now on, also after it has replaced its connections: with an empty list of
    requests that nothing came of."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    make = _http._GLOBAL_CLIENT_FACTORY  # the caller's own, such as one with a proxy
    while isinstance(make, partial) and make.func is _limited_client:
        (make, _) = make.args
    set_client_factory(partial(_limited_client, make, _Requests()))
    # The part of the client that fetches large files has waits of its own: of minutes, unless the environment says so.
    os.environ.setdefault("HF_XET_CLIENT_CONNECT_TIMEOUT", f"{WAITS['connect'] * 1000:.0f}ms")
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", f"{WAITS['read'] * 1000:.0f}ms")
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", str(ATTEMPTS - 1))


def _limited_client(make: Callable[[], httpx2.Client], requests: _Requests) -> httpx2.Client:
    client = make()
    client.event_hooks["request"].append(requests.limit)
    client.event_hooks["response"].append(requests.answered)
    return client


@dataclass
class _Requests:
    """The requests of one fetch: by method, address and range of bytes, how often each was sent, and its answer."""

    sent: dict[tuple[str, ...], int] = field(default_factory=dict)
    answers: dict[tuple[str, ...], httpx2.Response] = field(default_factory=dict)
    silent: str = ""  # the address of a request that was given up
    lock: threading.Lock = field(default_factory=threading.Lock)

    def limit(self, request: httpx2.Request) -> None:
        """Let no request wait longer than WAITS: most requests of the client have no limit of their own.

        Raises ErasecError where it was sent ATTEMPTS times before, or another one was given up.
        """
        given = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {kind: min(given.get(kind) or limit, limit) for kind, limit in WAITS.items()}
        key = _key(request)
        with self.lock:
            if _complete(self.answers.pop(key, None)):
                self.sent.pop(key, None)
            self.sent[key] = self.sent.get(key, 0) + 1
            if self.sent[key] > ATTEMPTS:
                self.silent = str(request.url)
        if self.silent:
            raise ErasecError(
                "the hub has gone silent",
                why=f"{ATTEMPTS} requests for the same part brought nothing, with {WAITS['read']:g} seconds for each",
                where=self.silent,
                fix="try again later: what was fetched stays in the hub's cache",
            )

    def answered(self, response: httpx2.Response) -> None:
        with self.lock:
            self.answers[_key(response.request)] = response


def _key(request: httpx2.Request) -> tuple[str, ...]:
    return request.method, str(request.url), request.headers.get("range", "")


def _complete(response: httpx2.Response | None) -> bool:
    """Whether an answer is one, so that the same request may be sent anew: a page that was read to its end, or an
    error, as the client waits as long as the hub wants before it asks again. Files are streamed, and never one page."""
    from httpx2 import ResponseNotRead

    if response is None or response.is_error or response.request.method == "HEAD":
        return response is not None
    try:
        return response.content is not None
    except ResponseNotRead:
        return False
