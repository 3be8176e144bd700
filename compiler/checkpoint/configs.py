"""The configs of a diffusers folder: model_index.json, and the config of each component.

Fields that erasec uses are checked when a file is read. Networks are made from configs inside ``described_by``, because
the libraries raise exceptions of many classes for a config that they cannot use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from erasec.documents import Source, parse_json, read_text
from erasec.errors import ErasecError, reason, shown

INDEX = "model_index.json"
# The libraries that a model_index.json may name. diffusers imports the module that it names, whichever it is.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")

Size = Annotated[int, Field(ge=1, le=2**20)]
Layers = Annotated[int, Field(ge=0, le=1000)]  # more would take hours to make
PerBlock = Annotated[list[Layers | list[Layers]], Field(max_length=16)]


@with_config(ConfigDict(extra="allow", allow_inf_nan=False))
class Fields(TypedDict, total=False):
    """The fields that erasec uses, of all components. Other fields may be there, with any value."""

    _class_name: str
    architectures: Annotated[list[str], Field(min_length=1)] | None
    block_out_channels: Annotated[list[Size], Field(min_length=1, max_length=16)]
    cross_attention_dim: Size | None
    in_channels: Size
    out_channels: Size | None
    latent_channels: Size
    sample_size: Size | Annotated[list[Size], Field(min_length=2, max_length=2)] | None
    scaling_factor: Annotated[float, Field(gt=0)]
    shift_factor: float | None
    upcast_attention: bool | None
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    max_position_embeddings: Size
    num_hidden_layers: Layers
    num_layers: Layers
    num_single_layers: Layers
    layers_per_block: Layers | PerBlock
    transformer_layers_per_block: Layers | PerBlock | None
    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)]
    prediction_type: str
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: list[float] | None


class Config(dict[str, Any]):
    """The content of a config. A key that is missing or null is an ErasecError that names the file."""

    def __init__(self, content: dict[str, Any], source: Source) -> None:
        super().__init__(content)
        self.source = source

    def __getitem__(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise self.source.error(f"its {key!r} is null" if key in self else f"it has no {key!r}")
        return value


def read_config(root: Path, component: str, name: str = "config.json") -> Config:
    """The config of a component, with its fields checked. Raises ErasecError."""
    path = root / component / name
    source = Source(f"{component}/{name}", str(path))
    content: Any = parse_json(read_text(path), Fields, source)
    return Config(content, source)


def read_index(root: Path) -> Config:
    """model_index.json: the library and the class of each component, and options of the pipeline. Raises ErasecError.

    A component is a list of two names; both are None where it is left out.
    """
    path = root / INDEX
    source = Source(INDEX, str(path))
    content = parse_json(read_text(path), dict[str, Any], source)
    for name, value in content.items():
        if not isinstance(value, list):
            continue
        if len(value) != 2 or not all(part is None or isinstance(part, str) for part in value):
            raise source.error(f"{name} is {shown(value)}, and not the names of a library and a class")
        if not re.fullmatch(r"\w+", name):
            raise source.error(f"{shown(name)} is no name of a component")
        if value[0] is not None and value[0].split(".")[0] not in LIBRARIES:
            raise source.error(
                f"{name} is of the module {shown(value[0])}; only {' and '.join(LIBRARIES[:2])} are loaded, because a "
                "model must not choose the code that runs"
            )
    return Config(content, source)


@contextmanager
def described_by(component: str, root: Path) -> Iterator[None]:
    """Where a library makes ``component`` from its files in ``root``: its exceptions become ErasecError."""
    try:
        yield
    except (ErasecError, MemoryError):
        raise
    except Exception as error:  # each library raises its own classes
        raise ErasecError(
            f"{component} cannot be made from its files",
            why=reason(error),
            where=str(root / component if (root / component).is_dir() else root),
            fix="fetch the model again; its config may be damaged, or belong to another model or a newer library",
        ) from error
