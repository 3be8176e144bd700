"""The cache of pictures of base models: the second concept that is erased from a model paints only its own.

Each picture is one file in the folder "pictures" of the cache: the sha256 of a PNG, and the PNG.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from erasec.checkpoint.folder import EXTRAS_FILE, Folder
from erasec.checkpoint.owned import scratch_folder
from erasec.checkpoint.safetensors import file_digest
from erasec.graphs.cache import cache_folder, unusable_is_noted

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from erasec.attention.sampling import Sampling
    from erasec.base import Question
    from erasec.model.view import Model

FOLDER = "pictures"
DIGEST = 32  # bytes of a sha256
SETTINGS = (".json", ".txt", ".model")  # suffixes of configs, tokenizers and the scheduler's settings


def identity(model: Model) -> str:
    """A digest of all that decides the pictures of an unedited model, other than prompt, seed and sampling: weights,
    configs, tokenizers, scheduler, what the folder carries besides weights, and the versions of the libraries."""
    folder = Folder(model.source.root)
    files = [name for name in folder.files() if name.suffix in SETTINGS or name.name == EXTRAS_FILE]
    facts = {
        "weights": model.digest,
        "files": {name.as_posix(): file_digest(folder.root / name) for name in files},
        "libraries": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def key(identity: str, question: Question, sampling: Sampling) -> str:
    """The name of the picture of a question in the cache."""
    facts = [identity, question.prompt, question.seed, asdict(sampling) | {"device": sampling.device.partition(":")[0]}]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load(name: str) -> NDArray[np.uint8] | None:
    """The picture ``name``, (height, width, 3); None where it is not there, or its bytes have changed."""
    from PIL import Image

    with unusable_is_noted():
        path = _path(name)
        content = path.read_bytes() if path.is_file() else b""
        if content and content[:DIGEST] == hashlib.sha256(content[DIGEST:]).digest():
            return np.asarray(Image.open(io.BytesIO(content[DIGEST:])).convert("RGB"))
    return None


def store(name: str, picture: NDArray[np.uint8]) -> None:
    """Write a picture into the cache, whole or not at all. A cache that cannot be written is a note."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    content = data.getvalue()
    with unusable_is_noted():
        path = _path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(path.parent) as scratch:
            (scratch / "picture").write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(scratch / "picture", path)


def _path(name: str) -> Path:
    return cache_folder() / FOLDER / name
