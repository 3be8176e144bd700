"""Target trt: TensorRT engines, built with the GPU that they will run on.

A refittable engine can be given other weights, and so those that were erased: it is one only where that is asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from erasec.checkpoint.safetensors import atomic, file_digest
from erasec.errors import ErasecError, MissingTool
from erasec.graphs import weights as initializers
from erasec.targets.trt_rtx import Engines
from erasec.tensorrt import engines
from erasec.tensorrt.engines import TRT, Builder, Profile

# Its release notes: an engine that can be refitted may compute as if the bias of a matrix product were zero.
FAULTY = "11.3.0"
OLDEST = 10


@dataclass(frozen=True)
class Trt(Engines):
    """``refit`` makes engines that ``refit`` can give other weights: with those of the base, they are no longer erased.
    ``timing_cache`` is a file that keeps the times of kernels for the next build."""

    refit: bool = False
    timing_cache: str = ""

    name: ClassVar[str] = "trt"
    summary: ClassVar[str] = "TensorRT engines, for the GPU of the machine that builds them"

    def builder(self) -> Builder:
        kept = str(Path(self.timing_cache).expanduser()) if self.timing_cache else ""
        return Builder(TRT, (), self.workspace, self.refit, kept)

    def check(self) -> None:
        """Raise MissingTool where TensorRT or a GPU is missing; ErasecError where the version has a known fault."""
        fix = "--target trt-rtx builds engines without a GPU, and --target onnx runs anywhere"
        try:
            super().check()
        except MissingTool as error:
            raise MissingTool(error.what, why=error.why, fix=f"{error.fix}; or {fix}") from error
        if not engines.devices():
            why = "none answers to nvidia-smi, and TensorRT times its kernels on the GPU that they are for"
            raise MissingTool("trt needs an NVIDIA GPU", why=why, fix=fix)
        found = engines.version(TRT)
        if int(found.split(".")[0]) < OLDEST:
            raise MissingTool(f"trt needs TensorRT {OLDEST} or later", why=f"{found} is installed",
                              fix='pip install --upgrade "erasec[trt]"')  # fmt: skip
        if self.refit:
            refuse_faulty(found)

    def engine(self, graph: Path, file: Path, profile: Profile) -> tuple[dict[str, Any], str]:
        entry, library = super().engine(graph, file, profile)
        return entry | ({"initializers": initializers.each_digest(graph)} if self.refit else {}), library


def refuse_faulty(found: str) -> None:
    """Raise ErasecError for a version of TensorRT whose refittable engines may compute something else."""
    if found.startswith(FAULTY):
        raise ErasecError(
            f"TensorRT {found} builds no sound engines that can be refitted",
            why="by its release notes they may drop the bias of a matrix product, refitted or not",
            fix="use TensorRT 11.4 or later, or leave refit out",
        )  # fmt: skip


def refit(file: Path, graph: Path) -> tuple[str, ...]:
    """Give a refittable engine, FOLDER/NAME/model.engine, the weights of another linked ONNX file of the same graph.

    All weights are set that differ from what the engine holds, and all that were ever refitted, so that A, B and A
    again are A. Engine and engine.json are replaced; between the two, the engine is not loaded. Returns the names.
    Raises ErasecError where the engine cannot be refitted, or the graph is another one.
    """
    folder, name = file.parent.parent, file.parent.name
    told = engines.read_record(folder)
    entry, builder = told["components"][name], told["builder"]
    if builder["name"] != TRT or "initializers" not in entry:
        raise ErasecError(f"{file} cannot be refitted", why="it was not built for that, so that it cannot be un-erased",
                          fix="build it again with the other weights; or with trt:refit=true")  # fmt: skip
    refuse_faulty(builder["version"])
    source = initializers.digests(graph)
    if source[0] != entry["graph"]:
        raise ErasecError(f"{file} was built from another graph", why="only weights can be refitted",
                          fix="build it again", where=str(graph))  # fmt: skip
    engines.check_runs_here(folder, (name,))
    held, known = initializers.each_digest(graph), entry["initializers"]
    names = {each for each, digest in held.items() if digest != known[each]} | set(entry.get("refitted", ()))
    data = _refitted(file, graph, names)
    with atomic(file) as temporary:
        temporary.write_bytes(data)
    entry |= {"weights": source[1], "initializers": held, "refitted": sorted(names), "engine": file_digest(file)}
    engines.rewrite_record(folder, told)
    return tuple(sorted(names))


def _refitted(file: Path, graph: Path, names: Collection[str]) -> memoryview:
    """The engine with other weights, as TensorRT serialises it. Raises ErasecError where TensorRT will not."""
    trt = engines.load(TRT)
    logger = trt.Logger(trt.Logger.ERROR)
    engine = trt.Runtime(logger).deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise ErasecError("TensorRT could not load the engine", why="it said why above", fix="build it again",
                          where=str(file))  # fmt: skip
    refitter = trt.Refitter(engine, logger)
    if fixed := sorted(set(names) - set(refitter.get_all_weights())):
        raise ErasecError(f"TensorRT cannot refit {fixed[0]}", why="the engine has folded it into something else",
                          fix="build the engine again with the other weights", where=str(file))  # fmt: skip
    arrays: dict[str, NDArray[Any]] = {}
    wanted = set(names)
    while more := initializers.read(graph, wanted):
        arrays |= more  # kept, as TensorRT reads them when it refits
        for name, array in more.items():
            if not refitter.set_named_weights(name, trt.Weights(array)):
                raise ErasecError(f"TensorRT does not take other weights for {name}", where=str(file),
                                  fix="build the engine again with the other weights")  # fmt: skip
        wanted = set(refitter.get_missing_weights()) - arrays.keys()  # what is fused with those that were set
    if refitter.get_missing_weights() or not refitter.refit_cuda_engine():
        raise ErasecError("TensorRT could not refit the engine", where=str(file), why="it misses weights: "
                          + (", ".join(refitter.get_missing_weights()) or "none, and it did not say why"),
                          fix="build the engine again with the other weights")  # fmt: skip
    config = engine.create_serialization_config()
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    return memoryview(engine.serialize_with_config(config))
