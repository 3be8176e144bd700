"""Target trt: TensorRT engines, built on the GPU that they will run on.

An engine that was built to be refitted can be given other weights, and so those from before the erasure. Engines are
built that way only on request.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

from erasec.checkpoint.safetensors import atomic_write, file_digest
from erasec.errors import ErasecError, MissingTool
from erasec.graphs.weights import digests, read_weights, weight_digests
from erasec.options import options
from erasec.runtime.schedulers import sampling_notes
from erasec.tensorrt import devices, engines
from erasec.tensorrt.base import EngineTarget
from erasec.tensorrt.engines import TRT, Builder, Profile

if TYPE_CHECKING:
    from erasec.model.view import Model

# By the release notes of this version, a refittable engine may compute as if the bias of a matrix product were zero.
REFIT_BUG_VERSIONS = "11.3.0"
OLDEST = 10


@options
class Trt(EngineTarget):
    """``refit`` builds engines that the function of the same name can give other weights; with the base's, they are no
    longer erased. ``timing_cache`` is a file in which the times of kernels are stored for the next build."""

    refit: bool = False
    timing_cache: str = ""

    name: ClassVar[str] = "trt"
    summary: ClassVar[str] = "TensorRT engines, for the GPU of the machine that builds them"

    def how_to_undo(self) -> str:
        return "a refittable engine can be given the weights from before the erasure" if self.refit else ""

    def builder(self) -> Builder:
        timing_cache = str(Path(self.timing_cache).expanduser()) if self.timing_cache else ""
        return Builder(TRT, (), self.workspace, self.refit, timing_cache)

    def check(self) -> None:
        """Raise MissingTool where TensorRT or a GPU is missing; ErasecError where the version has a known fault."""
        fix = "--target trt-rtx builds engines without a GPU, and --target onnx runs anywhere"
        try:
            super().check()
        except MissingTool as error:
            raise MissingTool(error.what, why=error.why, fix=f"{error.fix}; or {fix}") from error
        if not devices.gpus():
            why = "no GPU answers to nvidia-smi, and TensorRT times its kernels on the GPU that it builds for"
            raise MissingTool("trt needs an NVIDIA GPU", why=why, fix=fix)
        installed = engines.version(TRT)
        if int(installed.split(".")[0]) < OLDEST:
            raise MissingTool(
                f"trt needs TensorRT {OLDEST} or later",
                why=f"{installed} is installed",
                fix='pip install --upgrade "erasec[trt]"',
            )
        if self.refit:
            check_refit_version(installed)

    def notes(self, model: Model) -> tuple[str, ...]:
        return sampling_notes(self.name, model.source)

    def engine(self, graph: Path, file: Path, profile: Profile) -> tuple[dict[str, Any], str]:
        entry, library = super().engine(graph, file, profile)
        return entry | ({"initializers": weight_digests(graph)} if self.refit else {}), library


def check_refit_version(version: str) -> None:
    """Raise ErasecError for a version of TensorRT whose refittable engines may compute wrong outputs."""
    if version.startswith(REFIT_BUG_VERSIONS):
        raise ErasecError(
            f"the refittable engines of TensorRT {version} may compute wrong outputs",
            why="by its release notes they may drop the bias of a matrix product, refitted or not",
            fix="use TensorRT 11.4 or later, or leave refit out",
        )


def refit(file: Path, graph: Path) -> tuple[str, ...]:
    """Give a refittable engine, FOLDER/NAME/model.engine, the weights of another linked ONNX file of the same graph.

    Sets every weight that differs from the engine's, and every weight that was refitted before, so that refitting to B
    and back to A gives A. The engine is replaced, then engine.json; in between, the engine does not load, as its digest
    is wrong. Returns the names of the weights. Raises ErasecError where the engine is not refittable, or was built from
    another graph.
    """
    folder, name = file.parent.parent, file.parent.name
    record = engines.read_record(folder)
    entry, builder = record["components"][name], record["builder"]
    if builder["name"] != TRT or "initializers" not in entry:
        raise ErasecError(
            f"{file} cannot be refitted",
            why="it was built without refitting, so that it cannot be un-erased",
            fix="build it again with the other weights; or with trt:refit=true",
        )
    check_refit_version(builder["version"])
    graph_digest, weights_digest = digests(graph)
    if graph_digest != entry["graph"]:
        raise ErasecError(
            f"{file} was built from another graph",
            why="only weights can be refitted",
            fix="build it again",
            where=str(graph),
        )
    engines.check_runs_here(folder, (name,))
    new, current = weight_digests(graph), entry["initializers"]
    names = {key for key, digest in new.items() if digest != current[key]} | set(entry.get("refitted", ()))
    data = _refitted_engine(file, graph, names)
    with atomic_write(file) as temporary:
        temporary.write_bytes(data)
    entry |= {"weights": weights_digest, "initializers": new, "refitted": sorted(names), "engine": file_digest(file)}
    engines.rewrite_record(folder, record)
    return tuple(sorted(names))


def _refitted_engine(file: Path, graph: Path, names: Collection[str]) -> memoryview:
    """The serialised engine with the weights ``names`` of ``graph``. Raises ErasecError where TensorRT refuses them."""
    trt = engines.load_library(TRT)
    logger = trt.Logger(trt.Logger.ERROR)
    engine = trt.Runtime(logger).deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise ErasecError(
            "TensorRT could not load the engine",
            why="TensorRT printed the reason above",
            fix="build it again",
            where=str(file),
        )
    refitter = trt.Refitter(engine, logger)
    if fixed := sorted(set(names) - set(refitter.get_all_weights())):
        raise ErasecError(
            f"TensorRT cannot refit {fixed[0]}",
            why="the engine holds it fused with other weights",
            fix="build the engine again with the other weights",
            where=str(file),
        )
    arrays: dict[str, NDArray[Any]] = {}
    wanted = set(names)
    while new := read_weights(graph, wanted):
        arrays |= new  # TensorRT reads them later, when it refits
        for name, array in new.items():
            if not refitter.set_named_weights(name, trt.Weights(array)):
                raise ErasecError(
                    f"TensorRT does not take other weights for {name}",
                    where=str(file),
                    fix="build the engine again with the other weights",
                )
        wanted = set(refitter.get_missing_weights()) - arrays.keys()  # weights that are fused with those that were set
    if refitter.get_missing_weights() or not refitter.refit_cuda_engine():
        raise ErasecError(
            "TensorRT could not refit the engine",
            where=str(file),
            why="missing weights: " + (", ".join(refitter.get_missing_weights()) or "none; it gave no reason"),
            fix="build the engine again with the other weights",
        )
    config = engine.create_serialization_config()
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    return memoryview(engine.serialize_with_config(config))
