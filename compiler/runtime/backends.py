"""What runs the components of a built folder: ONNX Runtime, OpenVINO, TensorRT's engines, or torch.

All take and give the arrays of the ONNX graphs, by the names that these have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from erasec.checkpoint.folder import CARRIED
from erasec.checkpoint.safetensors import read_header
from erasec.errors import ErasecError, MissingTool
from erasec.runtime import clip_tokenizer as prompts

Array = NDArray[Any]
Arrays = dict[str, Array]
# The file that each component has in its folder.
FILES = {"ort": "model.onnx", "openvino": "openvino_model.xml", "trt-rtx": "model.engine", "trt": "model.engine"}
EXTRAS = {"ort": "onnx"}  # where the extra of pip has another name
BATCH = 4


class Component(Protocol):
    """One graph that can be run: arrays by the names of its inputs to arrays by those of its outputs."""

    def run(self, inputs: Mapping[str, Array]) -> Arrays: ...

    def close(self) -> None:
        """Give back what it holds."""


class Parts(Protocol):
    """What opens the components of a folder and reads its prompts."""

    @property
    def batch(self) -> int:
        """How many guided pictures are made at a time."""

    def open(self, name: str) -> Component: ...

    def ids(self, texts: Sequence[str]) -> Array:
        """Token ids (n, t) in int64."""


def carried(root: Path) -> tuple[str, list[str]]:
    """The negative prompt and the names of new tokens that a folder carries beside its weights, without its tensors."""
    path = root / CARRIED
    if not path.is_file():
        return "", []
    try:
        told = json.loads(read_header(path)[1]["erasec.extras"])
        return str(told.get("negative", "")), list(told.get("tokens", []))
    except (KeyError, ValueError, AttributeError) as error:
        raise ErasecError(f"{CARRIED} is damaged", why=repr(error), where=str(path), fix="build it again") from error


@dataclass(frozen=True)
class Function:
    """A component that holds nothing but its function."""

    run: Callable[[Mapping[str, Array]], Arrays]

    def close(self) -> None:
        """There is nothing to give back but memory."""


class Graphs:
    """A folder of graphs or engines, one for each component, with a tokenizer beside them."""

    def __init__(self, root: Path, backend: str, threads: int | None) -> None:
        self.root, self.backend, self.threads = root, backend, threads

    @cached_property
    def batch(self) -> int:
        """As many as every engine takes; the denoiser reads each picture twice."""
        if FILES[self.backend] != "model.engine":
            return BATCH
        from erasec.tensorrt.engines import read_record

        told = read_record(self.root)["components"]
        most = {name: min(each["max"][0] for each in told[name]["profile"].values() if each["max"]) for name in told}
        return max(1, min(BATCH, int(most["text_encoder"]), int(most["unet"]) // 2, int(most["vae_decoder"])))

    @cached_property
    def tokenizer(self) -> prompts.Prompts:
        """The folder's tokenizer. Raises ErasecError where it does not know a new token that the folder carries."""
        config = json.loads((self.root / "text_encoder" / "config.json").read_text(encoding="utf-8"))
        found = prompts.read(self.root / "tokenizer", config.get("max_position_embeddings", 77))
        for token in carried(self.root)[1]:
            if not found.knows(token):
                raise ErasecError(
                    f"the tokenizer does not know the new token {token!r}", where=str(self.root / "tokenizer"),
                    why="its row is in the text encoder, and no prompt would reach it", fix="build it again",
                )  # fmt: skip
        return found

    def ids(self, texts: Sequence[str]) -> Array:
        return self.tokenizer.ids(texts)

    def open(self, name: str) -> Component:
        path = self.root / name / FILES[self.backend]
        if not path.is_file():
            raise ErasecError(f"the bundle has no {name}/{path.name}", why="it is not there", where=str(self.root),
                              fix="build it with this component")  # fmt: skip
        opened = {"ort": onnx_runtime, "openvino": open_vino}.get(self.backend, engine)
        try:
            return opened(path, self.threads)
        except ErasecError:
            raise
        except ImportError as error:
            extra = EXTRAS.get(self.backend, self.backend)
            raise MissingTool(f"the backend {self.backend} needs {error.name}", why="not installed",
                              fix=f'pip install "erasec[{extra}]"') from error  # fmt: skip
        except Exception as error:  # each library has its own kinds
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ErasecError(f"{name}/{path.name} cannot be loaded", why=first, where=str(path),
                              fix="fetch or build it again") from error  # fmt: skip


def onnx_runtime(path: Path, threads: int | None) -> Component:
    """A graph in ONNX Runtime, on a GPU where its build has one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # what goes wrong is raised as well
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    names = [output.name for output in session.get_outputs()]
    return Function(lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True)))


def open_vino(path: Path, threads: int | None) -> Component:
    """A graph in OpenVINO, on the CPU and in float32."""
    import openvino

    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}  # else some CPUs compute in bfloat16
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    model = openvino.Core().compile_model(str(path), "CPU", options)

    def run(inputs: Mapping[str, Array]) -> Arrays:
        # A port has the graph's own name and may have others.
        return {name: np.array(value) for port, value in model(dict(inputs)).items() for name in port.get_names()}

    return Function(run)


def engine(path: Path, threads: int | None) -> Component:
    """An engine on this machine's GPU, where the number of threads is nothing."""
    from erasec.tensorrt.engines import Session

    return Session(path)


class Torch:
    """A diffusers folder in torch, with all that it carries beside its weights."""

    batch = BATCH

    def __init__(self, root: Path, threads: int | None) -> None:
        self.root, self.threads = root, threads

    @cached_property
    def pipeline(self) -> Any:
        """``erasec.pipeline`` of the folder in float32, on a GPU where there is one."""
        import torch

        from erasec.attention.processors import pipeline

        if self.threads:
            torch.set_num_threads(self.threads)
        made = pipeline(self.root, dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
        return made.to("cuda" if torch.cuda.is_available() else "cpu")

    def ids(self, texts: Sequence[str]) -> Array:
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
        ids: Array = self.pipeline.tokenizer(list(texts), **options).input_ids
        return ids

    def open(self, name: str) -> Component:
        import torch

        made = self.pipeline
        calls: dict[str, Callable[..., tuple[Any, ...]]] = {
            "text_encoder": lambda ids: made.text_encoder(ids, return_dict=False)[:2],
            "unet": lambda sample, timestep, states: made.unet(sample, timestep, states, return_dict=False),
            "vae_decoder": lambda latents: made.vae.decode(latents, return_dict=False),
            "vae_encoder": lambda images: (made.vae.encode(images).latent_dist.parameters,),
        }
        ports = {
            "text_encoder": (("input_ids",), ("last_hidden_state", "pooler_output")),
            "unet": (("sample", "timestep", "encoder_hidden_states"), ("out_sample",)),
            "vae_decoder": (("latent_sample",), ("sample",)),
            "vae_encoder": (("sample",), ("latent_parameters",)),
        }
        taken, given = ports[name]

        def run(inputs: Mapping[str, Array]) -> Arrays:
            with torch.no_grad():
                outputs = calls[name](*(torch.from_numpy(inputs[key]).to(made.device) for key in taken))
            return {key: output.cpu().numpy() for key, output in zip(given, outputs, strict=True)}

        return Function(run)
