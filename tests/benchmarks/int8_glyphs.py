"""What storing weights in 8 and 4 bits does to glyphs and to an erased glyphs: parity, bytes, pictures, seconds.

    python tests/benchmarks/int8_glyphs.py      writes tests/benchmarks/results/int8.json

"openvino" is the target of that name, "onnx" the target onnx, whose linear layers ONNX Runtime's own tools bring to
int8 (weights, and activations as they come) or to 4 bits (weights in blocks of 32). The eraser is uce. Judge B, the
same prompts and seeds for all; PSNR is against the float32 row of the same runtime. CPU seconds are of one thread and
for one picture: other work on the machine stretches them less than it does the time on the wall.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
import numpy as np
from random_models import GRAPHS

from erasec.base import Context, Question
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import atomic_write
from erasec.glyphs.judge import GlyphJudge
from erasec.graphs.link import write_onnx
from erasec.graphs.parity import compare_graph
from erasec.model import loading
from erasec.recipe import concept as concepts
from erasec.recipe import recipe
from erasec.registry import load_pass, load_target
from erasec.runtime.bundle import open_bundle

if TYPE_CHECKING:
    from erasec.base import Images

RESULT = Path(__file__).parent / "results" / "int8.json"
GROUPS = ("name", "synonym", "implicit", "keep")
ROWS = ("openvino fp32", "openvino fp16", "openvino int8", "onnx fp32", "onnx int8", "onnx int4")
SEED = 31


def panel(images: int) -> list[Question]:
    """``images`` questions of each group, spread over all that the judge asks."""
    every = GlyphJudge().panel(concepts.find("star", "glyphs"), 32, SEED)
    grouped = [[question for question in every if question.group == group] for group in GROUPS]
    return [each[index * len(each) // images] for each in grouped for index in range(min(images, len(each)))]


def dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)


def blocks(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=False)
    made.process()
    made.model.save_model_to_file(str(target), False)


def built(checkpoint: Path, row: str, out: Path) -> dict[str, float]:
    """Write what a row names to ``out``; its parity by component."""
    runtime, kind = row.split()
    if runtime == "openvino":
        out.mkdir()
        artifact = load_target("openvino")(weights=kind).export(Folder(checkpoint), out, Context())
        return {check.name.split("/")[1]: check.value for check in artifact.checks if check.name.startswith("parity/")}
    every = write_onnx(Folder(checkpoint), out)
    quantize: dict[str, Callable[[Path, Path], None]] = {"int8": dynamic, "int4": blocks}
    if kind in quantize:
        for graph in every:
            small = out / graph.name / "small.onnx"
            quantize[kind](out / graph.name / "model.onnx", small)
            for file in (out / graph.name).glob("model.*"):
                file.unlink()
            small.rename(out / graph.name / "model.onnx")
    return {graph.name: compare_graph(Folder(checkpoint), graph, out, kind, 0, 1.0).value for graph in every}


def measure(checkpoint: Path, row: str, questions: list[Question], out: Path) -> tuple[dict[str, Any], Images]:
    judge, limits = GlyphJudge(), recipe.Limits()
    parity = built(checkpoint, row, out)
    names = GRAPHS
    size = {name: sum(f.stat().st_size for f in (out / name).iterdir() if f.suffix != ".json") for name in names}
    bundle = open_bundle(out, threads=1)
    bundle.generate(["a star"], [0], 2, limits.guidance)
    began = time.process_time()
    texts, seeds = [question.prompt for question in questions], [question.seed for question in questions]
    images = bundle.generate(texts, seeds, limits.steps, limits.guidance)
    seconds = (time.process_time() - began) / len(images)
    seen = judge.sees(images, [question.looked_for for question in questions])
    groups = np.array([question.group for question in questions])
    rates = {group: float(seen[groups == group].mean()) for group in GROUPS}
    measured = {"parity": parity, "bytes": size, "cpu_seconds": round(seconds, 3), "rates": rates}
    return measured | {"seen": [bool(each) for each in seen]}, images


def psnr(images: Images, reference: Images) -> float:
    """Mean over pictures, in dB, at most 99."""
    error = np.square(images.astype(np.float64) - reference).mean((1, 2, 3))
    return float(np.minimum(10 * np.log10(255**2 / np.maximum(error, 1e-9)), 99).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12, help="pictures of each group")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    base, questions = loading.load("glyphs"), panel(given.images)
    result: dict[str, Any] = {
        "machine": machine.about(),
        "judge": GlyphJudge().name,
        "pictures": len(questions),
        "rows": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        erased = Path(scratch) / "erased"
        edit = load_pass("uce")().solve(base, concepts.find("star", "glyphs"), Context())
        base.source.write(erased, base.with_edit(edit).merged())
        for name, checkpoint in (("base", base.source.root), ("erased", erased)):
            exact: dict[str, tuple[Images, list[bool]]] = {}
            for row in ROWS:
                out = Path(scratch) / "out"
                measured, images = measure(checkpoint, row, questions, out)
                shutil.rmtree(out)
                reference, before = exact.setdefault(row.split()[0], (images, measured["seen"]))
                measured["psnr"] = round(psnr(images, reference), 1)
                measured["agreement"] = float(
                    np.mean([a == b for a, b in zip(measured.pop("seen"), before, strict=True)])
                )
                result["rows"][f"{name}, {row}"] = measured
                print(f"{name}, {row}", measured["rates"], measured["psnr"], measured["cpu_seconds"], flush=True)
                with atomic_write(given.out) as temporary:
                    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
