"""Signatures: a client that nobody here wrote verifies them, every byte of one counts, and bad keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from signed import key_pair, needs_signing

from erasec.checkpoint import manifest, signature
from erasec.errors import ErasecError

pytestmark = needs_signing


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "stage"
    for name in ("report.json", "hf/unet/weights", "hf/.hidden"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    manifest.write(root)
    return root


def test_the_library_s_own_verifier_accepts_it_and_knows_the_name(root: Path, tmp_path: Path) -> None:
    from model_signing import verifying

    private, public = key_pair(tmp_path)
    signature.sign(root, private, "star")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.pem", "key.pub", "stage"]
    config: Any = verifying.Config
    config().use_elliptic_key_verifier(public_key=public).verify(root, root / manifest.SIGNATURE)
    assert signature.find_fault(root, public) == ""
    assert manifest.compare(root, manifest.read(root)[0], strict=True).all == ()  # which does not list the signature
    (root / "hf/unet/weights").write_text("unedited")
    with pytest.raises(ValueError, match="hf/unet/weights"):
        config().use_elliptic_key_verifier(public_key=public).verify(root, root / manifest.SIGNATURE)


def test_every_other_file_is_signed(root: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    signature.sign(root, private, "star")
    for file in (root / manifest.FILE, root / "hf/.hidden"):
        data = file.read_bytes()
        file.write_bytes(data + b" ")
        name = file.relative_to(root)
        assert signature.find_fault(root, public).startswith(f"{name} is not the file that was signed")
        file.unlink()
        assert signature.find_fault(root, public).startswith(f"{name} was signed and is not there")
        file.write_bytes(data)
    (root / "more").touch()
    assert signature.find_fault(root, public).startswith("more was not signed")


def test_every_byte_of_a_signature_counts(root: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    signature.sign(root, private, "star")
    file = root / manifest.SIGNATURE
    data = file.read_bytes()
    start = data.index(b'"payload":"') + 400  # the inside of the payload is long, and alike everywhere
    stop = data.index(b'"payloadType"') - 200
    for place in [*range(start), *range(start, stop, 97), *range(stop, len(data))]:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert signature.find_fault(root, public), data[place - 20 : place + 20]
    file.write_bytes(data)
    assert signature.find_fault(root, public) == ""
    _, other = key_pair(tmp_path, "other")
    assert signature.find_fault(root, other) == "model.sig was not made with this key"


def test_a_signature_that_fills_the_memory_is_refused(root: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    signature.sign(root, private, "star")
    with (root / manifest.SIGNATURE).open("r+b") as file:
        file.truncate(1 << 40)
    assert "larger than" in signature.find_fault(root, public)


def test_keys_that_cannot_be_used_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = key_pair(tmp_path)
    locked, _ = key_pair(tmp_path, "locked", b"secret")
    (tmp_path / "text").write_text("text")
    for check, key in (
        (signature.check_private_key, tmp_path / "none"),
        (signature.check_private_key, tmp_path / "text"),
        (signature.check_private_key, public),
        (signature.check_private_key, locked),
        (signature.check_public_key, tmp_path / "none"),
        (signature.check_public_key, private),
    ):
        with pytest.raises(ErasecError) as caught:
            check(key)
        assert "openssl" in caught.value.fix or "give an elliptic key" in caught.value.fix
    monkeypatch.setenv(signature.PASSWORD, "secret")
    signature.check_private_key(locked)
    signature.check_private_key(private)
