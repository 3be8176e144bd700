"""The cache of pictures of base models: the second concept that is erased from a model paints only its own.

Each picture is one file in the folder "pictures" of the cache: the sha256 of a PNG, and the PNG.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from erasec.checkpoint.folder import EXTRAS_FILE, Folder
from erasec.checkpoint.inputs import LIBRARIES, code_digest, versions
from erasec.checkpoint.safetensors import file_digest
from erasec.checkpoint.store import read_entry, write_entry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erasec.attention.sampling import Sampling
    from erasec.base import Question
    from erasec.model.view import Model

FOLDER = "pictures"
SETTINGS = (".json", ".txt", ".model")  # suffixes of configs, tokenizers and the scheduler's settings


def identity(model: Model) -> str:
    """A digest of all that decides the pictures of an unedited model, other than prompt, seed and sampling: weights,
    configs, tokenizers, scheduler, what the folder carries besides weights, erasec's code, and the versions of the
    libraries."""
    folder = Folder(model.source.root)
    files = [name for name in folder.files() if name.suffix in SETTINGS or name.name == EXTRAS_FILE]
    facts = {
        "weights": model.digest,
        "files": {name.as_posix(): file_digest(folder.root / name) for name in files},
        "code": code_digest(),
        "libraries": versions(LIBRARIES),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def key(identity: str, question: Question, sampling: Sampling) -> str:
    """The name of the picture of a question in the cache."""
    facts = [identity, question.prompt, question.seed, asdict(sampling) | {"device": sampling.device.partition(":")[0]}]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load(name: str) -> NDArray[np.uint8] | None:
    """The picture ``name``, (height, width, 3); None where it is not there, or its bytes have changed."""
    from PIL import Image

    content = read_entry(FOLDER, name)
    return None if content is None else np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def store(name: str, picture: NDArray[np.uint8]) -> None:
    """Write a picture into the cache."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    write_entry(FOLDER, name, data.getvalue())
