"""Every target hands its readers the settings of the model's folder, where these are unusual."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from random_models import TEXT_TO_IMAGE

from erasec.base import Context
from erasec.checkpoint.folder import Folder
from erasec.commands.apply import apply
from erasec.graphs.link import write_onnx
from erasec.graphs.session import OnnxSession
from erasec.model import edit_file, loading
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept
from erasec.runtime.backends import Component, GraphComponents, OnnxRuntime, with_vectors
from erasec.runtime.bundle import Bundle, open_bundle
from erasec.targets import ort, ov, triton
from erasec.targets.lora import Lora
from erasec.targets.ort import Onnx
from erasec.targets.ov import OpenVino
from erasec.targets.triton import Triton
from erasec.targets.trt import Trt
from erasec.targets.trt_rtx import TrtRtx
from erasec.tensorrt import base as engine_target
from erasec.tensorrt import engines

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

STAR = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))
SETTINGS: dict[str, dict[str, Any]] = {
    "vae": {"scaling_factor": 0.13025, "shift_factor": 0.1},
    "text_encoder": {"hidden_act": "gelu", "num_attention_heads": 2},
    "unet": {"attention_head_dim": 8},
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.02,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "set_alpha_to_one": False,
        "rescale_betas_zero_snr": False,
    },
}
PROMPT = "a photo of a red star"


def changed(folder: Path, out: Path, settings: dict[str, dict[str, Any]]) -> Path:
    """A copy of a folder with other settings in its configs."""
    shutil.copytree(folder, out)
    for component, own in settings.items():
        file = out / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    index = json.loads((out / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", settings["scheduler"]["_class_name"]]
    (out / "model_index.json").write_text(json.dumps(index))
    return out


@pytest.fixture(scope="module", autouse=True)
def _unchecked() -> Iterator[None]:
    """The targets' own checks compare weights and outputs, which other tests do, and take most of the time."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (ort, ov, triton):
            for name in ("compare_weights", "compare_outputs"):
                patched.setattr(module, name, lambda *_, **__: ())
        yield


@pytest.fixture(scope="module")
def unusual(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(random_folder, tmp_path_factory.mktemp("unusual") / "model", SETTINGS)


@pytest.fixture(scope="module")
def wanted(unusual: Path) -> Any:
    """The picture that diffusers makes of the folder."""
    return diffusers_picture(unusual)


@pytest.fixture(scope="module")
def linked(unusual: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("linked")
    Onnx().export(Folder(unusual), out / "onnx", Context())
    return out / "onnx"


def diffusers_picture(folder: Path) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(PROMPT, num_inference_steps=4, generator=torch.Generator().manual_seed(5), output_type="np")
    return np.rint(made.images[0] * 255)


class Server(GraphComponents):
    """Runs the models of a repository, beside the folder for its clients."""

    def open(self, name: str) -> Component:
        return with_vectors(OnnxSession(self.root.parent / "models" / name / "1" / "model.onnx", 1))


def difference(bundle: Bundle, wanted: Any) -> float:
    """The largest difference of a pixel between a picture of ``erasec run`` and one of diffusers."""
    return float(np.abs(bundle.generate([PROMPT], [5], steps=4)[0].astype(float) - wanted).max())


def faults(folder: Path, unusual: Path, names: tuple[str, ...] = (*TEXT_TO_IMAGE, "scheduler")) -> list[str]:
    """The settings that the readers of graphs get otherwise from ``folder`` than the model has them."""
    wrong = []
    for name in names:
        component = "vae" if name.startswith("vae") else name
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        own, read = (json.loads((root / file).read_text()) for root in (unusual / component, folder / name))
        wrong += [f"{name} {key}" for key in own if read.get(key) != own[key]]
    for name in ("tokenizer/vocab.json", "tokenizer/tokenizer_config.json", "model_index.json"):
        wrong += [name] if (folder / name).read_bytes() != (unusual / name).read_bytes() else []
    return wrong


@pytest.mark.parametrize("setting", ["vae", "text_encoder", "unet", "scheduler"])
def test_each_of_these_settings_changes_the_picture(
    random_folder: Path, unusual: Path, wanted: Any, tmp_path: Path, setting: str
) -> None:
    usual = json.loads((random_folder / "scheduler" / "scheduler_config.json").read_text())
    settings = {**SETTINGS, setting: usual if setting == "scheduler" else {}}
    other = diffusers_picture(changed(random_folder, tmp_path / "other", settings))
    assert np.abs(other - wanted).max() > 4


def test_onnx(linked: Path, unusual: Path, wanted: Any) -> None:
    assert faults(linked, unusual, (*TEXT_TO_IMAGE, "vae_encoder", "scheduler")) == []
    assert difference(open_bundle(linked, "ort"), wanted) <= 2
    file = linked / "vae_decoder" / "config.json"
    content = file.read_text()
    file.write_text(json.dumps({**json.loads(content), "scaling_factor": 0.18215}))
    assert (
        faults(linked, unusual) == ["vae_decoder scaling_factor"] and difference(open_bundle(linked, "ort"), wanted) > 4
    )
    file.write_text(content)


def test_openvino(unusual: Path, wanted: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    OpenVino().export(Folder(unusual), tmp_path, Context())
    assert faults(tmp_path, unusual) == []
    assert difference(open_bundle(tmp_path, "openvino"), wanted) <= 2


def test_triton(unusual: Path, wanted: Any, tmp_path: Path) -> None:
    Triton().export(Folder(unusual), tmp_path, Context())
    assert faults(tmp_path / "client", unusual) == []
    assert difference(Bundle(tmp_path / "client", "triton", Server(tmp_path / "client", OnnxRuntime)), wanted) <= 2


@pytest.mark.parametrize("target", [Trt(), TrtRtx()], ids=["trt", "trt-rtx"])
def test_engines(target: Trt | TrtRtx, unusual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library, which builds the engines, has no part in the configs: it is replaced."""
    monkeypatch.setattr(type(target), "check", lambda self: None)
    monkeypatch.setattr(type(target), "engine", lambda self, graph, file, profile: ({}, "1"))
    monkeypatch.setattr(engines, "write_record", lambda *_: None)
    monkeypatch.setattr(engine_target, "engine_checks", lambda *_: ())
    target.export(Folder(unusual), tmp_path, Context())
    assert faults(tmp_path, unusual) == []


def test_lora_and_edit_leave_the_settings_of_the_base(unusual: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = loading.load(str(unusual))
    model = model.with_edit(Uce().solve(model, STAR, Context()))
    edit_file.write_edits(tmp_path / "star.edit.safetensors", model.edits, model.base_record())
    apply(tmp_path / "star.edit.safetensors", str(unusual), tmp_path / "applied")
    for name in Folder(unusual).files():
        same = (tmp_path / "applied" / name).read_bytes() == (unusual / name).read_bytes()
        assert same == (name.as_posix() != "unet/diffusion_pytorch_model.safetensors")
    (tmp_path / "lora").mkdir()
    Lora().export(model, tmp_path / "lora", Context())
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(unusual, torch_dtype=torch.float32)
    scheduler, unet = dict(pipe.scheduler.config), dict(pipe.unet.config)
    before = output(pipe.unet)
    pipe.load_lora_weights(tmp_path / "lora")
    assert (dict(pipe.scheduler.config), dict(pipe.unet.config)) == (scheduler, unet)
    applied = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "applied", torch_dtype=torch.float32)
    after = output(applied.unet)
    assert (output(pipe.unet) - after).norm() < 0.02 * (after - before).norm()


def output(unet: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(1, unet.config.in_channels, 8, 8, generator=rng)
    states = torch.randn(1, 5, unet.config.cross_attention_dim, generator=rng)
    with torch.no_grad():
        return unet(latents, 500, states).sample  # type: ignore[no-any-return]


@pytest.mark.parametrize("target", [Onnx(), OpenVino(), Triton(), Trt(), TrtRtx()], ids=lambda target: target.name)
def test_a_schedule_that_erasec_run_has_not_is_a_note_in_the_plan(
    target: Any, random_folder: Path, tmp_path: Path
) -> None:
    assert target.notes(loading.load(str(random_folder))) == ()
    rescaled = {**SETTINGS["scheduler"], "rescale_betas_zero_snr": True}
    folder = changed(random_folder, tmp_path / "model", {"scheduler": rescaled})
    (note,) = target.notes(loading.load(str(folder)))
    assert note.startswith(f"{target.name}: ") and "rescale_betas_zero_snr" in note
    write_onnx(Folder(folder), tmp_path / "onnx", names=())
    assert json.loads((tmp_path / "onnx/scheduler/scheduler_config.json").read_text())["rescale_betas_zero_snr"]
