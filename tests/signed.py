"""Keys for tests of signatures. Tests that sign need the extra ``sign``: ``needs_signing`` skips them without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from erasec.checkpoint.signature import MODULES

needs_signing = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in MODULES),
    reason='model-signing is not installed: pip install "erasec[sign]"',
)


def key_pair(folder: Path, name: str = "key", password: bytes = b"") -> tuple[Path, Path]:
    """A new private key and its public key, as PEM files."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    secret = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, secret))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public
