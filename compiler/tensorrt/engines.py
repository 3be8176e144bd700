"""Engines of TensorRT and TensorRT-RTX: built from ONNX files through Polygraphy, described, checked and run.

A folder of engines has one file model.engine a component, and engine.json, which says what they were built from, with
what, and for what. An engine is a program of one library version and some GPUs, and loading a foreign one ends in a
crash or in words that nobody understands: so all that can be known before is compared first.

Every engine is built in a process of its own. The libraries take gigabytes and give them back when it ends, and
Polygraphy knows one of the two a process, by an environment variable that it reads when it is imported.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.base import require as require_modules
from erasec.checkpoint.safetensors import atomic, file_digest
from erasec.errors import ErasecError, MissingTool
from erasec.graphs.weights import digests

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

SCHEMA = "erasec.engines/1"
RECORD, ENGINE = "engine.json", "model.engine"
RTX, TRT = "tensorrt_rtx", "tensorrt"
TARGETS = {RTX: "trt-rtx", TRT: "trt"}
TITLES = {RTX: "TensorRT-RTX", TRT: "TensorRT"}
SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
# Compute capabilities that TensorRT-RTX builds for, without the dot; where none is chosen it builds for 8.0 and later.
# For 7.5 it multiplies no float32 matrices, of which a text encoder has some in float16 as well.
CAPABILITIES = ("80", "86", "89", "120", "121")
OLDEST = 80

Shape = tuple[int, ...]
Profile = Mapping[str, Sequence[Shape]]  # by input: the least, the usual and the largest shape


@dataclass(frozen=True)
class Builder:
    """What builds engines: the library by the name of its Python module, and what it is told.

    ``capabilities`` are GPUs to build for, of ``CAPABILITIES`` (TensorRT-RTX only); ``workspace`` is in MiB, 0 for the
    library's own; ``timing_cache`` is a file that keeps what was timed, for the next build (TensorRT only).
    """

    library: str
    capabilities: tuple[str, ...] = ()
    workspace: int = 0
    refit: bool = False
    timing_cache: str = ""


def build(graph: Path, engine: Path, profile: Profile, builder: Builder) -> tuple[dict[str, Any], str]:
    """Build ``graph`` into the file ``engine``; returns its entry in engine.json, and the version of the library.

    Raises ErasecError with the library's own words where it cannot.
    """
    start = time.monotonic()
    source = digests(graph)
    engine.parent.mkdir(parents=True, exist_ok=True)
    told = engine.with_name(f".{engine.name}.json")
    job = asdict(builder) | {"graph": str(graph), "engine": str(engine), "profile": profile, "told": str(told)}
    environment = os.environ | {SWITCH: str(int(builder.library == RTX))}
    command = [sys.executable, "-P", "-m", "erasec.tensorrt.engines"]  # -P: whatever lies in the working directory
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise _failed(graph, builder, done)
    library: str = json.loads(told.read_text())
    told.unlink()
    return entry(engine, source, profile, time.monotonic() - start), library


def entry(engine: Path, source: tuple[str, str], profile: Profile, seconds: float) -> dict[str, Any]:
    """What engine.json says of one engine, which was built from what has the digests ``source``."""
    return {
        "file": f"{engine.parent.name}/{engine.name}", "graph": source[0], "weights": source[1],
        "engine": file_digest(engine), "bytes": engine.stat().st_size, "seconds": round(seconds, 1),
        "profile": {name: dict(zip(("min", "opt", "max"), each, strict=True)) for name, each in profile.items()},
    }  # fmt: skip


def _failed(graph: Path, builder: Builder, done: subprocess.CompletedProcess[str]) -> ErasecError:
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    first = next((at for at, line in enumerate(lines) if line.startswith(("[E]", "[!]"))), len(lines) - 1)
    said = itertools.takewhile(lambda line: not line.startswith("Traceback"), lines[max(first, 0) :])
    why = " ".join(dict.fromkeys(said))[:1000] or "it said nothing"
    if done.returncode < 0:
        why = f"it was killed by signal {-done.returncode}; 9 is most often a want of memory. It said: {why}"
    name = graph.parent.name
    fix = "build on a machine with more memory, or for smaller shapes" if done.returncode < 0 else (
        "if the library does not know an operation or a GPU, choose other capabilities or precision=fp32"
    )  # fmt: skip
    return ErasecError(f"{TITLES[builder.library]} could not build {name}", why=why, fix=fix, where=str(graph))


def _build_here(job: Mapping[str, Any]) -> None:
    """Build in this process, which Polygraphy's switch was set for."""
    library = load(job["library"])
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
    made = trt.engine_bytes_from_network(network, config, save_timing_cache=job["timing_cache"] or None)
    with atomic(Path(job["engine"])) as temporary:
        temporary.write_bytes(memoryview(made))
    Path(job["told"]).write_text(json.dumps(library.__version__))


def load(library: str) -> Any:
    """Import ``library``, and make Polygraphy use it. Raises MissingTool where one of the two is not installed."""
    require(library)
    os.environ[SWITCH] = str(int(library == RTX))
    config = importlib.import_module("polygraphy.config")
    if (library == RTX) != config.USE_TENSORRT_RTX:
        raise ErasecError(
            f"this process already uses another library than {TITLES[library]}",
            why="Polygraphy takes one of TensorRT and TensorRT-RTX, when it is imported", fix="start another process",
        )  # fmt: skip
    logger = importlib.import_module("polygraphy.logger").G_LOGGER
    logger.module_severity = logger.ERROR
    return importlib.import_module(library)


def require(library: str) -> None:
    """Raise MissingTool where what builds and runs engines of ``library`` is not installed."""
    require_modules(TARGETS[library], ("onnx", "polygraphy", library), TARGETS[library])


def devices() -> list[tuple[str, str]]:
    """Name and compute capability ("89" for 8.9) of every NVIDIA GPU that answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in answer.splitlines() if "," in line]
    return [(name.strip(), capability.strip().replace(".", "")) for name, capability in rows]


def write_record(folder: Path, builder: Builder, library: str, components: Mapping[str, Mapping[str, Any]]) -> None:
    """Write engine.json, whole or not at all: ``components`` by name, built with this version of the library."""
    told = {
        "schema": SCHEMA, "erasec": installed("erasec"), "refit": builder.refit, "workspace": builder.workspace,
        "builder": {"name": builder.library, "version": library, "polygraphy": installed("polygraphy")},
        # TensorRT builds for the GPU that it runs on.
        "capabilities": list(builder.capabilities) or [each for _, each in devices()[:1] if builder.library == TRT],
        "components": components,
    }  # fmt: skip
    rewrite_record(folder, told)


def rewrite_record(folder: Path, told: Mapping[str, Any]) -> None:
    """Write what ``read_record`` gave, with changes."""
    with atomic(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """engine.json of a folder. Raises ErasecError where it has none that this erasec understands."""
    path = folder / RECORD
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if told["schema"] != SCHEMA:
            raise ErasecError(f"{path} is {told['schema']}", why=f"this erasec knows {SCHEMA}",
                              fix="use the erasec that built it, or build the folder again")  # fmt: skip
        for each in told["components"].values():
            _ = each["file"], each["engine"], each["graph"], each["weights"], each["profile"]
        _ = TARGETS[told["builder"]["name"]], told["builder"]["version"], told["capabilities"]
        return told
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ErasecError(
            f"{folder} is no folder of engines", why=f"it has no sound {RECORD} ({type(error).__name__})",
            fix="erasec build MODEL --erase CONCEPT --target trt-rtx   writes one",
        ) from error  # fmt: skip


def check_runs_here(folder: Path, names: Sequence[str] = ()) -> None:
    """Compare engine.json with the engines (of the components ``names``, or all) and with this machine.

    Nothing is deserialised. Raises ErasecError where an engine is not the one that was built, or was built for another
    GPU or library version; MissingTool where the library or a GPU is not here. All that is wrong is in one error.
    """
    told = read_record(folder)
    components = told["components"]
    if unknown := sorted(set(names) - set(components)):
        raise ErasecError(f"{folder} has no engine of {unknown[0]}", why=f"it has {', '.join(sorted(components))}",
                          fix="build the folder with it")  # fmt: skip
    for name in names or components:
        file = folder / components[name]["file"]
        if not file.is_file() or file_digest(file) != components[name]["engine"]:
            raise ErasecError(
                f"{components[name]['file']} is not the engine that was built",
                why=f"its sha256 is not the one in {RECORD}" if file.is_file() else "it is gone",
                fix="fetch or build the folder again", where=str(folder),
            )  # fmt: skip
    library, wanted = told["builder"]["name"], told["builder"]["version"]
    require(library)
    found, reasons = version(library), []
    if found != wanted:
        reasons.append(f"they are programs of {TITLES[library]} {wanted}, and {found} is installed")
    gpus = devices()
    if not gpus:
        reasons.append("no NVIDIA GPU answers to nvidia-smi")
    elif not any(_suits(capability, told) for _, capability in gpus):
        here = ", ".join(f"{name} ({_dotted(capability)})" for name, capability in gpus)
        reasons.append(f"they are for compute capability {_asked(told)}, and here is {here}")
    if reasons:
        kind = MissingTool if not gpus else ErasecError
        target = TARGETS[library]
        raise kind(
            f"the engines in {folder} do not run on this machine", why="; ".join(reasons),
            fix=f"build them here or for this GPU (--target {target}), or for any machine: --target onnx",
        )  # fmt: skip


def version(library: str) -> str:
    """The installed version of a library."""
    return str(importlib.import_module(library).__version__)


def _suits(capability: str, told: Mapping[str, Any]) -> bool:
    return capability in told["capabilities"] if told["capabilities"] else int(capability) >= OLDEST


def _asked(told: Mapping[str, Any]) -> str:
    return " or ".join(map(_dotted, told["capabilities"])) or f"{_dotted(str(OLDEST))} and later"


def _dotted(capability: str) -> str:
    return f"{capability[:-1]}.{capability[-1]}"


def check_fits(name: str, told: Mapping[str, Any], inputs: Mapping[str, NDArray[Any]]) -> None:
    """Raise ErasecError where an input's shape is not one that the engine ``name`` was built for."""
    for key, shapes in told["components"][name]["profile"].items():
        shape, low, high = inputs[key].shape, shapes["min"], shapes["max"]
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            least, asked, most = ("x".join(map(str, each)) for each in (low, shape, high))
            raise ErasecError(
                f"the engine {name} does not take {key} of {asked}", why=f"it was built for {least} to {most}",
                fix="ask for another size or fewer images, or build it with other batch, height and width",
            )  # fmt: skip


class Session:
    """One engine on this machine's GPU, until ``close`` or the end of a ``with`` block.

    ``file`` is the engine in its folder, FOLDER/NAME/model.engine. Raises what ``check_runs_here`` does.
    """

    def __init__(self, file: Path) -> None:
        self.name = file.parent.name
        check_runs_here(file.parent.parent, (self.name,))
        self.told = read_record(file.parent.parent)
        checked = file.parent.parent / self.told["components"][self.name]["file"]
        load(self.told["builder"]["name"])
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        self._runner = TrtRunner(EngineFromBytes(checked.read_bytes))
        self._runner.activate()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name, as arrays of their own. Raises ErasecError for shapes that it was not built for."""
        import numpy as np

        check_fits(self.name, self.told, inputs)
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
