"""Names of passes, targets, judges, probes and runtimes: one table each, and one group of entry points each.

Other packages register classes in the entry-point groups erasec.passes, erasec.targets, erasec.judges, erasec.probes
and erasec.runtimes. ``file.py:Class`` names a class in a local file. Listing names imports nothing; only loading a
class imports its module.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from erasec import base
from erasec.errors import ErasecError, suggestion
from erasec.options import check_class
from erasec.recipe.recipe import code_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from erasec.base import Judge, Output, Pass, Probe, Runtime
    from erasec.model.view import Model

T = TypeVar("T")

PASSES = {
    "cure": "erasec.passes.cure:Cure",
    "double_projection": "erasec.passes.double_projection:DoubleProjection",
    "eiup": "erasec.passes.eiup:Eiup",
    "esd": "erasec.passes.esd:Esd",
    "few_shot": "erasec.passes.few_shot:FewShot",
    "geom_erasing": "erasec.passes.geom_erasing:GeomErasing",
    "harden": "erasec.passes.harden:Harden",
    "kpop": "erasec.passes.kpop:Kpop",
    "mace": "erasec.passes.mace:Mace",
    "project": "erasec.passes.project:Project",
    "rece": "erasec.passes.rece:Rece",
    "safegen": "erasec.passes.safegen:SafeGen",
    "speed": "erasec.passes.speed:Speed",
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
JUDGES = {
    "classifier": "erasec.judges.classifier:Classifier",
    "clip": "erasec.judges.clip:Clip",
    "emoji": "erasec.emoji.judge:EmojiJudge",
    "glyphs": "erasec.glyphs.judge:GlyphJudge",
    "nudenet": "erasec.judges.nudenet:NudeNet",
}
PROBES = {
    "completion": "erasec.audit.latents:Completion",
    "concept_vector": "erasec.audit.ring_a_bell:ConceptVector",
    "finetune": "erasec.audit.relearn:Finetune",
    "free_states": "erasec.audit.inversion:FreeStates",
    "inpainting": "erasec.audit.latents:Inpainting",
    "inversion": "erasec.audit.inversion:Inversion",
    "latent_guidance": "erasec.audit.latent_guidance:LatentGuidance",
    "lora": "erasec.audit.relearn:Lora",
    "merge": "erasec.audit.relearn:Merge",
    "mma": "erasec.audit.mma:MMA",
    "noised": "erasec.audit.latents:Noised",
    "null_text": "erasec.audit.null_text:NullText",
    "p4d": "erasec.audit.p4d:P4D",
    "precision": "erasec.audit.changed:Precision",
    "prefix": "erasec.audit.prefix:Prefix",
    "prompts": "erasec.audit.prompts:Prompts",
    "relearn": "erasec.audit.relearn:Relearn",
    "ring_a_bell": "erasec.audit.ring_a_bell:RingABell",
    "seeds": "erasec.audit.prompts:Seeds",
    "settings": "erasec.audit.prompts:Settings",
    "strength": "erasec.audit.changed:Strength",
    "text_encoder": "erasec.audit.changed:TextEncoder",
    "tracing": "erasec.audit.tracing:Tracing",
    "trajectory_noise": "erasec.audit.trajectory_noise:TrajectoryNoise",
    "undo": "erasec.audit.undo:Undo",
    "unlearn_diff": "erasec.audit.unlearn_diff:UnlearnDiff",
}
# `--backend auto` takes the first runtime that can run a folder, in this order.
RUNTIMES = {
    "ort": "erasec.runtime.backends:OnnxRuntime",
    "openvino": "erasec.runtime.backends:OpenVino",
    "trt-rtx": "erasec.runtime.backends:TensorRtRtx",
    "trt": "erasec.runtime.backends:TensorRt",
    "torch": "erasec.runtime.backends:Torch",
}
# The pass of a build that names no pass, by the kind of its concepts; "" is a concept without a kind.
DEFAULTS = {"": "uce", "mark": "geom_erasing", "object": "uce", "person": "uce", "safety": "trce", "style": "uce"}

# The passes of ``--robust``: what algebra cannot undo, and then training against searches.
ROBUST_PASSES = ("project", "harden")


class Kind(NamedTuple):
    """One kind of class that users choose by name.

    ``label`` is its name in errors, ``group`` its entry-point group, and ``attributes`` the class attributes that it
    must have. Names are listed in alphabetical order, or in that of ``table`` if the kind is ``ordered``.
    """

    label: str
    table: Mapping[str, str]
    group: str
    attributes: tuple[str, ...]
    ordered: bool = False


PASS = Kind("pass", PASSES, "erasec.passes", ("name", "paper", "summary"))
TARGET = Kind("target", TARGETS, "erasec.targets", ("name", "summary"))
JUDGE = Kind("judge", JUDGES, "erasec.judges", ("name", "summary"))
PROBE = Kind("probe", PROBES, "erasec.probes", ("name", "summary", "threat"))
RUNTIME = Kind("runtime", RUNTIMES, "erasec.runtimes", ("name", "summary", "folders"), ordered=True)


def passes() -> dict[str, str]:
    """Every registered pass as "module:Class" by name. Raises ErasecError if two packages use one name."""
    return _registered(PASS)


def targets() -> dict[str, str]:
    """Every registered target as "module:Class" by name. Raises ErasecError if two packages use one name."""
    return _registered(TARGET)


def judges() -> dict[str, str]:
    """Every registered judge as "module:Class" by name. Raises ErasecError if two packages use one name."""
    return _registered(JUDGE)


def probes() -> dict[str, str]:
    """Every registered probe as "module:Class" by name. Raises ErasecError if two packages use one name."""
    return _registered(PROBE)


def runtimes() -> dict[str, str]:
    """Every registered runtime as "module:Class" by name. Raises ErasecError if two packages use one name."""
    return _registered(RUNTIME)


def distributions() -> dict[str, str]:
    """The version of each package that registers a class, by the name of its distribution."""
    kinds = (PASS, TARGET, JUDGE, PROBE, RUNTIME)
    providers = [point.dist for kind in kinds for point in entry_points(group=kind.group)]
    return {each.name: each.version for each in providers if each is not None}


def load_pass(name: str) -> type[Pass]:
    """The class of a pass by its registered name, or from a file by "file.py:Class". Raises ErasecError."""
    return _load(PASS, name, base.Pass)  # type: ignore[type-abstract]


def load_target(name: str) -> type[Output]:
    """The class of a target by its registered name, or from a file by "file.py:Class". Raises ErasecError."""
    return _load(TARGET, name, base.Output)


def load_judge(name: str) -> type[Judge]:
    """The class of a judge by its registered name, or from a file by "file.py:Class". Raises ErasecError."""
    return _load(JUDGE, name, base.Judge)  # type: ignore[type-abstract]


def load_probe(name: str) -> type[Probe]:
    """The class of a probe by its registered name, or from a file by "file.py:Class". Raises ErasecError."""
    return _load(PROBE, name, base.Probe)  # type: ignore[type-abstract]


def load_runtime(name: str) -> type[Runtime]:
    """The class of a runtime by its registered name, or from a file by "file.py:Class". Raises ErasecError."""
    return _load(RUNTIME, name, base.Runtime)  # type: ignore[type-abstract]


def judge_for(model: Model, name: str = "", tuning: bool = False) -> Judge | None:
    """The judge for pictures of ``model``: the one called ``name``, by default the first registered one that can judge
    them. None if there is no such judge.

    With ``tuning``, a judge for passes that need one while they train; it never decides a check (see
    ``Judge.for_model``). Raises ErasecError if the judge ``name`` cannot judge the model.
    """
    for candidate in [name] if name else judges():
        if (judge := load_judge(candidate).for_model(model, tuning)) is not None:
            return judge
    if name and not tuning:
        raise ErasecError(
            f"the judge {name} cannot judge pictures of {model.name}",
            why="it is for other models",
            fix="leave out --judge, or name a judge of this model: erasec list judges",
        )
    return None


def _registered(kind: Kind) -> dict[str, str]:
    classes = dict(kind.table)
    for point in entry_points(group=kind.group):
        if classes.get(point.name, point.value) != point.value:
            raise ErasecError(
                f"two {kind.group.removeprefix('erasec.')} are named {point.name!r}",
                why=f"{classes[point.name]} and {point.value}",
                fix="uninstall one of the two packages, or rename its entry point",
            )
        classes[point.name] = point.value
    return classes if kind.ordered else dict(sorted(classes.items()))


def _load(kind: Kind, name: str, parent: type[T]) -> type[T]:
    table = _registered(kind)
    class_name = name.rpartition(":")[2]
    if (file := code_file(name)) is not None:
        module = _module_from_file(file)
    elif name in table:
        path, _, class_name = table[name].partition(":")
        try:
            module = importlib.import_module(path)
        except Exception as error:  # another package's code may raise anything while it is imported
            raise ErasecError(
                f"the {kind.label} {name!r} cannot be imported", why=f"{type(error).__name__}: {error}", where=path
            ) from error
    else:
        raise ErasecError(
            f"there is no {kind.label} {name!r}",
            why=suggestion(name, table),
            fix=f"give a registered name, or file.py:Class for a {kind.label} of your own",
        )
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, parent)):
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, parent)]
        own = [key for key in classes if vars(module)[key].__module__ == module.__name__]
        raise ErasecError(
            f"{class_name!r} is no {parent.__name__}",
            why=suggestion(class_name, own) if own else f"the module has no subclass of erasec.base.{parent.__name__}",
            where=str(module.__file__),
        )
    check_class(cls, kind.attributes, kind.label)
    return cls


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ErasecError(f"there is no file {path}")
    name = f"erasec_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # always so for a name that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the decorators of dataclasses look up the module while they run
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ErasecError(
            f"{path.name} cannot be imported", why=f"{type(error).__name__}: {error}", where=str(path)
        ) from error
    return module
