"""Stable Diffusion XL, 3 and FLUX: graphs, and pictures that equal those of diffusers' pipelines in every runtime."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import joint_models
import numpy as np
import pytest
import random_models
import torch

from erasec import pipeline
from erasec.base import Context
from erasec.checkpoint.folder import Folder
from erasec.commands.check import small_inputs
from erasec.commands.run import cut_notes
from erasec.errors import ErasecError
from erasec.graphs.conditioning import pack, unpack
from erasec.graphs.link import write_onnx
from erasec.graphs.parity import compare_outputs
from erasec.graphs.signature import LAYOUTS, configs, graphs
from erasec.registry import load_target
from erasec.runtime.bundle import GUIDANCE, open_bundle
from erasec.runtime.schedulers import FLOW, make_scheduler
from erasec.runtime.t5_tokenizer import load_t5_tokenizer
from erasec.targets.trt_rtx import TrtRtx

PROMPTS = ["a photo of a navy star", "a drawing of a heart"]
SIDES = {"sdxl": 64, "sd3": 8, "sd3-no-t5": 8, "flux": 16}
TARGETS = {"sdxl": ("onnx",), "sd3": ("onnx", "openvino"), "sd3-no-t5": ("onnx",), "flux": ("onnx", "openvino")}
STEPS, SEEDS = 3, (1, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with what each target wrote, by family; hf is the model itself."""
    root = tmp_path_factory.mktemp("families")
    for family, targets in TARGETS.items():
        model = root / family / "hf"
        if family == "sdxl":
            random_models.random_folder(model, family)
        else:
            joint_models.pipeline(family).save_pretrained(model)
        for target in targets:
            (root / family / target).mkdir()
            artifact = load_target(target)().export(Folder(model), root / family / target, Context())
            assert [check.name for check in artifact.checks if not check.passed] == []
    return {family: root / family for family in TARGETS}


def painted(family: str, folder: Path, guidance: float, **options: Any) -> np.ndarray:
    """The pictures of diffusers' own pipeline, with its own scheduler and text encoders."""
    pipe = pipeline(folder / "hf")
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    size = {"height": SIDES[family], "width": SIDES[family]}
    images = pipe(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
        **size,
        **options,
    ).images
    pictures: np.ndarray = np.rint(images * 255)
    return pictures


@pytest.mark.parametrize("family", [*TARGETS])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_every_runtime_paints_what_diffusers_paints(folders: dict[str, Path], family: str, guidance: float) -> None:
    wanted = painted(family, folders[family], guidance)
    assert np.abs(wanted - wanted[::-1]).max() > 20  # other prompts and seeds are far away
    side = SIDES[family]
    for target, backend in (("hf", "torch"), ("onnx", "ort"), ("openvino", "openvino")):
        if target == "hf" or target in TARGETS[family]:
            bundle = open_bundle(folders[family] / target, backend)
            pictures = bundle.generate(PROMPTS, SEEDS, STEPS, guidance, height=side, width=side)
            assert np.abs(pictures - wanted).max() <= 2, (target, guidance)


def test_the_default_guidance_is_that_of_the_pipeline() -> None:
    import diffusers

    kinds = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
    theirs = [inspect.signature(getattr(diffusers, kind).__call__).parameters["guidance_scale"] for kind in kinds]
    assert dict(zip(LAYOUTS, (value.default for value in theirs), strict=True)) == GUIDANCE


def test_guidance_changes_the_pictures(folders: dict[str, Path]) -> None:
    for family, side in SIDES.items():
        bundle = open_bundle(folders[family] / "onnx")
        low, high = (
            bundle.generate(PROMPTS, SEEDS, STEPS, guidance, height=side, width=side).astype(int)
            for guidance in (1.5, 6.0)
        )
        assert np.abs(low - high).max() > 5, family


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_negative_prompt_is_encoded(folders: dict[str, Path], family: str) -> None:
    negative, side = "a square", SIDES[family]
    wanted = painted(family, folders[family], 4.0, negative_prompt=[negative] * 2)
    bundle = open_bundle(folders[family] / "onnx")
    pictures = bundle.generate(PROMPTS, SEEDS, STEPS, 4.0, negative, height=side, width=side)
    assert np.abs(pictures - wanted).max() <= 2
    # The empty prompt, if given, is text; left out, Stable Diffusion XL reads zeros.
    left_out, empty = (
        bundle.generate(PROMPTS, SEEDS, STEPS, 4.0, text, height=side, width=side).astype(int) for text in (None, "")
    )
    assert (np.abs(left_out - empty).max() > 0) == (family == "sdxl")


def test_what_flux_does_not_take_is_refused(folders: dict[str, Path]) -> None:
    bundle = open_bundle(folders["flux"] / "onnx")
    with pytest.raises(ErasecError, match="FLUX takes no negative prompt"):
        bundle.generate(PROMPTS, SEEDS, STEPS, 3.0, "a square", height=16, width=16)
    with pytest.raises(ErasecError, match="the scheduler EulerDiscreteScheduler cannot sample this model"):
        bundle.generate(PROMPTS, SEEDS, STEPS, 3.0, height=16, width=16, scheduler="euler")
    with pytest.raises(ErasecError, match="the width cannot be 17"):
        bundle.generate(PROMPTS, SEEDS, STEPS, 3.0, height=16, width=17)


def test_schedulers_of_the_other_kind_are_refused() -> None:
    for kind, flow in (("FlowMatchHeunDiscreteScheduler", True), ("DDIMScheduler", True), (FLOW, False)):
        with pytest.raises(ErasecError, match="cannot sample this model") as caught:
            make_scheduler({"_class_name": kind}, 4, flow=flow)
        assert "diffusers" in caught.value.fix
    with pytest.raises(ErasecError, match="cannot sample this model"):  # whatever scheduler the folder has
        make_scheduler({"_class_name": "FlowMatchHeunDiscreteScheduler"}, 4, "ddim", flow=True)


def test_sizes_that_a_transformer_has_no_patches_or_positions_for(folders: dict[str, Path]) -> None:
    for family, height, words in (("flux", 17, "multiple of 2"), ("sd3", 18, "up to 16"), ("sd3-no-t5", 9, "of 2")):
        for target in ("hf", "onnx"):
            bundle = open_bundle(folders[family] / target, "torch" if target == "hf" else "ort")
            with pytest.raises(ErasecError, match=f"the height cannot be {height}") as caught:
                bundle.generate(PROMPTS, SEEDS, STEPS, 3.0, height=height, width=8)
            assert words in caught.value.why


def test_each_text_encoder_has_its_own_room(folders: dict[str, Path]) -> None:
    long = "star " * 120
    for target, backend in (("hf", "torch"), ("onnx", "ort")):
        bundle = open_bundle(folders["flux"] / target, backend)
        (sentence,) = cut_notes(bundle, long, None)
        assert "text_encoder reads it up to" in sentence and "text_encoder_2" not in sentence
        assert bundle.text_read(long)["text_encoder_2"] == long
        assert len(bundle.text_read("star " * 600)["text_encoder_2"]) < 5 * 600


def test_sums_of_t5_that_exceed_float16_stay_finite(tmp_path: Path) -> None:
    pipe = joint_models.pipeline("flux")
    for block in pipe.text_encoder_2.encoder.block:
        block.layer[-1].DenseReluDense.wo.weight.data *= 1e6
    ids = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    assert pipe.text_encoder_2(ids, output_hidden_states=True).hidden_states[1].abs().max() > 65504
    pipe.save_pretrained(tmp_path / "hf")
    checkpoint = Folder(tmp_path / "hf")
    write_onnx(checkpoint, tmp_path / "onnx", "fp16", ("text_encoder_2",))
    (check,) = compare_outputs(checkpoint, tmp_path / "onnx")
    assert check.passed, check.how


@pytest.mark.parametrize("family", ["sd3-no-t5", "flux"])
def test_engines_take_the_shapes_that_run_gives_them(folders: dict[str, Path], family: str) -> None:
    profile = TrtRtx(batch="1:1:4", height="16", width="16").profiles(Folder(folders[family] / "hf"))["transformer"]
    rows = 4 if family == "flux" else 8  # guidance doubles the pictures of all but FLUX
    assert [shape[0] for shape in profile["hidden_states"]] == [1, rows // 4, rows]
    tokens = 512 if family == "flux" else 77 + 256
    assert {shape[1] for shape in profile["encoder_hidden_states"]} == {tokens}
    if family == "flux":
        assert set(profile["img_ids"]) == {(profile["hidden_states"][0][1], 3)}


@pytest.mark.parametrize("family", [*TARGETS])
def test_check_has_inputs_for_every_graph(folders: dict[str, Path], family: str) -> None:
    folder = folders[family] / "onnx"
    bundle = open_bundle(folder)
    for graph in graphs(Folder(folder)):
        inputs = small_inputs("onnx", folder, graph.name)
        assert set(inputs) == set(graph.inputs)
        outputs = bundle.run(graph.name, inputs)
        assert all(np.isfinite(value).all() for value in outputs.values())
    # The graphs' config of a UNet has in addition what old configs lack.
    model, ours = configs(Folder(folders[family] / "hf")), configs(Folder(folder))
    assert {name: {**config} | {**model[name]} for name, config in ours.items()} == ours


def test_patches_are_packed_as_flux_reads_them() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    theirs = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    ours = pack(latents.numpy())
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(unpack(ours, 6, 8), latents)


@pytest.mark.parametrize(
    ("options", "patches"),
    [
        ({"shift": 3.0}, 0),  # Stable Diffusion 3
        ({"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}, 1024),  # FLUX.1-dev
        ({"shift": 1.0}, 256),  # FLUX.1-schnell
    ],
)
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_the_flow_scheduler_takes_the_steps_of_diffusers(options: dict[str, Any], patches: int, steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    theirs = FlowMatchEulerDiscreteScheduler(**options)
    config = json.loads(theirs.to_json_string())
    if patches:
        theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(patches))
    else:
        theirs.set_timesteps(steps)
    ours = make_scheduler(config, steps, patches=patches, flow=True)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps, rtol=1e-6)
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((1, 4, 4, 4), np.float32)
    latents = torch.from_numpy(sample)
    for number, timestep in enumerate(theirs.timesteps):
        output = rng.standard_normal(sample.shape, np.float32)
        sample = ours.step(number, output, ours.scaled(number, sample))
        latents = theirs.step(torch.from_numpy(output), timestep, latents).prev_sample
    np.testing.assert_allclose(sample, latents, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dynamic_shifting": True}, "depends on the size of the picture"),
        ({"time_shift_type": "linear"}, "time_shift_type = 'linear'"),
        ({"shift_terminal": 0.1}, "shift_terminal = 0.1"),
    ],
)
def test_flow_schedules_that_are_not_supported(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ErasecError, match=words):
        make_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", **changes}, 4, flow=True)


def test_the_tokenizer_of_t5_gives_the_ids_of_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    folder = folders["flux"] / "hf" / "tokenizer_2"
    ours, theirs = load_t5_tokenizer(folder, 16), T5Tokenizer.from_pretrained(folder)
    texts = ["", "a star", "A photo of a navy  star.", "zebra " * 30]
    ids = theirs(texts, padding="max_length", max_length=16, truncation=True).input_ids
    np.testing.assert_array_equal(ours.ids(texts), ids)
    assert ours.text_read("a star") == "a star"
    assert texts[3].startswith(ours.text_read(texts[3])) and len(ours.text_read(texts[3])) < 30
    with pytest.raises(ErasecError, match="it has no tokenizer"):
        load_t5_tokenizer(tmp_path, 16)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ErasecError, match="the tokenizer"):
        load_t5_tokenizer(tmp_path, 16)
