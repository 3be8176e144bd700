"""Engines of TensorRT and TensorRT-RTX: built from ONNX files through Polygraphy, recorded, checked and run.

A folder of engines has one file model.engine for each component, and engine.json, which records what each engine was
built from, by which library, and for which GPUs. An engine runs with one version of the library and on some GPUs only,
and loading any other ends in a crash or an obscure message. So engine.json is compared with the machine first.

Every engine is built in a process of its own, for two reasons: the libraries occupy gigabytes until their process ends;
and Polygraphy works with one of the two libraries in a process, by an environment variable that it reads on import.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, StringConstraints, with_config
from typing_extensions import TypedDict

from erasec.checkpoint.folder import inside
from erasec.checkpoint.safetensors import atomic_write, file_digest
from erasec.documents import Count
from erasec.errors import ErasecError, MissingTool, require_modules
from erasec.graphs.manifest import read_record as read_schema
from erasec.graphs.weights import digests
from erasec.tensorrt import devices

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

SCHEMA = "erasec.engines/1"
RECORD, ENGINE = "engine.json", "model.engine"
RTX, TRT = "tensorrt_rtx", "tensorrt"
TARGETS = {RTX: "trt-rtx", TRT: "trt"}
TITLES = {RTX: "TensorRT-RTX", TRT: "TensorRT"}
SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
# Compute capabilities that TensorRT-RTX builds for, without the dot. By default it builds for 8.0 and later. 7.5 is
# left out: there it multiplies no float32 matrices, and a text encoder has some in float16 as well.
CAPABILITIES = ("80", "86", "89", "120", "121")
OLDEST = 80

Shape = tuple[int, ...]
Profile = Mapping[str, Sequence[Shape]]  # by input: the smallest, the usual and the largest shape


@dataclass(frozen=True)
class Builder:
    """A library, by the name of its Python module, and the settings with which it builds engines.

    ``capabilities`` are GPUs to build for, of ``CAPABILITIES`` (TensorRT-RTX only). ``workspace`` is in MiB, 0 for the
    library's own limit. ``timing_cache`` is a file in which the times of kernels are stored for the next build
    (TensorRT only).
    """

    library: str
    capabilities: tuple[str, ...] = ()
    workspace: int = 0
    refit: bool = False
    timing_cache: str = ""


def build_engine(graph: Path, engine: Path, profile: Profile, builder: Builder) -> tuple[dict[str, Any], str]:
    """Build ``graph`` into the file ``engine``; returns its entry in engine.json, and the version of the library.

    Raises ErasecError with the library's own message where it cannot.
    """
    start = time.monotonic()
    source = digests(graph)
    engine.parent.mkdir(parents=True, exist_ok=True)
    version_file = engine.with_name(f".{engine.name}.json")
    job = asdict(builder) | {
        "graph": str(graph),
        "engine": str(engine),
        "profile": profile,
        "version_file": str(version_file),
    }
    environment = os.environ | {SWITCH: str(int(builder.library == RTX))}
    # -P: Python does not import modules from the working directory.
    command = [sys.executable, "-P", "-m", "erasec.tensorrt.engines"]
    process = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment)
    if process.returncode:
        raise _build_failure(graph, builder, process)
    library_version: str = json.loads(version_file.read_text())
    version_file.unlink()
    return engine_entry(engine, source, profile, time.monotonic() - start), library_version


def engine_entry(engine: Path, source: tuple[str, str], profile: Profile, seconds: float) -> dict[str, Any]:
    """The entry of an engine in engine.json. ``source`` are the ``digests`` of the ONNX file that it was built from."""
    return {
        "file": f"{engine.parent.name}/{engine.name}",
        "graph": source[0],
        "weights": source[1],
        "engine": file_digest(engine),
        "bytes": engine.stat().st_size,
        "seconds": round(seconds, 1),
        "profile": {name: dict(zip(("min", "opt", "max"), shapes, strict=True)) for name, shapes in profile.items()},
    }


def _build_failure(graph: Path, builder: Builder, process: subprocess.CompletedProcess[str]) -> ErasecError:
    """The error for a build that ended with a status other than 0: the output from the first error line on."""
    lines = [line.strip() for line in (process.stdout + process.stderr).splitlines() if line.strip()]
    first = next((at for at, line in enumerate(lines) if line.startswith(("[E]", "[!]"))), len(lines) - 1)
    message = itertools.takewhile(lambda line: not line.startswith("Traceback"), lines[max(first, 0) :])
    why = " ".join(dict.fromkeys(message))[:1000] or "it printed no message"
    fix = "if the library does not support an operation or a GPU, choose other capabilities or precision=fp32"
    if process.returncode < 0:
        why = f"it was killed by signal {-process.returncode}; 9 usually means out of memory. It printed: {why}"
        fix = "build on a machine with more memory, or for smaller shapes"
    return ErasecError(
        f"{TITLES[builder.library]} could not build {graph.parent.name}", why=why, fix=fix, where=str(graph)
    )


def _build_here(job: Mapping[str, Any]) -> None:
    """Build an engine in this process. ``SWITCH`` must be set before the process starts."""
    library = load_library(job["library"])
    from polygraphy.backend import trt

    profile = trt.Profile()
    for name, shapes in job["profile"].items():
        profile.add(name, *map(tuple, shapes))
    settings: dict[str, Any] = {"profiles": [profile], "refittable": job["refit"]}
    if job["workspace"]:
        settings["memory_pool_limits"] = {library.MemoryPoolType.WORKSPACE: job["workspace"] << 20}
    if job["library"] == RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [(int(name[:-1]), int(name[-1])) for name in job["capabilities"]]
        config = CreateConfigRTX(compute_capabilities=capabilities or None, **settings)
    else:
        config = trt.CreateConfig(load_timing_cache=job["timing_cache"] or None, **settings)
    network = trt.NetworkFromOnnxPath(job["graph"], strongly_typed=True)
    engine = trt.engine_bytes_from_network(network, config, save_timing_cache=job["timing_cache"] or None)
    with atomic_write(Path(job["engine"])) as temporary:
        temporary.write_bytes(memoryview(engine))
    Path(job["version_file"]).write_text(json.dumps(library.__version__))


def load_library(library: str) -> Any:
    """Import ``library``, and make Polygraphy use it.

    Raises MissingTool where one of the two is not installed, ErasecError where Polygraphy already uses another library.
    """
    require_library(library)
    os.environ[SWITCH] = str(int(library == RTX))
    config = importlib.import_module("polygraphy.config")
    if (library == RTX) != config.USE_TENSORRT_RTX:
        raise ErasecError(
            f"this process already uses another library than {TITLES[library]}",
            why="Polygraphy chooses between TensorRT and TensorRT-RTX once, when it is imported",
            fix="start another process",
        )
    logger = importlib.import_module("polygraphy.logger").G_LOGGER
    logger.module_severity = logger.ERROR
    return importlib.import_module(library)


def require_library(library: str) -> None:
    """Raise MissingTool where a module that building and running engines of ``library`` needs is not installed."""
    require_modules(TARGETS[library], ("onnx", "polygraphy", library), TARGETS[library])


def write_record(folder: Path, builder: Builder, library: str, components: Mapping[str, Mapping[str, Any]]) -> None:
    """Write engine.json, whole or not at all.

    ``components`` are the entries of the engines by name; ``library`` is the version of the library that built them.
    """
    record = {
        "schema": SCHEMA,
        "erasec": installed("erasec"),
        "refit": builder.refit,
        "workspace": builder.workspace,
        "builder": {"name": builder.library, "version": library, "polygraphy": installed("polygraphy")},
        # TensorRT builds for the GPU that it runs on.
        "capabilities": list(builder.capabilities)
        or [capability for _, capability in devices.gpus()[:1] if builder.library == TRT],
        "components": components,
    }
    rewrite_record(folder, record)


def rewrite_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a changed record, as ``read_record`` returned it, to engine.json."""
    with atomic_write(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


class _Shapes(TypedDict):
    min: list[Count]
    opt: list[Count]
    max: list[Count]


@with_config(ConfigDict(extra="allow"))
class _Engine(TypedDict):
    file: str
    engine: str
    graph: str
    weights: str
    profile: dict[str, _Shapes]


@with_config(ConfigDict(extra="allow"))
class _Builder(TypedDict):
    name: Literal["tensorrt_rtx", "tensorrt"]  # the keys of TARGETS
    version: str


@with_config(ConfigDict(extra="allow"))
class _Record(TypedDict):
    builder: _Builder
    capabilities: list[Annotated[str, StringConstraints(pattern=r"^\d{2,3}$")]]
    components: dict[str, _Engine]


def read_record(folder: Path) -> dict[str, Any]:
    """engine.json of a folder. Raises ErasecError where it is missing, damaged or of another schema."""
    fix = "erasec build MODEL --erase CONCEPT --target trt-rtx   writes one"
    record: Any = read_schema(folder / RECORD, SCHEMA, _Record, "folder of engines", fix)
    return dict(record)


def engine_file(folder: Path, entry: Mapping[str, Any]) -> Path:
    """The file of an engine, by its entry in engine.json. Raises ErasecError where it leaves the folder."""
    return inside(folder, entry["file"])


def check_runs_here(folder: Path, names: Sequence[str] = ()) -> None:
    """Compare engine.json with the engines and with this machine. ``names`` are components, by default all.

    No engine is deserialised. Raises ErasecError where an engine is not the file that was built, or was built for
    another GPU or version of the library; MissingTool where the library or a GPU is missing. One error lists every
    difference between the engines and this machine.
    """
    record = read_record(folder)
    components = record["components"]
    if unknown := sorted(set(names) - set(components)):
        raise ErasecError(
            f"{folder} has no engine of {unknown[0]}",
            why=f"it has {', '.join(sorted(components))}",
            fix="build the folder with this component",
        )
    for name in names or components:
        file = engine_file(folder, components[name])
        if not file.is_file() or file_digest(file) != components[name]["engine"]:
            raise ErasecError(
                f"{components[name]['file']} is not the engine that was built",
                why=f"its sha256 is not the one in {RECORD}" if file.is_file() else "the file is missing",
                fix="fetch or build the folder again",
                where=str(folder),
            )
    library, built_with = record["builder"]["name"], record["builder"]["version"]
    require_library(library)
    here, reasons = version(library), []
    if here != built_with:
        reasons.append(f"they were built with {TITLES[library]} {built_with}, and {here} is installed")
    gpus = devices.gpus()
    if not gpus:
        reasons.append("no NVIDIA GPU answers to nvidia-smi")
    elif not any(_supports(record, capability) for _, capability in gpus):
        listed = ", ".join(f"{name} ({_dotted(capability)})" for name, capability in gpus)
        reasons.append(f"they are for compute capability {_supported(record)}, and this machine has {listed}")
    if reasons:
        error = MissingTool if not gpus else ErasecError
        raise error(
            f"the engines in {folder} do not run on this machine",
            why="; ".join(reasons),
            fix=f"build them here or for this GPU (--target {TARGETS[library]}), or for any machine: --target onnx",
        )


def version(library: str) -> str:
    """The installed version of a library."""
    return str(importlib.import_module(library).__version__)


def _supports(record: Mapping[str, Any], capability: str) -> bool:
    """Whether the engines of a record run on a GPU of this compute capability."""
    return capability in record["capabilities"] if record["capabilities"] else int(capability) >= OLDEST


def _supported(record: Mapping[str, Any]) -> str:
    """The compute capabilities that the engines of a record are for, as a message lists them."""
    return " or ".join(map(_dotted, record["capabilities"])) or f"{_dotted(str(OLDEST))} and later"


def _dotted(capability: str) -> str:
    return f"{capability[:-1]}.{capability[-1]}"


def check_fits(name: str, record: Mapping[str, Any], inputs: Mapping[str, NDArray[Any]]) -> None:
    """Raise ErasecError where the shape of an input is outside the range that the engine ``name`` was built for."""
    for key, shapes in record["components"][name]["profile"].items():
        shape, low, high = inputs[key].shape, shapes["min"], shapes["max"]
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            smallest, given, largest = ("x".join(map(str, sizes)) for sizes in (low, shape, high))
            raise ErasecError(
                f"the engine {name} does not take {key} of {given}",
                why=f"it was built for {smallest} to {largest}",
                fix="choose another size or fewer images, or build it with other batch, height and width",
            )


class Session:
    """One engine on this machine's GPU, until ``close`` or the end of a ``with`` block.

    ``file`` is FOLDER/NAME/model.engine, in a folder with engine.json. Raises what ``check_runs_here`` raises.
    """

    def __init__(self, file: Path) -> None:
        self.name = file.parent.name
        check_runs_here(file.parent.parent, (self.name,))
        self.record = read_record(file.parent.parent)
        checked_file = engine_file(file.parent.parent, self.record["components"][self.name])
        load_library(self.record["builder"]["name"])
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        self._runner = TrtRunner(EngineFromBytes(checked_file.read_bytes))
        self._runner.activate()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name, copied from the engine's buffers. Raises ErasecError for shapes it was not built for."""
        import numpy as np

        check_fits(self.name, self.record, inputs)
        return {name: np.array(value) for name, value in self._runner.infer(dict(inputs)).items()}

    def close(self) -> None:
        self._runner.deactivate()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


if __name__ == "__main__":
    _build_here(json.load(sys.stdin))
