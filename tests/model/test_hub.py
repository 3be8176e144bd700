"""The hub is asked with a limit on waiting, and not at all offline."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi, close_session, set_client_factory
from huggingface_hub.utils import _http

from erasec.errors import ErasecError
from erasec.model import hub, loading


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[int], str]]:
    """A function that makes a port of this machine the hub. Waits are short, and the client does not pause."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CONNECT_TIMEOUT", "READ_TIMEOUT", "RETRY_MAX_ATTEMPTS"):
        monkeypatch.setenv(f"HF_XET_CLIENT_{name}", "1s")  # so that it is restored
        monkeypatch.delenv(f"HF_XET_CLIENT_{name}")
    monkeypatch.setattr(hub, "WAITS", dict.fromkeys(hub.WAITS, 0.3))
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def listen(port: int) -> str:
        endpoint = f"http://127.0.0.1:{port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        return endpoint

    yield listen
    set_client_factory(_http.default_client_factory)


@pytest.fixture
def silent(online: Callable[[int], str]) -> Iterator[socket.socket]:
    """A hub that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        online(server.getsockname()[1])
        yield server


SHA, CONTENT = "ab" * 20, bytes(range(256)) * 40


class Halting(BaseHTTPRequestHandler):
    """A hub with a model of one file. ``halts`` says when it goes silent, without closing the connection."""

    protocol_version = "HTTP/1.1"
    halts: set[str]
    over: threading.Event
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "/tree/" in self.path:
            listing = {"type": "file", "path": "model_index.json", "size": len(CONTENT), "oid": "1" * 40}
            self.answer(json.dumps([listing]).encode(), "tree" in self.halts)
        elif self.path.startswith("/api/"):
            self.answer(json.dumps({"id": "owner/model", "sha": SHA, "siblings": []}).encode())
        elif "starts over" in self.halts:
            self.answer(CONTENT, halt=True)
        else:
            start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            once = "once" in self.halts and not start
            self.answer(CONTENT[start:], halt=once or "file" in self.halts, start=start)

    def answer(self, content: bytes, halt: bool = False, start: int = 0) -> None:
        """Send half of ``content``; then the rest, or with ``halt`` nothing. What follows a halt is no byte at all."""
        self.send_response(206 if start else 200)
        length = len(CONTENT) if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{"1" * 40}"')
        self.end_headers()
        self.wfile.write(b"" if halt and start else content[: len(content) // 2])
        if halt:
            self.wfile.flush()
            self.over.wait(10)
            self.close_connection = True
            return
        self.wfile.write(content[len(content) // 2 :])

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def halting(online: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Halting]]:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # smaller parts are lost in a halt
    handler = type("Handler", (Halting,), {"halts": set(), "over": threading.Event(), "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        online(server.server_port)
        yield handler
        handler.over.set()
        server.shutdown()


def connections(server: socket.socket) -> int:
    """How many connections wait to be accepted."""
    server.setblocking(False)
    count = 0
    try:
        while True:
            server.accept()[0].close()
            count += 1
    except BlockingIOError:
        return count


def test_a_hub_that_never_answers_is_given_up(silent: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with pytest.raises(ErasecError, match="could not be fetched") as caught:
        loading.load("owner/model")
    assert time.monotonic() - start < 3
    assert "timed out" in caught.value.why
    assert f"note: fetching owner/model from http://127.0.0.1:{silent.getsockname()[1]}" in capsys.readouterr().err
    assert connections(silent)


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_offline_asks_nobody(silent: socket.socket, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(ErasecError, match="could not be fetched") as caught:
        loading.load("owner/model")
    assert "HF_HUB_OFFLINE" in caught.value.why
    assert connections(silent) == 0


def test_requests_of_the_client_without_a_limit_get_one(silent: socket.socket) -> None:
    from huggingface_hub import get_session

    hub._limit_requests()
    for _ in range(2):  # the client makes new connections after an error
        with pytest.raises(Exception, match="timed out"):
            hub._ask("owner/model", None)
        close_session()
    start = time.monotonic()
    with pytest.raises(Exception, match="timed out"):
        get_session().get(f"http://127.0.0.1:{silent.getsockname()[1]}/x", timeout=None)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("when", ["tree", "file", "starts over"])
def test_a_hub_that_goes_silent_later_is_given_up(halting: type[Halting], when: str) -> None:
    halting.halts.add(when)
    start = time.monotonic()
    with pytest.raises(ErasecError, match="the hub has gone silent") as caught:
        loading.load("owner/model")
    assert time.monotonic() - start < 3
    assert f"{hub.ATTEMPTS} requests" in caught.value.why and "0.3 seconds" in caught.value.why
    assert ("model_index.json" in caught.value.where) == (when != "tree")
    asked = halting.asked[-1]
    # Half of the file came with the first request, and nothing with the next ones, which ask for the rest.
    assert halting.asked.count(asked) == hub.ATTEMPTS + (when != "tree")


def test_a_hub_that_halts_once_is_waited_for(halting: type[Halting]) -> None:
    halting.halts.add("once")
    for _ in range(2):  # the same requests again are not repeated ones
        root = hub.snapshot("owner/model", None, ["*.json"], [], local=False)
        assert (root / "model_index.json").read_bytes() == CONTENT


def test_a_hub_with_an_error_is_asked_as_often_as_its_client_likes(online: Callable[[int], str]) -> None:
    class Busy(Halting):
        def do_GET(self) -> None:
            self.asked.append(self.path)
            self.send_response(503 if len(self.asked) < 5 else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

    Busy.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        online(server.server_port)
        hub._limit_requests()
        assert list(HfApi().list_repo_tree("owner/model")) == []
        server.shutdown()
    assert len(Busy.asked) == 5 > hub.ATTEMPTS


XET = """
import sys, time
from hf_xet import XetFileInfo
from huggingface_hub.utils._xet import get_xet_session
from erasec.model import hub

hub.WAITS = dict.fromkeys(hub.WAITS, 0.2)
hub._limit_requests()
url, start = sys.argv[1], time.monotonic()
login = dict(token="x", token_expiry_unix_secs=2**40, token_refresh_url=url, token_refresh_headers={})
try:
    with get_xet_session().new_file_download_group(endpoint=url, custom_headers={}, **login) as group:
        group.start_download_file(XetFileInfo("ab" * 32, 1000), sys.argv[2])
except RuntimeError:
    print(time.monotonic() - start)
"""


def test_the_storage_of_large_files_is_given_up_too(silent: socket.socket, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{silent.getsockname()[1]}"
    environment = {**os.environ, "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
    command = [sys.executable, "-c", XET, url, str(tmp_path / "file")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert float(done.stdout) < 5, done.stderr
    assert connections(silent) >= hub.ATTEMPTS
