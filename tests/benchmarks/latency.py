"""One UNet step of Stable Diffusion 1.4's size by each backend: median time, load time and memory, on this machine.

    python tests/benchmarks/latency.py       writes tests/benchmarks/results/latency.json; needs 20 GB of disk
    ... --keep DIR      finds or makes the random model in DIR/model
    ... --size tiny     a model of a few MB: a trial, no benchmark
    ... --only NAME...  these backends, the others' rows are kept

Batch 1, latents of 64 x 64, 77 text states; random weights, the same for all. Every backend runs in a fresh process
with as many threads as there are cores: "load" until it can run, "first" the first step, "median" and "runs" of three
more after one to warm up, "peak_mb" the process's resident peak. "off" is max |output - torch float32| / max |torch
float32| on the same inputs, so that what is fast and wrong is seen to be.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machine
import numpy as np
from machine import Record

RESULT = Path(__file__).parent / "results" / "latency.json"
BACKENDS = (
    "torch fp32",
    "torch bf16",
    "torch compile",
    "ort fp32",
    "ort fp16",
    "openvino fp32",
    "openvino fp16",
    "openvino bf16",
    "openvino int8",
)
ROUNDS = 3
Run = Callable[[dict[str, Any]], Any]


def feed(folder: Path) -> dict[str, Any]:
    """The inputs of the UNet's graph."""
    config = json.loads((folder / "unet/config.json").read_text())
    rng, side = np.random.default_rng(0), config["sample_size"]
    return {
        "sample": rng.standard_normal((1, config["in_channels"], side, side), np.float32),
        "timestep": np.array(500.0, np.float32),
        "encoder_hidden_states": rng.standard_normal((1, 77, config["cross_attention_dim"]), np.float32),
    }


def by_torch(place: Path, kind: str) -> Run:
    import torch
    from diffusers import UNet2DConditionModel

    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    unet: Any = UNet2DConditionModel.from_pretrained(place / "model/unet", torch_dtype=dtype, use_safetensors=True)
    call: Any = torch.compile(unet) if kind == "compile" else unet

    def run(given: dict[str, Any]) -> Any:
        tensors = [torch.from_numpy(value).to(dtype) for value in given.values()]
        with torch.no_grad():
            return call(*tensors, return_dict=False)[0].float().numpy()

    return run


def by_ort(place: Path, kind: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    session = onnxruntime.InferenceSession(place / f"onnx_{kind}/unet/model.onnx", options)
    return lambda given: session.run(None, given)[0]


def by_openvino(place: Path, kind: str) -> Run:
    import openvino

    file = place / f"openvino_{'fp32' if kind == 'bf16' else kind}/unet/openvino_model.xml"
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if kind == "bf16" else "f32",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(os.cpu_count()),
    }
    compiled: Any = openvino.Core().compile_model(file, "CPU", hints)
    return lambda given: compiled(given)[0]


LOADERS: dict[str, Callable[[Path, str], Run]] = {"torch": by_torch, "ort": by_ort, "openvino": by_openvino}


def step(place: Path, backend: str) -> Record:
    """Load, run and time one backend in this process; its output goes to a file."""
    name, kind = backend.split()
    given, start = feed(place / "model"), time.perf_counter()
    run = LOADERS[name](place, kind)
    loaded = time.perf_counter()
    run(given)
    first = time.perf_counter()
    run(given)
    runs, output = [], None
    for _ in range(ROUNDS):
        began = time.perf_counter()
        output = run(given)
        runs.append(time.perf_counter() - began)
    np.save(place / "outputs" / f"{backend}.npy", output)
    return {
        "load": loaded - start,
        "first": first - loaded,
        "median": statistics.median(runs),
        "runs": runs,
        "peak_mb": machine.status("VmHWM"),
    }


def prepare(place: Path, size: str, backends: list[str]) -> None:
    """The random model, and what each backend reads, where it is not there yet."""
    from random_models import random_folder

    from erasec.checkpoint.folder import Folder
    from erasec.graphs import link as linker
    from erasec.targets.ov import convert

    model = place / "model"
    if not model.is_dir():
        random_folder(model, "sd1", size)
    for precision in ("fp32", "fp16"):
        out = place / f"onnx_{precision}"
        if not out.is_dir():
            linker.write_onnx(Folder(model), out, precision, ("unet",))
    for weights in sorted(
        {"fp32" if (kind := name.split()[1]) == "bf16" else kind for name in backends if name.startswith("openvino")}
    ):
        if not (place / f"openvino_{weights}").is_dir():
            folder = place / f"openvino_{weights}/unet"
            folder.mkdir(parents=True)
            convert(place / "onnx_fp32/unet/model.onnx", folder / "openvino_model.xml", weights)
    (place / "outputs").mkdir(exist_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="full", choices=("full", "tiny"))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", nargs="*", choices=BACKENDS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        print(json.dumps(step(Path(options.step[0]), options.step[1])))
        return
    if options.prepare:
        prepare(Path(options.prepare[0]), options.prepare[1], options.prepare[2:])
        return
    rows: dict[str, Record] = (
        json.loads(options.out.read_text())["rows"] if options.only and options.out.exists() else {}
    )
    with ExitStack() as stack:
        place = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        chosen = list(options.only or BACKENDS)
        subprocess.run([sys.executable, __file__, "--prepare", str(place), options.size, *chosen], check=True)
        for backend in chosen:
            command = [sys.executable, __file__, "--step", str(place), backend]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{backend} failed with exit code {done.returncode}", file=sys.stderr)
                continue
            rows[backend] = json.loads(done.stdout.splitlines()[-1])
            reference = place / "outputs/torch fp32.npy"
            if reference.is_file():
                expected, outputs = np.load(reference), np.load(place / f"outputs/{backend}.npy")
                rows[backend]["off"] = float(np.abs(outputs - expected).max() / np.abs(expected).max())
            print(backend, {k: round(v, 6) for k, v in rows[backend].items() if k != "runs"}, file=sys.stderr)
    result = {"size": options.size, "machine": machine.about(), "rows": rows}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
