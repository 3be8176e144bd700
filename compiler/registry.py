"""Names of passes and targets: two tables, what other packages register, and ``file.py:Class`` for a local file.

Nothing is imported until it is loaded. Packages register in the entry point groups erasec.passes and erasec.targets.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from erasec.errors import ErasecError, nearest

if TYPE_CHECKING:
    from erasec.base import Output, Pass

T = TypeVar("T")

PASSES = {
    "eiup": "erasec.passes.eiup:Eiup",
    "esd": "erasec.passes.esd:Esd",
    "few_shot": "erasec.passes.few_shot:FewShot",
    "geom_erasing": "erasec.passes.geom_erasing:GeomErasing",
    "kpop": "erasec.passes.kpop:Kpop",
    "mace": "erasec.passes.mace:Mace",
    "rece": "erasec.passes.rece:Rece",
    "safegen": "erasec.passes.safegen:SafeGen",
    "trce": "erasec.passes.trce:Trce",
    "trce.remap": "erasec.passes.trce:Remap",
    "trce.steer": "erasec.passes.trce:Steer",
    "uce": "erasec.passes.uce:Uce",
}
TARGETS = {
    "bundle": "erasec.targets.bundle:Bundle",
    "edit": "erasec.targets.edit_file:EditFile",
    "hf": "erasec.targets.hf:Hf",
    "ldm": "erasec.targets.ldm:Ldm",
    "lora": "erasec.targets.lora:Lora",
    "onnx": "erasec.targets.ort:Onnx",
    "openvino": "erasec.targets.ov:OpenVino",
    "triton": "erasec.targets.triton:Triton",
    "trt": "erasec.targets.trt:Trt",
    "trt-rtx": "erasec.targets.trt_rtx:TrtRtx",
}
# The pass of a build that names none, by the kind of what it erases; "" is a concept that names no kind.
DEFAULTS = {"": "uce", "mark": "geom_erasing", "object": "uce", "person": "uce", "safety": "trce", "style": "uce"}


def passes() -> dict[str, str]:
    """Every registered pass as "module:Class" by name. Raises ErasecError where two claim one name."""
    return _named("erasec.passes", PASSES)


def targets() -> dict[str, str]:
    """Every registered target as "module:Class" by name. Raises ErasecError where two claim one name."""
    return _named("erasec.targets", TARGETS)


def load_pass(name: str) -> type[Pass]:
    """The class of a pass by its registered name, or from a file by "file.py:Class". Raises ErasecError."""
    from erasec.base import Pass

    return _load("pass", name, passes(), Pass)  # type: ignore[type-abstract]


def load_target(name: str) -> type[Output]:
    """The class of a target by its registered name, or from a file by "file.py:Class". Raises ErasecError."""
    from erasec.base import Output

    return _load("target", name, targets(), Output)


def _named(group: str, table: Mapping[str, str]) -> dict[str, str]:
    found = dict(table)
    for point in entry_points(group=group):
        if found.get(point.name, point.value) != point.value:
            raise ErasecError(
                f"two {group.removeprefix('erasec.')} are named {point.name!r}",
                why=f"{found[point.name]} and {point.value}",
                fix="uninstall one of the two packages, or rename its entry point",
            )
        found[point.name] = point.value
    return dict(sorted(found.items()))


def _load(label: str, name: str, table: Mapping[str, str], kind: type[T]) -> type[T]:
    file, _, class_name = name.rpartition(":")
    if file.endswith(".py"):
        module = _module_from_file(Path(file).expanduser())
    elif name in table:
        path, _, class_name = table[name].partition(":")
        try:
            module = importlib.import_module(path)
        except Exception as error:  # another package's code may raise anything while it is imported
            raise ErasecError(
                f"the {label} {name!r} cannot be imported", why=f"{type(error).__name__}: {error}", where=path
            ) from error
    else:
        raise ErasecError(
            f"there is no {label} {name!r}", why=nearest(name, table),
            fix=f"give a registered name, or file.py:Class for a {label} of your own",
        )  # fmt: skip
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, kind)]
        own = [key for key in classes if vars(module)[key].__module__ == module.__name__]
        raise ErasecError(
            f"{class_name!r} is no {kind.__name__}",
            why=nearest(class_name, own) if own else f"the module has no subclass of erasec.base.{kind.__name__}",
            where=str(module.__file__),
        )
    return found


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ErasecError(f"there is no file {path}")
    name = f"erasec_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # always so for a name that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while the class is made
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ErasecError(
            f"{path.name} cannot be imported", why=f"{type(error).__name__}: {error}", where=str(path)
        ) from error
    return module
