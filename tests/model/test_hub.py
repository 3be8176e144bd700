"""The hub is asked with a limit on waiting, and not at all offline."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from erasec.errors import ErasecError
from erasec.model import hub, loading


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[socket.socket]:
    """An endpoint that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(hub, "WAITS", dict.fromkeys(hub.WAITS, 0.5))
        yield server


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
    assert time.monotonic() - start < 5
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

    with pytest.raises(Exception, match="timed out"):
        hub._ask("owner/model", None)
    start = time.monotonic()
    with pytest.raises(Exception, match="timed out"):
        get_session().get(f"http://127.0.0.1:{silent.getsockname()[1]}/x", timeout=None)
    assert time.monotonic() - start < 5
