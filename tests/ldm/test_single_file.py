"""Single files seen as folders: same tensors, text states and pipelines, and nothing written before it is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from erasec.base import Context
from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_header, read_tensor
from erasec.commands import apply as applies
from erasec.commands import plan
from erasec.errors import ErasecError
from erasec.ldm import skeleton as layouts
from erasec.ldm.single_file import SingleFile
from erasec.ldm.tensor_names import canonical
from erasec.model import edit as edits
from erasec.model import view as models
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import Recipe
from erasec.targets.ldm import Ldm

FAMILIES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random folder, and the single file written of it."""
    root = tmp_path_factory.mktemp(request.param)
    layouts.random_folder(root / "folder", request.param, "tiny", dtype="float16")
    Ldm().export(Folder(root / "folder"), root, Context())
    return root / "folder", root / "model.safetensors"


def test_every_tensor_is_the_folders(pair: tuple[Path, Path]) -> None:
    folder, single = models.load(str(pair[0])), models.load(str(pair[1]))
    assert single.family == folder.family
    for component in folder.family.components:
        wanted = {canonical(component, key): entry for key, entry in folder.entries(component).items()}
        found = single.entries(component)
        assert set(wanted) - set(found) <= {"text_model.embeddings.position_ids"}
        assert not set(found) - set(wanted)
        assert all(torch.equal(read_tensor(found[key]), read_tensor(wanted[key])) for key in found)


def test_it_becomes_a_folder_that_pipelines_load(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Configs and tokenizers come from the family and the shapes: equal to those of the folder it came from."""
    single = models.load(str(pair[1]))
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
    folder, single = models.load(str(pair[0])), models.load(str(pair[1]))
    prompts = ["", "a photo of a garbage truck"]
    assert torch.equal(single.encode(prompts).states, folder.encode(prompts).states)


def test_small_files_are_not_written_before_they_are_asked_for(pair: tuple[Path, Path]) -> None:
    source = SingleFile(pair[1])
    source.entries("unet")
    source.placed({"unet": {"conv_in.weight": lambda: torch.zeros(1)}})
    assert "root" not in vars(source)
    assert source.config("unet")["_class_name"] == "UNet2DConditionModel"
    assert (source.root / "tokenizer" / "vocab.json").is_file()


def test_what_is_joined_or_reshaped_in_the_file_is_not_replaced_there(pair: tuple[Path, Path]) -> None:
    source = SingleFile(pair[1])
    attention = "decoder.mid_block.attentions.0.to_q.weight"
    with pytest.raises(ErasecError, match="cannot be replaced") as caught:
        source.placed({"vae": {attention: lambda: torch.zeros(1)}})
    assert "first_stage_model" in caught.value.why


def test_a_file_without_a_part_says_what_it_has(pair: tuple[Path, Path], tmp_path: Path) -> None:
    kept = {k: read_tensor(e) for k, e in read_header(pair[1])[0].items() if not k.startswith("first_stage_model.")}
    checkpoint.save(tmp_path / "half.safetensors", kept)
    with pytest.raises(ErasecError, match="has no vae") as caught:
        models.load(str(tmp_path / "half.safetensors"))
    assert caught.value.why


def test_a_build_does_not_replace_the_folder_that_its_model_lies_in(pair: tuple[Path, Path]) -> None:
    asked = Recipe(model=str(pair[1]), erase=("golf ball",))
    with pytest.raises(ErasecError, match="lie in each other"):
        plan.make(asked, pair[1].parent / "model.safetensors" / "out")
    with pytest.raises(ErasecError, match="not empty"):
        plan.make(asked, pair[1].parent)


def test_a_plan_knows_its_size_and_sites(pair: tuple[Path, Path], tmp_path: Path) -> None:
    told = plan.describe(plan.make(Recipe(model=str(pair[1]), erase=("golf ball",)), tmp_path / "out", pin=False))
    assert told["targets"][0]["bytes"] == pair[1].stat().st_size
    assert len(told["passes"][0]["sites"]) in (32, 34)


def saved(file: Path, out: Path, more: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> SingleFile:
    """The tensors of a file with more of them, and other metadata."""
    tensors = {key: read_tensor(entry) for key, entry in read_header(file)[0].items()}
    checkpoint.save(out, {**tensors, **more}, metadata)
    return SingleFile(out)


def settings(source: Folder) -> tuple[object, object]:
    config = source.config("scheduler", "scheduler_config.json")
    return config["prediction_type"], config.get("rescale_betas_zero_snr", False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny single files of two families."""
    root = tmp_path_factory.mktemp("files")
    for family in ("sd2", "sdxl"):
        layouts.random_folder(root / f"{family}-folder", family, "tiny", dtype="float16")
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
    told = {"modelspec.prediction_type": "epsilon"}
    steps = {"global_step": torch.tensor(875000)}
    other = {"global_step": torch.tensor([110000])}
    cases = [({}, told, "epsilon", False), (steps, None, "epsilon", False), ({}, None, "v_prediction", True),
             (other, None, "v_prediction", True)]  # fmt: skip
    for number, (more, metadata, prediction, noted) in enumerate(cases):
        file = tmp_path / f"{number}.safetensors"
        saved(files["sd2"], file, more, metadata)
        made = plan.make(Recipe(model=str(file), erase=("star",)), tmp_path / "out", pin=False)
        assert settings(made.model.source)[0] == prediction
        assert any("does not say what its UNet predicts" in note for note in plan.notes(made)) == noted


def test_apply_says_what_was_assumed_where_it_writes_a_folder(files: dict[str, Path], tmp_path: Path) -> None:
    saved(files["sd2"], tmp_path / "silent.safetensors", {})
    model = models.load(str(tmp_path / "silent.safetensors"))
    edited = model.with_edit(Uce().solve(model, Concept(name="star", erase=("star",), anchor="ball"), Context()))
    file = tmp_path / "star.edit.safetensors"
    edits.write(file, edited.edits, edited.about())
    assert "v is assumed" in applies.apply(file, str(model.source.file), tmp_path / "out").notes[0]
    assert applies.apply(file, str(model.source.file), tmp_path / "out.safetensors").notes == ()
