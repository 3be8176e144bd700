"""Priors: the Gram matrix of the text states of many captions, which closed-form passes keep unchanged.

The solver needs nothing of the captions except this d x d matrix, whatever their number. (Methods that ship cached
projections for every layer ship the same information many times.)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint import store
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.inputs import LIBRARIES, code_digest, versions
from erasec.checkpoint.safetensors import file_digest, read_finite
from erasec.checkpoint.sealed import read_sealed, save_sealed
from erasec.checkpoint.staging import check_free, check_place, output
from erasec.closed_form import solver
from erasec.documents import read_captions
from erasec.errors import ErasecError, suggestion
from erasec.progress import bar
from erasec.recipe import everyday

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.view import Model

BATCH = 64
SUFFIX = ".prior.safetensors"


def build(model: Model, texts: Sequence[str], stream: str) -> Tensor:
    """The mean Gram matrix (d, d) of all text states of the captions in one stream, float64. Batches are encoded one at
    a time, and their states are not kept."""
    total, count = None, 0
    with bar(f"prior {stream}", len(texts)) as advance:
        for batch in _batches(texts):
            rows = model.encode(batch, stream).states.flatten(0, 1)
            part = solver.gram(rows)
            total, count = part if total is None else total + part, count + len(rows)
            advance(len(batch))
    assert total is not None
    mean: Tensor = total / count
    return mean


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), BATCH):
        yield texts[start : start + BATCH]


def write(path: Path, model: Model, file: Path) -> list[str]:
    """Build the prior of a file of captions, or of the bundled ones ("everyday"), for a model's text encoders and save
    it. Returns the captions.

    Raises ErasecError where ``path`` exists or cannot be written; this is checked before any caption is encoded.
    """
    path = path.expanduser()
    check_place(path)
    if path.exists():
        raise ErasecError(f"{path} exists", fix="give a path that does not exist yet: --out FILE")
    check_free(path)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ErasecError(
            f"the prior {path} cannot be written",
            fix="give a file in an existing folder: --out FILE",
            why=f"{path.parent} {'may not be written' if path.parent.is_dir() else 'is no folder'}",
        )
    bundled = str(file) == everyday.NAME
    texts = list(everyday.captions()) if bundled else read_captions(file)
    metadata = {
        "erasec.prior": "1",
        "family": model.family.name,
        "encoders": _encoders(model),
        "captions": str(len(texts)),
        "captions.sha256": file_digest(everyday.FILE if bundled else file),
    }
    with output(path, fresh=True) as own:
        save_sealed(own.stage, {stream: build(model, texts, stream) for stream in model.streams}, metadata)
        model.check_unchanged()
        own.publish()
    return texts


def read(name: str, model: Model, stream: str) -> Tensor:
    """Rows (r, d) whose Gram matrix is that of the prior file ``name``, for one stream of a model.

    "everyday" is built here, of the bundled captions, and stored for later builds of models with these text encoders.

    Raises ErasecError where the file is no prior, or was built with other text encoders.
    """
    if name == everyday.NAME:
        return solver.gram_root(_everyday(model, stream))
    path = Path(name).expanduser()
    if not path.is_file():
        raise ErasecError(f"there is no prior {name}", fix=f"erasec prior {model.name} CAPTIONS.txt --out {name}")
    entries, metadata = read_sealed(path, "erasec.prior")
    if "erasec.prior" not in metadata:
        raise ErasecError(
            f"{path.name} is no prior",
            why="its metadata has no entry erasec.prior",
            where=str(path),
            fix=f"erasec prior {model.name} CAPTIONS.txt --out coco{SUFFIX}",
        )
    if metadata.get("encoders") != _encoders(model):
        raise ErasecError(
            f"the prior {path.name} was built with other text encoders, or with the same ones stored in another way",
            why=f"its family is {metadata.get('family', 'not given')}",
            where=str(path),
            fix=f"build it again: erasec prior {model.name} CAPTIONS.txt --out {path.name}",
        )
    if stream not in entries:
        raise ErasecError(
            f"the prior {path.name} has no stream {stream!r}", why=suggestion(stream, entries), where=str(path)
        )
    width = model.streams[stream][0].shape[1]
    if entries[stream].shape != (width, width):
        raise ErasecError(
            f"the prior {path.name} is damaged",
            why=f"its matrix of {stream} is {entries[stream].shape}, and the text states are {width} wide",
            where=str(path),
            fix=f"build it again: erasec prior {model.name} CAPTIONS.txt --out {path.name}",
        )
    return solver.gram_root(read_finite(entries, stream))


def _everyday(model: Model, stream: str) -> Tensor:
    """``build`` of the bundled captions, or what an earlier command stored of it."""
    import numpy as np
    import torch

    edited = any(site.component in model.family.text_encoders for site in model.edited_sites)
    width = model.streams[stream][0].shape[1]
    key = "" if edited else _everyday_key(model, stream)
    stored = store.read_entry("priors", key) if key else None
    if stored is not None:
        return torch.from_numpy(np.frombuffer(stored, np.float64).reshape(width, width).copy())
    gram = build(model, everyday.captions(), stream)
    if key:
        store.write_entry("priors", key, gram.numpy().tobytes())
    return gram


def _everyday_key(model: Model, stream: str) -> str:
    """A digest of everything that decides the states of the bundled captions."""
    folder = Folder(model.source.root)
    files = [name for name in folder.files() if name.parts[0].startswith("tokenizer") or name.name == "config.json"]
    facts = [
        stream,
        [model.component_digest(name) for name in model.family.text_encoders],
        {name.as_posix(): file_digest(folder.root / name) for name in files},
        everyday.captions(),
        code_digest(),
        versions(LIBRARIES),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _encoders(model: Model) -> str:
    """The digests of the model's text encoders, by which a prior is known to belong to it."""
    return " ".join(model.component_digest(name)[:16] for name in model.family.text_encoders)
