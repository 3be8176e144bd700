"""The runtimes: ONNX Runtime, OpenVINO, the engines of TensorRT and TensorRT-RTX, and torch.

In every runtime, components take and return arrays by the names of the ONNX graphs' inputs and outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from erasec.base import Runtime
from erasec.checkpoint.configs import read_config
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.tokenizer_files import check_rows
from erasec.errors import ErasecError, MissingTool
from erasec.graphs.graph import MODEL
from erasec.graphs.session import OnnxSession
from erasec.graphs.signature import DENOISERS, PLACES, T5, T5_TOKENS, graphs
from erasec.model.sidecar import read_record
from erasec.runtime.clip_tokenizer import PromptTokenizer, load_tokenizer
from erasec.runtime.t5_tokenizer import load_t5_tokenizer
from erasec.tensorrt import engines

Array = NDArray[Any]
Arrays = dict[str, Array]
BATCH = 4


class Component(Protocol):
    """One graph that can be run."""

    def run(self, inputs: Mapping[str, Array]) -> Arrays:
        """Outputs by name for inputs by name."""

    def close(self) -> None:
        """Release what the component holds."""


class Components(Protocol):
    """Opens the components of a folder and tokenizes prompts."""

    @property
    def batch(self) -> int:
        """How many images with guidance the components make at a time."""

    def open(self, name: str) -> Component:
        """The component ``name``, loaded now. Raises ErasecError where it is missing or cannot be loaded."""

    def ids(self, texts: Sequence[str], encoder: str = "text_encoder") -> Array:
        """Token ids (n, t) of a text encoder in int64."""

    def text_read(self, text: str, encoder: str = "text_encoder") -> str:
        """The part of ``text`` that a text encoder reads: all of it, or the beginning for which it has room."""


def carried_text(root: Path) -> tuple[str, list[str]]:
    """The negative prompt and the names of new tokens that a folder carries besides its weights.

    Raises ErasecError where the file that holds them is damaged.
    """
    record = read_record(root)[1]
    return record.get("negative", ""), record.get("tokens", [])


@dataclass(frozen=True)
class Function:
    """A component that is a function and holds nothing else."""

    run: Callable[[Mapping[str, Array]], Arrays]

    def close(self) -> None:
        """Nothing to release but memory, which goes with the function."""


@dataclass(frozen=True)
class _WithVectors:
    component: Component

    def run(self, inputs: Mapping[str, Array]) -> Arrays:
        return self.component.run({name: np.atleast_1d(value) for name, value in inputs.items()})

    def close(self) -> None:
        self.component.close()


def with_vectors(component: Component) -> Component:
    """A component whose scalar inputs are passed on to ``component`` as vectors of one number, as Triton needs them."""
    return _WithVectors(component)


class GraphRuntime(Runtime):
    """A runtime of folders that have a file called ``file`` for each component, a tokenizer and configs."""

    file: ClassVar[str]

    @classmethod
    def runs(cls, folder: Path) -> bool:
        return any((folder / name / cls.file).is_file() for name in DENOISERS)

    @classmethod
    def open(cls, folder: Path, threads: int | None) -> GraphComponents:
        return GraphComponents(folder, cls, threads)

    @staticmethod
    @abstractmethod
    def load(path: Path, threads: int | None) -> Component:
        """One component from its file. Raises whatever the library raises."""

    @classmethod
    def batch(cls, folder: Path) -> int:
        """How many images with guidance the components of ``folder`` make at a time."""
        return BATCH


class OnnxRuntime(GraphRuntime):
    """ONNX graphs in ONNX Runtime, on a GPU where its build has a CUDA provider."""

    name: ClassVar[str] = "ort"
    summary: ClassVar[str] = "ONNX Runtime"
    folders: ClassVar[tuple[str, ...]] = ("onnx",)
    extra: ClassVar[str] = "onnx"
    portable: ClassVar[bool] = True
    file: ClassVar[str] = MODEL

    @staticmethod
    def load(path: Path, threads: int | None) -> Component:
        return OnnxSession(path, threads or 0, gpu=True)


class OpenVino(GraphRuntime):
    """IR in OpenVINO, on the CPU and in float32."""

    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "OpenVINO"
    folders: ClassVar[tuple[str, ...]] = ("openvino",)
    extra: ClassVar[str] = "openvino"
    portable: ClassVar[bool] = True
    file: ClassVar[str] = "openvino_model.xml"
    # Without this hint, CPUs that support bfloat16 compute in it: off by 2e-2 on glyphs and by 9e-2 in a random UNet of
    # Stable Diffusion's size, whatever the weights.
    EXACT: ClassVar[dict[str, str]] = {"INFERENCE_PRECISION_HINT": "f32"}

    @staticmethod
    def load(path: Path, threads: int | None) -> Component:
        import openvino

        options: dict[str, Any] = {**OpenVino.EXACT, **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
        model = openvino.Core().compile_model(str(path), "CPU", options)

        def run(inputs: Mapping[str, Array]) -> Arrays:
            # An output has the graph's name for it and may have others.
            return {name: np.array(value) for port, value in model(dict(inputs)).items() for name in port.get_names()}

        return Function(run)


class EngineRuntime(GraphRuntime):
    """Engines on this machine's GPU."""

    file: ClassVar[str] = engines.ENGINE

    @classmethod
    def runs(cls, folder: Path) -> bool:
        return super().runs(folder) and engines.TARGETS[engines.read_record(folder)["builder"]["name"]] == cls.name

    @staticmethod
    def load(path: Path, threads: int | None) -> Component:
        return engines.Session(path)

    @classmethod
    def batch(cls, folder: Path) -> int:
        """As many as every engine takes; with guidance, the denoiser runs each image twice, except that of FLUX."""
        components = engines.read_record(folder)["components"]
        profiles = {name: component["profile"] for name, component in components.items()}
        largest = {
            name: min(shapes["max"][0] for key, shapes in profile.items() if shapes["max"] and key not in PLACES)
            for name, profile in profiles.items()
        }
        limits = (
            int(size) // (2 if name in DENOISERS and not profiles[name].keys() & set(PLACES) else 1)
            for name, size in largest.items()
        )
        return max(1, min(BATCH, *limits))


class TensorRtRtx(EngineRuntime):
    """Engines of TensorRT-RTX."""

    name: ClassVar[str] = "trt-rtx"
    summary: ClassVar[str] = "TensorRT-RTX, on an NVIDIA GPU"
    folders: ClassVar[tuple[str, ...]] = ("trt-rtx",)
    extra: ClassVar[str] = "trt-rtx"


class TensorRt(EngineRuntime):
    """Engines of TensorRT."""

    name: ClassVar[str] = "trt"
    summary: ClassVar[str] = "TensorRT, on the GPU that the engines were built for"
    folders: ClassVar[tuple[str, ...]] = ("trt",)
    extra: ClassVar[str] = "trt"


class GraphComponents:
    """The components of a folder of graphs or engines, and its tokenizer."""

    def __init__(self, root: Path, runtime: type[GraphRuntime], threads: int | None = None) -> None:
        self.root, self.runtime, self.threads = root, runtime, threads
        self._tokenizers: dict[str, PromptTokenizer] = {}

    @cached_property
    def batch(self) -> int:
        return self.runtime.batch(self.root)

    def tokenizer(self, encoder: str = "text_encoder") -> PromptTokenizer:
        """The tokenizer of a text encoder, read once. Raises ErasecError where it lacks a new token that the folder
        carries."""
        if encoder not in self._tokenizers:
            self._tokenizers[encoder] = self._read_tokenizer(encoder)
        return self._tokenizers[encoder]

    def _read_tokenizer(self, encoder: str) -> PromptTokenizer:
        config, folder = read_config(self.root, encoder), self.root / encoder.replace("text_encoder", "tokenizer")
        if T5 in (config.get("architectures") or ()):
            return load_t5_tokenizer(folder, T5_TOKENS["sd3" if encoder == "text_encoder_3" else "flux"])
        tokenizer = load_tokenizer(folder, config.get("max_position_embeddings", 77))
        for token in carried_text(self.root)[1] if encoder == "text_encoder" else ():
            if not tokenizer.knows(token):
                raise ErasecError(
                    f"the tokenizer does not know the new token {token!r}",
                    where=str(self.root / "tokenizer"),
                    why="the text encoder has a row for this token, and no prompt would use it",
                    fix="build it again",
                )
        return tokenizer

    def ids(self, texts: Sequence[str], encoder: str = "text_encoder") -> Array:
        tokenizer = self.tokenizer(encoder)
        ids, rows = tokenizer.ids(texts), read_config(self.root, encoder)["vocab_size"]
        rows += len(carried_text(self.root)[1]) if encoder == "text_encoder" else 0
        check_rows(ids.ravel().tolist(), rows, tokenizer.tokenizer.id_to_token, self.root)
        return ids

    def text_read(self, text: str, encoder: str = "text_encoder") -> str:
        return self.tokenizer(encoder).text_read(text)

    def open(self, name: str) -> Component:
        path = self.root / name / self.runtime.file
        if not path.is_file():
            raise ErasecError(
                f"the bundle has no {name}/{path.name}",
                why="the file is missing",
                where=str(self.root),
                fix="build the folder again, with this component",
            )
        try:
            return self.runtime.load(path, self.threads)
        except ErasecError:
            raise
        except ImportError as error:
            raise MissingTool(
                f"the backend {self.runtime.name} needs {error.name}",
                why="not installed",
                fix=f'pip install "erasec[{self.runtime.extra}]"',
            ) from error
        except Exception as error:  # the libraries' own errors have no common class
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ErasecError(
                f"{name}/{path.name} cannot be loaded", why=reason, where=str(path), fix="fetch or build it again"
            ) from error


class Torch(Runtime):
    """A diffusers folder in torch, with the memories, tokens and negative prompt that it carries."""

    name: ClassVar[str] = "torch"
    summary: ClassVar[str] = "torch and diffusers"
    folders: ClassVar[tuple[str, ...]] = ("bundle", "hf")

    @classmethod
    def runs(cls, folder: Path) -> bool:
        weights = (path for name in DENOISERS for path in (folder / name).glob("*.safetensors*"))
        return (folder / "model_index.json").is_file() and any(weights)

    @classmethod
    def open(cls, folder: Path, threads: int | None) -> TorchComponents:
        return TorchComponents(folder, threads)


class TorchComponents:
    """The components of a diffusers folder in torch."""

    batch = BATCH

    def __init__(self, root: Path, threads: int | None = None) -> None:
        self.root, self.threads = root, threads

    @cached_property
    def pipeline(self) -> Any:
        """``erasec.pipeline`` of the folder in float32, on a GPU where there is one."""
        import torch

        from erasec.attention.pipeline import pipeline

        if self.threads:
            torch.set_num_threads(self.threads)
        loaded = pipeline(self.root, dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
        return loaded.to("cuda" if torch.cuda.is_available() else "cpu")

    def ids(self, texts: Sequence[str], encoder: str = "text_encoder") -> Array:
        tokenizer, length = self._tokenizer(encoder), self._length(encoder)
        encoded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
        ids: Array = encoded.input_ids
        embedding = getattr(self.pipeline, encoder).get_input_embeddings()
        check_rows(ids.ravel().tolist(), embedding.num_embeddings, tokenizer.convert_ids_to_tokens, self.root)
        return ids

    def text_read(self, text: str, encoder: str = "text_encoder") -> str:
        from erasec.model.text_encoders import fitting_part

        return fitting_part(self._tokenizer(encoder), text, self._length(encoder))

    def _tokenizer(self, encoder: str) -> Any:
        return getattr(self.pipeline, encoder.replace("text_encoder", "tokenizer"))

    def _length(self, encoder: str) -> int:
        """The number of tokens that a text encoder reads."""
        if type(getattr(self.pipeline, encoder)).__name__ == T5:
            return T5_TOKENS["sd3" if encoder == "text_encoder_3" else "flux"]
        return int(self._tokenizer(encoder).model_max_length)

    @cached_property
    def calls(self) -> dict[str, Any]:
        """The components by the names of their graphs: functions that take and return what the graphs do."""
        import torch

        from erasec.graphs.export import graph_function

        listed = graphs(Folder(self.root))
        return {
            graph.name: (graph, graph_function(getattr(self.pipeline, graph.component), graph, torch.float32))
            for graph in listed
        }

    def open(self, name: str) -> Component:
        import torch

        graph, call = self.calls[name]

        def run(inputs: Mapping[str, Array]) -> Arrays:
            with torch.no_grad():
                outputs = call(*(torch.from_numpy(inputs[key]).to(self.pipeline.device) for key in graph.inputs))
            values = outputs if isinstance(outputs, tuple) else (outputs,)
            return {key: value.cpu().numpy() for key, value in zip(graph.outputs, values, strict=True)}

        return Function(run)
