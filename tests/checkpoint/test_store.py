"""The store: entries are whole or not used, it stays below its limit, and nothing that is in use is removed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from erasec.checkpoint import owned, store
from erasec.checkpoint.disk import DiskFull
from erasec.errors import ErasecError

OLD = store.STARTED - 1000  # before this process began


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(store, "_unchecked", {})
    return tmp_path / "store"


def fill(content: bytes = b"graph", name: str = "model") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)
        (folder / "more").write_bytes(b"more")

    return write


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def age(seconds: float) -> None:
    """Make all entries ``seconds`` older than this process."""
    for entry in store.entries():
        os.utime(entry.path, (store.STARTED - seconds, store.STARTED - seconds))


def test_environment_variables_set_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "own"))
    assert store.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("ERASEC_CACHE")
    assert store.cache_folder() == tmp_path / "xdg" / "erasec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_folder() == Path.home() / ".cache" / "erasec"


def test_a_file_is_read_as_it_was_written() -> None:
    assert store.read_entry("pictures", "key") is None
    store.write_entry("pictures", "key", b"content")
    assert store.read_entry("pictures", "key") == b"content"
    assert store.read_entry("audit", "key") is None


def test_a_file_with_any_other_byte_or_length_is_not_used(root: Path) -> None:
    file = root / "pictures" / "key"
    for damage in range(store.DIGEST + 4):
        store.write_entry("pictures", "key", b"four")
        flip(file, damage)
        assert store.read_entry("pictures", "key") is None
    for length in (0, 3, store.DIGEST, store.DIGEST + 3):
        store.write_entry("pictures", "key", b"four")
        os.truncate(file, length)
        assert store.read_entry("pictures", "key") is None


def test_a_folder_with_any_other_byte_or_file_is_not_used_and_is_replaced(root: Path) -> None:
    folder = root / "graphs" / "key"

    def check() -> None:
        assert store.read_folder("graphs", "key") is None
        assert store.write_folder("graphs", "key", fill()) == folder
        assert store.read_folder("graphs", "key") == folder

    check()
    for name in ("model", "more", store.DIGESTS):
        for place in range((folder / name).stat().st_size):
            flip(folder / name, place)
            assert not store.is_whole(folder), (name, place)
            check()
        (folder / name).unlink()
        check()
    (folder / "third").touch()
    check()


def test_the_first_of_two_stays_unless_it_is_to_be_replaced() -> None:
    folder = store.write_folder("graphs", "key", fill(b"first"))
    store.write_folder("graphs", "key", fill(b"second"))
    assert (folder / "model").read_bytes() == b"first"
    store.write_folder("graphs", "key", fill(b"third"), replace=True)
    assert (folder / "model").read_bytes() == b"third" and store.is_whole(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["key"]


def test_concurrent_writers_leave_one_whole_folder(root: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(10):
            list(pool.map(lambda _, key=str(number): store.write_folder("graphs", key, fill()), range(8)))
            assert store.read_folder("graphs", str(number))
    assert len(list((root / "graphs").iterdir())) == 10


def test_a_full_disk_leaves_nothing(root: Path) -> None:
    def write(folder: Path) -> None:
        fill()(folder)
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="No space"):
        store.write_folder("graphs", "key", write)
    assert not list((root / "graphs").iterdir())


def test_only_their_owner_reads_edits(root: Path) -> None:
    store.write_folder("edits", "key", fill())
    store.write_folder("graphs", "key", fill())
    modes = {kind: (root / kind).stat().st_mode & 0o777 for kind in ("edits", "graphs")}
    assert modes == {"edits": 0o700, "graphs": 0o755}


def test_the_entries_used_longest_ago_go_when_the_store_outgrows_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, seconds in enumerate((5, 80, 90, 70)):  # the first one was used last
        store.write_entry("pictures", f"{number}", bytes(1000))
        used = store.STARTED - seconds
        os.utime(store.cache_folder() / "pictures" / f"{number}", (used, used))
    monkeypatch.setenv(store.LIMIT, "3.5kB")
    store._unchecked.clear()
    store.write_entry("pictures", "new", bytes(1000))
    assert {entry.path.name for entry in store.entries()} == {"0", "3", "new"}


def test_reading_is_a_use_and_what_this_process_used_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_entry("pictures", "read", bytes(1000))
    store.write_folder("graphs", "found", fill())
    age(100)
    assert store.read_entry("pictures", "read") and store.read_folder("graphs", "found")
    monkeypatch.setenv(store.LIMIT, "1kB")
    store._unchecked.clear()
    store.write_entry("pictures", "new", bytes(5000))
    assert {entry.path.name for entry in store.entries()} == {"read", "found", "new"}


def test_with_a_limit_that_is_no_size_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_entry("pictures", "old", b"content")
    monkeypatch.setenv(store.LIMIT, "20gb")
    with pytest.raises(ErasecError, match="'20gb' is no size") as caught:
        store.write_entry("pictures", "key", b"content")
    assert store.LIMIT in caught.value.fix
    with pytest.raises(ErasecError, match="no size"), store.unusable_is_noted():
        store.write_folder("graphs", "key", fill())
    assert [entry.path.name for entry in store.entries()] == ["old"]


def test_what_the_disk_and_other_commands_prevent_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    store._note.cache_clear()
    errors = (OSError(13, "no access"), DiskFull(Path("/"), 5), owned.held_error(Path("/none")))
    for error in errors:
        with store.unusable_is_noted():
            raise error
    printed = capsys.readouterr().err
    assert all(text in printed for text in ("no access", "no space left", "another command is writing there"))


HOLD = """
import sys
from erasec.checkpoint import store
store.read_entry("pictures", "key")
print("held", flush=True)
sys.stdin.read()
"""


def test_nothing_is_removed_while_another_command_uses_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        store.write_entry("pictures", f"{number}", bytes(1000))
    age(100)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ErasecError, match="the cache is in use"):
            store.prune(0)
        monkeypatch.setenv(store.LIMIT, "1kB")
        store._unchecked.clear()
        store.write_entry("pictures", "new", bytes(1000))
        assert len(store.entries()) == 4
        other.kill()  # the kernel gives the lock back, however a process ends
    assert len(store.prune(1100)) == 3


PRUNE = """
from erasec.checkpoint import store
from erasec.errors import ErasecError
try:
    print(len(store.prune(0)))
except ErasecError as error:
    print(error.what)
"""


def prune_elsewhere() -> str:
    """What another process prints that removes all entries."""
    return subprocess.run([sys.executable, "-c", PRUNE], capture_output=True, text=True, check=True).stdout.strip()


def test_an_attempt_to_be_alone_that_fails_gives_no_lock_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel drops a shared lock that cannot be made exclusive: meanwhile no other process may remove entries."""
    store.write_folder("graphs", "key", fill())
    flock, printed = store.fcntl.flock, []
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"

        def interrupted(handle: int, how: int) -> None:
            try:
                flock(handle, how)
            except OSError:
                other.kill()
                other.wait()
                printed.append(prune_elsewhere())
                raise

        monkeypatch.setattr(store.fcntl, "flock", interrupted)
        with pytest.raises(ErasecError, match="in use"):
            store.prune(0)
    monkeypatch.undo()
    assert printed == ["the cache is in use"]


def test_a_store_that_can_only_be_read_is_locked_as_well(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = 'from erasec.checkpoint import store; store.write_entry("pictures", "key", b"c")'
    subprocess.run([sys.executable, "-c", write], check=True)
    opened = os.open

    def read_only(path: Path, flags: int, *mode: int) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "open", read_only)
        assert store.read_entry("pictures", "key") == b"c"
        with pytest.raises(PermissionError):
            store.prune(0)
    assert prune_elsewhere() == "the cache is in use"
    assert len(store.entries()) == 1


def test_what_cannot_be_removed_is_not_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_entry("pictures", "key", b"content")
    monkeypatch.setattr(store, "remove", lambda path: None)
    assert store.prune(0) == []


def test_pruning_by_age_and_by_kind() -> None:
    for kind in ("pictures", "audit"):
        store.write_entry(kind, "old", bytes(100))
    age(1000)
    store.write_entry("pictures", "new", bytes(100))
    assert not store.prune(10**9, older=time.time() - OLD + 3600)
    assert [entry.path.name for entry in store.prune(10**9, older=500, kinds=["pictures"])] == ["old"]
    assert {(entry.kind, entry.path.name) for entry in store.entries()} == {("pictures", "new"), ("audit", "old")}


def test_damaged_entries_are_named_and_removed(root: Path) -> None:
    store.write_entry("pictures", "good", b"content")
    store.write_entry("pictures", "bad", b"content")
    store.write_folder("graphs", "bad", fill())
    flip(root / "pictures" / "bad", 35)
    (root / "graphs" / "bad" / "more").unlink()
    damaged = [entry for entry in store.entries() if not entry.is_whole()]
    assert {(entry.kind, entry.path.name) for entry in damaged} == {("pictures", "bad"), ("graphs", "bad")}
    store.remove_damaged(damaged)
    assert [entry.path.name for entry in store.entries()] == ["good"]


def test_an_entry_that_was_exchanged_meanwhile_is_not_removed(root: Path) -> None:
    for key in ("one", "two"):
        store.write_folder("graphs", key, fill())
        flip(root / "graphs" / key / "model", 0)
    damaged = [entry for entry in store.entries() if not entry.is_whole()]
    store.write_folder("graphs", "one", fill(), replace=True)
    assert [entry.path.name for entry in store.remove_damaged(damaged)] == ["two"]
    assert [entry.path.name for entry in store.entries()] == ["one"]


def test_no_damaged_entry_is_removed_while_another_command_uses_the_store(root: Path) -> None:
    store.write_entry("pictures", "bad", b"content")
    flip(root / "pictures" / "bad", 35)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert store.remove_damaged(store.entries()) == [] and len(store.entries()) == 1
        other.kill()
    assert len(store.remove_damaged(store.entries())) == 1
