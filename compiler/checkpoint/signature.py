"""The OpenSSF model signature of a folder, in ``model.sig``: made and verified by the library model-signing.

It signs the sha256 of every file in the folder, the manifest among them, so it is written last. Only elliptic keys in
PEM files are used, which need no network. A client of model-signing that knows nothing of erasec verifies it too.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from erasec.checkpoint.manifest import SIGNATURE
from erasec.documents import read_text
from erasec.errors import ErasecError, reason, require_modules, shown

MODULES = ("model_signing", "OpenSSL")  # model-signing 1.1 needs pyopenssl, and does not say so
PASSWORD = "ERASEC_SIGN_PASSWORD"  # of an encrypted key
CURVES = "an elliptic key on the curve P-256, P-384 or P-521, in PEM"
# What model-signing says of the first file that is not as it was signed.
DIFFERENCES = {
    r"Hash mismatch for '(.+?)': Expected": "is not the file that was signed",
    r"Missing files in model '.*?': ([^,\"]+)": "was signed and is not there",
    r"Extra files found in model '.*?': ([^,\"]+)": "was not signed",
}


def require_library(what: str) -> None:
    """Raise MissingTool where model-signing is not installed. ``what`` is what needs it."""
    require_modules(what, MODULES, "sign")


def check_private_key(key: Path) -> None:
    """Raise ErasecError where ``key`` cannot sign, and MissingTool where the library is missing."""
    require_library("--sign")
    _signer(key)


def sign(root: Path, key: Path, name: str) -> None:
    """Write the signature of all that is below ``root``, which the signature calls ``name``. Raises ErasecError."""
    require_library("--sign")
    from model_signing import hashing

    hashes: Any = hashing.Config
    signer = _signer(key).set_hashing_config(hashes().set_ignored_paths(paths=[SIGNATURE]))
    # The library takes the name from the folder, and refuses links.
    with tempfile.TemporaryDirectory(dir=root.parent) as parent:
        named = Path(parent) / name
        os.rename(root, named)
        try:
            signer.sign(named, named / SIGNATURE)
        finally:
            os.rename(named, root)


def _signer(key: Path) -> Any:
    from model_signing import signing

    config: Any = signing.Config  # which has no types
    _check_file(key, "the private key")
    # A password for a key without one would be an error.
    password = os.environ.get(PASSWORD, "").encode() if b"ENCRYPTED" in key.read_bytes() else b""
    try:
        return config().use_elliptic_key_signer(private_key=key, password=password or None)
    except Exception as error:  # of any library below: a wrong password, another kind of key, no key
        fix = f"give {CURVES}: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        fix += f"; the password of an encrypted key is read from ${PASSWORD}"
        raise ErasecError("the private key cannot be used", why=reason(error), where=str(key), fix=fix) from error


def _check_file(key: Path, what: str) -> None:
    if not key.is_file():
        raise ErasecError(f"there is no file {key}", why=f"{what} is read from it", fix=f"give {CURVES}")


def check_public_key(key: Path) -> None:
    """Raise ErasecError where ``key`` cannot verify, and MissingTool where the library is missing."""
    require_library("--key")
    _verifier(key)


def _verifier(key: Path) -> Any:
    from model_signing import verifying

    config: Any = verifying.Config
    _check_file(key, "the public key")
    try:
        return config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        fix = f"give {CURVES}: openssl ec -in key.pem -pubout -out key.pub"
        raise ErasecError("the public key cannot be used", why=reason(error), where=str(key), fix=fix) from error


def find_fault(root: Path, key: Path) -> str:
    """What is wrong with the signature of ``root``, as a sentence; "" where ``key``, a public key, verifies it.

    Every byte of the signature counts, also those that the library does not look at. Raises ErasecError for a key that
    cannot be used, and MissingTool where the library is missing.
    """
    require_library("--key")
    from model_signing._signing.sign_sigstore_pb import Signature

    config = _verifier(key)
    file = root / SIGNATURE
    try:
        signed = read_text(file)  # with a limit, which the library has not
    except ErasecError as error:
        return f"{error.what}: {error.why}"
    try:
        # The library prints a warning about signatures without the digest of their key.
        with redirect_stdout(io.StringIO()):
            written = Signature.read(file).bundle.to_json()
            config.verify(root, file)
    except Exception as error:  # there is no class of errors for signatures
        return _sentence(error)
    if written != signed:
        return f"{SIGNATURE} was changed after it was written, or another version of model-signing wrote it"
    return ""


def _sentence(error: Exception) -> str:
    text = str(error).replace("\\'", "'")
    for pattern, what in DIFFERENCES.items():
        if match := re.search(pattern, text):
            return f"{match[1]} {what}: {SIGNATURE} is for another file, or none"
    if text.startswith("Key mismatch"):
        return f"{SIGNATURE} was not made with this key"
    if type(error).__name__ == "InvalidSignature":
        return f"{SIGNATURE} was not made with this key, or was changed"
    return f"{SIGNATURE} is damaged: {shown(reason(error))}"
