"""Single files read as folders: the same tensors, text states and pipelines, and no file is written too early."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import random_models
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from erasec.base import Context
from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_header, read_tensor
from erasec.commands import plan
from erasec.commands.apply import apply
from erasec.errors import ErasecError
from erasec.ldm.single_file import SingleFile
from erasec.ldm.tensor_names import canonical
from erasec.model import edit_file, loading
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import Recipe
from erasec.targets.ldm import Ldm

FAMILIES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random folder, and the single file written of it."""
    root = tmp_path_factory.mktemp(request.param)
    random_models.random_folder(root / "folder", request.param, "tiny", dtype="float16")
    Ldm().export(Folder(root / "folder"), root, Context())
    return root / "folder", root / "model.safetensors"


def test_every_tensor_is_the_folders(pair: tuple[Path, Path]) -> None:
    folder, single = loading.load(str(pair[0])), loading.load(str(pair[1]))
    assert single.family == folder.family
    for component in folder.family.components:
        wanted = {canonical(component, key): entry for key, entry in folder.entries(component).items()}
        entries = single.entries(component)
        assert set(wanted) - set(entries) <= {"text_model.embeddings.position_ids"}
        assert not set(entries) - set(wanted)
        assert all(torch.equal(read_tensor(entries[key]), read_tensor(wanted[key])) for key in entries)


def test_the_folder_written_from_it_loads_in_pipelines(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Configs and tokenizers are derived from the family and the shapes, and equal those of the original folder."""
    single = loading.load(str(pair[1]))
    single.source.write(tmp_path / "out", {})
    for component in single.family.components:
        assert json.loads((tmp_path / "out" / component / "config.json").read_text()) == json.loads(
            (pair[0] / component / "config.json").read_text()
        )
    kind = FAMILIES[single.family.name]
    ours, wanted = (kind.from_pretrained(path, torch_dtype=torch.float16) for path in (tmp_path / "out", pair[0]))
    for component in single.family.components:
        states = (getattr(pipe, component).state_dict() for pipe in (ours, wanted))
        assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    assert ours.tokenizer("a garbage truck").input_ids == wanted.tokenizer("a garbage truck").input_ids


def test_text_states_are_the_folders(pair: tuple[Path, Path]) -> None:
    folder, single = loading.load(str(pair[0])), loading.load(str(pair[1]))
    prompts = ["", "a photo of a garbage truck"]
    assert torch.equal(single.encode(prompts).states, folder.encode(prompts).states)


def test_small_files_are_not_written_before_they_are_needed(pair: tuple[Path, Path]) -> None:
    source = SingleFile(pair[1])
    source.entries("unet")
    source.by_file({"unet": {"conv_in.weight": lambda: torch.zeros(1)}})
    assert "root" not in vars(source)
    assert source.config("unet")["_class_name"] == "UNet2DConditionModel"
    assert (source.root / "tokenizer" / "vocab.json").is_file()


def test_a_tensor_that_the_file_stores_in_another_form_takes_its_place_there(pair: tuple[Path, Path]) -> None:
    """A matrix that is a convolution in the file; test_joint_single_file has others. Other shapes are refused."""
    source = SingleFile(pair[1])
    attention = "decoder.mid_block.attentions.0.to_q.weight"
    new = torch.arange(64 * 64).reshape(64, 64).half()
    ((key, make),) = source.by_file({"vae": {attention: lambda: new}})[pair[1]].items()
    assert key == "first_stage_model.decoder.mid.attn_1.q.weight"
    assert torch.equal(make(), new[:, :, None, None])
    for wrong in (new[:1], new.float()):
        ((_, make),) = source.by_file({"vae": {attention: lambda wrong=wrong: wrong}})[pair[1]].items()
        with pytest.raises(ErasecError, match="a new part of first_stage_model"):
            make()


def test_a_file_without_a_component_is_an_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    without_vae = {
        k: read_tensor(e) for k, e in read_header(pair[1])[0].items() if not k.startswith("first_stage_model.")
    }
    checkpoint.save_tensors(tmp_path / "half.safetensors", without_vae)
    with pytest.raises(ErasecError, match="has no vae") as caught:
        loading.load(str(tmp_path / "half.safetensors"))
    assert caught.value.why


def test_a_build_does_not_replace_the_folder_that_its_model_lies_in(pair: tuple[Path, Path]) -> None:
    recipe = Recipe(model=str(pair[1]), erase=("golf ball",))
    with pytest.raises(ErasecError, match="lie in each other"):
        plan.make_plan(recipe, pair[1].parent / "model.safetensors" / "out")
    with pytest.raises(ErasecError, match="not empty"):
        plan.make_plan(recipe, pair[1].parent)


def test_a_plan_knows_its_size_and_sites(pair: tuple[Path, Path], tmp_path: Path) -> None:
    description = plan.describe(
        plan.make_plan(Recipe(model=str(pair[1]), erase=("golf ball",)), tmp_path / "out", pin=False)
    )
    assert description["targets"][0]["bytes"] == pair[1].stat().st_size
    assert len(description["passes"][0]["sites"]) in (32, 35)


def saved(file: Path, out: Path, more: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> SingleFile:
    """The single file with the tensors of ``file`` and ``more``, and other metadata."""
    tensors = {key: read_tensor(entry) for key, entry in read_header(file)[0].items()}
    checkpoint.save_tensors(out, {**tensors, **more}, metadata)
    return SingleFile(out)


def settings(source: Folder) -> tuple[object, object]:
    config = source.config("scheduler", "scheduler_config.json")
    return config["prediction_type"], config.get("rescale_betas_zero_snr", False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny single files of two families."""
    root = tmp_path_factory.mktemp("files")
    for family in ("sd2", "sdxl"):
        random_models.random_folder(root / f"{family}-folder", family, "tiny", dtype="float16")
        Ldm().export(Folder(root / f"{family}-folder"), root / family, Context())
    return {family: root / family / "model.safetensors" for family in ("sd2", "sdxl")}


def test_marks_of_an_sdxl_that_predicts_v_survive_the_round_trip(files: dict[str, Path], tmp_path: Path) -> None:
    empty = torch.zeros(0)
    cases = {"plain": {}, "v": {"v_pred": empty}, "both": {"v_pred": empty, "ztsnr": empty}}
    wanted = {"plain": ("epsilon", False), "v": ("v_prediction", False), "both": ("v_prediction", True)}
    for name, marks in cases.items():
        source = saved(files["sdxl"], tmp_path / f"{name}.safetensors", marks)
        assert settings(source) == wanted[name]
        assert source.notes == ()
        if not marks:
            continue
        source.write(tmp_path / name, {})
        Ldm().export(Folder(tmp_path / name), tmp_path / f"{name}-again", Context())
        again = read_header(tmp_path / f"{name}-again" / "model.safetensors")[0]
        assert {"v_pred", "ztsnr"} & again.keys() == marks.keys()


def test_an_sd2_that_does_not_say_what_it_predicts_is_noted(files: dict[str, Path], tmp_path: Path) -> None:
    stated = {"modelspec.prediction_type": "epsilon"}
    steps = {"global_step": torch.tensor(875000)}
    other = {"global_step": torch.tensor([110000])}
    cases = [
        ({}, stated, "epsilon", False),
        (steps, None, "epsilon", False),
        ({}, None, "v_prediction", True),
        (other, None, "v_prediction", True),
    ]
    for number, (more, metadata, prediction, noted) in enumerate(cases):
        file = tmp_path / f"{number}.safetensors"
        saved(files["sd2"], file, more, metadata)
        own_plan = plan.make_plan(Recipe(model=str(file), erase=("star",)), tmp_path / "out", pin=False)
        assert settings(own_plan.model.source)[0] == prediction
        assert any("does not say what its UNet predicts" in note for note in plan.notes(own_plan)) == noted


def test_apply_notes_the_assumed_prediction_if_it_writes_a_folder(files: dict[str, Path], tmp_path: Path) -> None:
    saved(files["sd2"], tmp_path / "silent.safetensors", {})
    model = loading.load(str(tmp_path / "silent.safetensors"))
    edited = model.with_edit(Uce().solve(model, Concept(name="star", erase=("star",), anchor="ball"), Context()))
    file = tmp_path / "star.edit.safetensors"
    edit_file.write_edits(file, edited.edits, edited.base_record())
    assert "v is assumed" in apply(file, str(model.source.file), tmp_path / "out").notes[0]
    assert apply(file, str(model.source.file), tmp_path / "out.safetensors").notes == ()
