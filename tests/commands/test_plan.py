"""Plans: a recipe becomes a build that can run, or an error that says why not; nothing is written."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_models import random_folder as random_layout

from erasec import registry
from erasec.base import Pass
from erasec.checkpoint import safetensors as checkpoint
from erasec.commands import output_paths, plan, settings
from erasec.errors import ErasecError, MissingTool
from erasec.keys.key_file import write_key
from erasec.model import loading
from erasec.model.memory import Secret
from erasec.model.sidecar import Extras, write_extras
from erasec.recipe import concept
from erasec.recipe.concept import Concept, find
from erasec.recipe.presets import Presets
from erasec.recipe.recipe import NamedOptions, Recipe, from_flags, from_toml, to_toml

NONE = settings.Defaults(Presets(), Presets())
EARLIER = {"schema": "erasec.report/1", "written": [{"path": "hf", "files": {}}]}


def recipe(model: Path, **changed: Any) -> Recipe:
    return from_flags(str(model), erase=["star"], device="cpu").model_copy(update=changed)


def listing(*folders: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for folder in folders for path in (folder, *folder.rglob("*")))


def test_a_plan_resolves_everything_and_writes_nothing(here: Path, random_folder: Path) -> None:
    before = listing(here, random_folder)
    resolved = plan.make_plan(recipe(random_folder))
    described = plan.describe(resolved)
    assert listing(here, random_folder) == before
    assert resolved.out == Path(f"{random_folder.name}-without-star")
    assert [step.name for step in resolved.passes] == ["uce"]
    assert resolved.recipe.digest == resolved.model.digest
    assert resolved.recipe.concepts[0].synonyms == resolved.concepts[0].synonyms
    assert resolved.recipe.passes[0].options["rows"] == "tail"
    assert described["time"]["seconds"] is None
    sites = described["passes"][0]["sites"]
    assert {(site["attn"], site["proj"]) for site in sites} == {("cross", "k"), ("cross", "v")}
    assert len(sites) == 14
    assert json.loads(json.dumps(described)) == described


def test_a_resolved_recipe_plans_the_same_build_again(here: Path, random_folder: Path) -> None:
    first = plan.make_plan(recipe(random_folder))
    again = plan.make_plan(from_toml(to_toml(first.recipe)))
    assert again == first


def test_a_recipe_does_not_depend_on_how_a_path_is_written(here: Path, random_folder: Path) -> None:
    (here / "models").mkdir()
    (here / "models" / "mine").symlink_to(random_folder)
    (here / "own").mkdir()
    (here / "own" / "pass.py").write_text("from erasec.passes.uce import Uce")
    (here / "own" / "x.prior").touch()

    def text(model: str, code: str, prior: str) -> str:
        use = NamedOptions(name=f"{code}:Uce", options={"prior": prior, "rows": "tail"})
        typed = recipe(random_folder).model_copy(update={"model": model, "passes": (use,)})
        return to_toml(plan.make_plan(typed, here / "out", pin=False).recipe)

    first = text(str(random_folder), "own/pass.py", "own/x.prior")
    assert first == text("models/../models/mine/", f"{here}/own/pass.py", "./own/x.prior")
    assert f'model = "{random_folder.resolve()}"' in first
    assert 'prior = "own/x.prior"' in first and 'name = "own/pass.py:Uce"' in first
    assert plan.make_plan(from_toml(first), here / "out", pin=False).model.local


def test_a_model_that_a_target_cannot_write_is_refused(here: Path) -> None:
    random_layout(here / "sd1", "sd1", "tiny")
    assert plan.make_plan(recipe(here / "sd1", targets=("hf", "ldm")), pin=False).targets[1].name == "ldm"
    file = here / "sd1" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(file)[0].items()}
    checkpoint.save_tensors(file, {**tensors, "adapter.weight": tensors["conv_in.bias"]})
    with pytest.raises(ErasecError, match=r"adapter\.weight has no place in a single file"):
        plan.make_plan(recipe(here / "sd1", targets=("hf", "ldm")), pin=False)
    assert plan.make_plan(recipe(here / "sd1"), pin=False).out == Path("sd1-without-star")


def test_another_model_than_the_recipes_is_refused(here: Path, random_folder: Path) -> None:
    with pytest.raises(ErasecError, match="is not the model that the recipe was made for"):
        plan.make_plan(recipe(random_folder, digest="0" * 64), pin=False)


def test_without_pin_the_weights_are_not_read(here: Path, random_folder: Path) -> None:
    resolved = plan.make_plan(recipe(random_folder), pin=False)
    assert resolved.recipe.digest == ""
    assert "digest" not in vars(resolved.model)  # where the cached property would be


def test_concepts_of_the_recipe_come_before_bundled_ones(here: Path, random_folder: Path) -> None:
    own = Concept(name="star", erase=("film star",))
    assert plan.make_plan(recipe(random_folder, concepts=(own,)), pin=False).concepts == (own,)
    assert plan.make_plan(recipe(random_folder), pin=False).concepts != (own,)


def test_a_bare_word_is_noted_and_a_bundled_concept_is_not(
    here: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here))  # it has no judge

    def noted(model: Path | str, *erase: str) -> list[str]:
        return plan.notes(plan.make_plan(recipe(model, erase=erase), pin=False))  # type: ignore[arg-type]

    (note,) = noted("glyphs", "strar", "ring")
    assert "'strar'" in note
    assert "did you mean 'star'?" in note
    taken, judges, unknown = noted(random_folder, "strar", "church")
    assert judges.startswith("church could be judged by ")
    assert "'church' is taken as the bundled concept church" in taken
    assert "'strar'" in unknown and "'star'" not in unknown


def test_the_words_of_a_small_world_are_phrases_for_other_models(here: Path, random_folder: Path) -> None:
    random_layout(here / "sd1", "sd1", "tiny")
    for model in (random_folder, here / "sd1"):
        elsewhere = plan.make_plan(recipe(model, erase=("ring",)), pin=False)
        assert elsewhere.concepts == elsewhere.recipe.concepts == (Concept(name="ring", erase=("ring",)),)
        assert elsewhere.concepts[0].templates == concept.TEMPLATES != find("ring", "glyphs").templates
        (note,) = plan.notes(elsewhere)
        assert "'ring' is taken as a phrase" in note and "only for models of glyphs" in note
    own = Concept(name="ring", erase=("ring", "hoop"))
    assert plan.make_plan(recipe(random_folder, erase=("ring",), concepts=(own,)), pin=False).concepts == (own,)
    there = plan.make_plan(recipe("glyphs", erase=("ring",)), pin=False)  # type: ignore[arg-type]
    assert there.concepts == (find("ring", "glyphs"),)
    assert plan.notes(there) == []


def test_goals_lead_to_what_stays(here: Path, random_folder: Path) -> None:
    both = plan.make_plan(recipe("glyphs", erase=("star", "circle")), pin=False)  # type: ignore[arg-type]
    assert [(item.name, item.anchor) for item in both.concepts] == [("star", "square"), ("circle", "square")]
    assert both.recipe.concepts == both.concepts
    described = plan.describe(both)
    assert [item["anchor"] for item in described["concepts"]] == ["square", "square"]
    assert described["notes"] == ["star: the anchor is 'square' instead of 'circle', which is erased too."]
    swap = plan.make_plan(recipe("glyphs", erase=("circle", "square")), pin=False)  # type: ignore[arg-type]
    assert {item.anchor for item in swap.concepts} == {"triangle"}


def test_a_goal_is_not_what_an_earlier_build_erased(here: Path, random_folder: Path) -> None:
    base = Path(shutil.copytree(random_folder, here / "earlier" / "hf"))
    tiger = Concept(name="tiger", erase=("tiger",), anchor="lion", label="big cat")
    lion = Concept(name="lion", erase=("lion",), anchor="tiger", fallback=("tiger cub", "dog"))
    report: dict[str, Any] = {"schema": "erasec.report/1", "written": [{"path": "hf"}]}

    def planned(**changed: Any) -> plan.Plan:
        (base.parent / "report.json").write_text(json.dumps(report | changed))
        return plan.make_plan(recipe(base, erase=("lion",), concepts=(lion,)), here / "out", pin=False)

    erased = tiger.model_dump(mode="json")
    for place in ({"concepts": [erased]}, {"concepts": [], "earlier": [erased]}):
        step = planned(**place)
        assert step.earlier == (tiger,)
        assert step.concepts[0].anchor == "dog"
        assert plan.notes(step) == [
            "lion: the anchor is 'dog' instead of 'tiger', which was erased from this model before."
        ]
    assert planned(concepts=[erased], written=[{"path": "onnx"}]).concepts == (lion,)
    assert planned(concepts=[]).concepts == (lion,)
    (again,) = plan.notes(planned(concepts=[lion.model_dump(mode="json") | {"anchor": "cat"}]))
    assert "lion: it was erased from" in again
    with pytest.raises(ErasecError, match="report of the base is damaged"):
        planned(concepts=[{"name": "tiger"}])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"erase": ()}, ("nothing to erase", "--erase star")),
        ({"erase": ("star", "star")}, ("'star' is named twice",)),
        ({"passes": ("ucee",)}, ("no pass 'ucee'", "[[pass]] 1 (ucee)", "did you mean 'uce'?")),
        ({"passes": ("uce", "uce:rigde=1")}, ("no option 'rigde'", "[[pass]] 2 (uce)", "did you mean 'ridge'?")),
        ({"passes": ("uce:ridge=much",)}, ("ridge is 'much'", "a number")),
        ({"targets": ("hf", "onyx")}, ("no target 'onyx'", "did you mean 'onnx'?")),
        ({"model": "glyhps"}, ("no model 'glyhps'", "did you mean 'glyphs'?")),
    ],
)
def test_what_cannot_be_planned(
    here: Path, random_folder: Path, changed: dict[str, Any], words: tuple[str, ...]
) -> None:
    if "passes" in changed:
        changed = {"passes": from_flags("x", passes=changed["passes"]).passes}
    with pytest.raises(ErasecError) as caught:
        plan.make_plan(recipe(random_folder).model_copy(update=changed))
    for word in words:
        assert word in str(caught.value)
    assert not list(here.iterdir())


def test_a_device_that_is_not_there_is_a_missing_tool(here: Path, random_folder: Path) -> None:
    with pytest.raises(MissingTool, match="no device 'cuda:99'"):
        plan.make_plan(recipe(random_folder, device="cuda:99"))


def test_a_missing_library_of_a_target_is_an_error_before_the_model_is_opened(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: object) -> None:
        raise MissingTool("the target onnx needs onnx")

    monkeypatch.setattr(registry.load_target("onnx"), "check", missing)
    with pytest.raises(MissingTool, match="needs onnx"):
        plan.make_plan(recipe(Path("no-such-model"), targets=("hf", "onnx")))


def test_a_pass_without_sites_is_an_error(here: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.load_pass("uce"), "sites", lambda self, model: ())
    with pytest.raises(ErasecError, match="pass uce finds no site"):
        plan.make_plan(recipe(random_folder))


def test_a_pass_with_an_option_that_no_recipe_can_hold_is_refused(here: Path, random_folder: Path) -> None:
    (here / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom erasec.passes.uce import Uce\n"
        "@dataclass(frozen=True)\nclass Mine(Uce):\n    layers: tuple = (1, 2)\n"
    )
    with pytest.raises(ErasecError, match="the option layers has a default of the type tuple"):
        plan.make_plan(recipe(random_folder, passes=from_flags("x", passes=["mine.py:Mine"]).passes))


LEAVES = """
from erasec.passes.uce import Uce
class Mine(Uce):
    name = "mine"
    extras = frozenset({"negative"})
"""


def test_the_plain_folder_comes_first_and_is_a_bundle_if_the_result_is_more_than_weights(
    here: Path, random_folder: Path
) -> None:
    def targets(*given: str, **changed: Any) -> list[str]:
        resolved = plan.make_plan(recipe(random_folder, targets=given, **changed), pin=False)
        assert [target.name for target in resolved.targets] == [
            text.partition(":")[0] for text in resolved.recipe.targets
        ]
        return list(resolved.recipe.targets)

    (here / "mine.py").write_text(LEAVES)
    mine = from_flags("x", passes=["mine.py:Mine"]).passes
    assert targets() == ["hf"]
    assert targets("edit:sums=false", "hf") == ["hf", "edit:sums=false"]
    assert targets("bundle") == ["hf", "bundle"]
    assert targets(passes=mine) == ["bundle"]
    assert targets("edit", "bundle", passes=mine) == ["bundle", "edit"]


def test_a_lora_holds_passes_that_change_only_matrices_of_the_denoiser(here: Path, random_folder: Path) -> None:
    def make(*passes: str) -> plan.Plan:
        recipe_ = recipe(random_folder, passes=from_flags("x", passes=passes).passes, targets=("lora",))
        return plan.make_plan(recipe_, pin=False)

    assert [target.name for target in make("esd:rank=4").targets] == ["hf", "lora"]
    assert [target.name for target in make("uce").targets] == ["hf", "lora"]
    for passes in (("esd",), ("uce", "esd")):
        with pytest.raises(ErasecError, match=r"attn2\.\S+ cannot be written as a LoRA") as caught:
            make(*passes)
        assert "esd:rank=" in caught.value.fix
    for few in ("few_shot", "few_shot:rank=4"):
        with pytest.raises(ErasecError, match=r"text_model\.\S+ .*cannot be written as a LoRA"):
            make(few)
    assert list(here.iterdir()) == []


def test_a_learned_pass_on_a_family_that_is_not_trained_is_refused(here: Path) -> None:
    random_layout(here / "sdxl", "sdxl", "tiny")
    random_layout(here / "sd2", "sd2", "tiny")
    for name in ("esd", "kpop", "safegen", "trce", "few_shot", "geom_erasing", "geom_erasing:train=tokens+x"):
        passes = from_flags("x", passes=[name]).passes
        if not name.startswith("geom_erasing"):
            assert plan.make_plan(recipe(here / "sdxl", passes=passes), pin=False).passes[0].name == name
            continue
        with pytest.raises(ErasecError, match="family sdxl cannot be trained here"):
            plan.make_plan(recipe(here / "sdxl", passes=passes), pin=False)
        assert plan.make_plan(recipe(here / "sd2", passes=passes), pin=False).passes[0].name == passes[0].name
    assert plan.make_plan(recipe(here / "sdxl"), pin=False).passes[0].name == "uce"


def test_a_learned_pass_that_trains_tokens_alone_is_refused_there_too(here: Path) -> None:
    random_layout(here / "sdxl", "sdxl", "tiny")
    passes = from_flags("x", passes=["geom_erasing:train=tokens"]).passes
    with pytest.raises(ErasecError, match="family sdxl cannot be trained here"):
        plan.make_plan(recipe(here / "sdxl", passes=passes), pin=False)


@pytest.mark.parametrize("target", ["hf", "ldm", "lora"])
def test_a_target_that_cannot_hold_the_extras_is_refused(here: Path, random_folder: Path, target: str) -> None:
    (here / "mine.py").write_text(LEAVES)
    mine = from_flags("x", passes=["mine.py:Mine"]).passes
    with pytest.raises(ErasecError, match=f"the target {target} cannot hold") as caught:
        plan.make_plan(recipe(random_folder, targets=(target,), passes=mine))
    assert "pass mine adds a negative prompt" in caught.value.why and "bundle" in caught.value.fix
    assert [path.name for path in here.iterdir()] == ["mine.py"]


@pytest.mark.parametrize("target", ["onnx", "openvino", "trt-rtx", "triton"])
def test_models_without_graphs_are_refused_before_anything_is_solved(here: Path, target: str) -> None:
    random_layout(here / "sdxl", "sdxl", "tiny")
    for name in {"openvino": ("openvino",), "trt-rtx": ("tensorrt_rtx", "polygraphy")}.get(target, ()):
        pytest.importorskip(name)
    assert plan.make_plan(recipe(here / "sdxl", targets=(target,)), pin=False).targets[-1].name == target
    index = here / "sdxl" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"adapter": ["diffusers", "T2IAdapter"]}))
    with pytest.raises(ErasecError, match="onnx: the model has the component adapter"):
        plan.make_plan(recipe(here / "sdxl", targets=(target,)), pin=False)


def test_a_size_that_no_engine_can_have_is_refused_there_too(here: Path, random_folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert plan.make_plan(recipe(random_folder, targets=("trt-rtx:height=64",)), pin=False).targets[1].name == "trt-rtx"
    with pytest.raises(ErasecError, match="option height has 72"):
        plan.make_plan(recipe(random_folder, targets=("trt-rtx:height=72",)), pin=False)


def test_a_base_with_extras_stays_a_bundle(here: Path, random_folder: Path) -> None:
    shutil.copytree(random_folder, here / "base")
    write_extras(here / "base", Extras(negative="a star"))
    assert plan.make_plan(recipe(here / "base"), pin=False).recipe.targets == ("bundle",)
    with pytest.raises(ErasecError, match="hf cannot hold"):
        plan.make_plan(recipe(here / "base", targets=("hf",)), pin=False)


class TestKeys:
    """Errors in the keys of a build are found before anything is computed."""

    @pytest.fixture
    def key(self, here: Path, random_folder: Path) -> Path:
        rows = torch.ones(2, 128)
        bound = loading.load(str(random_folder)).component_digest("unet")
        hidden = Secret("star", rows, rows, ("mid_block.attentions.0.transformer_blocks.0.attn2",))
        write_key(here / "star.key", hidden, find("star", "glyphs"), "kpop", "1", bound)
        return here / "star.key"

    def test_with_a_key_nothing_needs_to_be_erased(self, here: Path, random_folder: Path, key: Path) -> None:
        resolved = plan.make_plan(recipe(random_folder, erase=(), keys=(str(key),)))
        assert resolved.recipe.targets == ("bundle",) and resolved.recipe.keys == ("star.key",)
        assert not resolved.passes and not resolved.concepts
        assert resolved.out == Path(f"{random_folder.name}-with-star")
        assert plan.describe(resolved)["keys"] == [{"path": "star.key", "concept": "star"}]
        onnx = plan.make_plan(recipe(random_folder, erase=(), keys=(str(key),), targets=("onnx",)), pin=False)
        assert onnx.recipe.targets == ("bundle", "onnx")

    def test_a_key_of_another_model_is_refused(self, here: Path, key: Path) -> None:
        with pytest.raises(ErasecError, match=r"star\.key belongs to another model"):
            plan.make_plan(recipe(Path("glyphs"), erase=(), keys=(str(key),)), pin=False)

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"targets": ("hf",)}, "hf cannot hold"),
            ({"targets": ("edit",)}, "edit cannot hold a key"),
            ({"keys": (), "absorb": 0.5}, "no key to absorb"),
            ({"erase": (), "passes": from_flags("x", passes=["uce"]).passes}, "a pass and nothing to erase"),
            ({"keys": ("none.key",)}, "no key file none.key"),
        ],
    )
    def test_impossible_builds_with_a_key_are_refused(
        self, here: Path, random_folder: Path, key: Path, changed: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ErasecError) as caught:
            plan.make_plan(recipe(random_folder, **{"keys": (str(key),), **changed}))
        assert words in caught.value.what

    def test_a_build_with_a_key_erases_no_other_concept(self, here: Path, random_folder: Path, key: Path) -> None:
        passes = from_flags("x", passes=["uce"]).passes
        for erase in (("heart",), ("star", "heart")):
            with pytest.raises(ErasecError, match="heart cannot be erased in a build with a key") as caught:
                plan.make_plan(recipe(random_folder, erase=erase, keys=(str(key),), passes=passes))
            assert "--key FILE" in caught.value.fix
        both = plan.make_plan(recipe(random_folder, keys=(str(key),), passes=passes), pin=False)
        assert [concept.name for concept in both.concepts] == ["star"] and len(both.keys) == 1

    def test_an_output_folder_that_holds_a_key_is_not_replaced(
        self, here: Path, random_folder: Path, key: Path
    ) -> None:
        out = here / "out"
        (out / "hf").mkdir(parents=True)
        (out / "report.json").write_text(json.dumps(EARLIER))
        hidden = key.rename(out / "star.key")
        with pytest.raises(ErasecError, match=r"out holds star\.key") as caught:
            plan.make_plan(recipe(random_folder), out)
        assert "no other key opens the model" in caught.value.why
        hidden.rename(here / "star.key")
        assert plan.make_plan(recipe(random_folder), out, pin=False).out == out
        (out / "star.key").write_text("no key file, and no part of a build")
        with pytest.raises(ErasecError, match="out is not empty"):
            plan.make_plan(recipe(random_folder), out)

    def test_a_key_in_the_output_folder_would_be_lost(self, here: Path, random_folder: Path, key: Path) -> None:
        out = here / "out"
        (out / "hf").mkdir(parents=True)
        (out / "report.json").write_text(json.dumps(EARLIER))
        inside = key.rename(out / "hf" / "star.key")
        with pytest.raises(ErasecError, match="lies in the output folder"):
            plan.make_plan(recipe(random_folder, keys=(str(inside),)), out)
        assert (
            plan.make_plan(recipe(random_folder, keys=(str(inside),)), here / "beside", pin=False).out
            == here / "beside"
        )


def test_a_third_party_pass_from_a_file(here: Path, random_folder: Path) -> None:
    (here / "mine.py").write_text("from erasec.passes.uce import Uce\nclass Mine(Uce):\n    pass\n")
    resolved = plan.make_plan(recipe(random_folder, passes=from_flags("x", passes=["mine.py:Mine:ridge=2"]).passes))
    assert isinstance(resolved.passes[0], Pass)
    assert resolved.recipe.passes[0].name == "mine.py:Mine"
    assert resolved.recipe.passes[0].options["ridge"] == 2.0


def test_the_kind_of_a_concept_chooses_the_pass(here: Path, random_folder: Path) -> None:
    for name, chosen in (
        ("star", "uce"),
        ("church", "uce"),
        ("van-gogh", "uce"),
        ("nudity", "trce"),
        ("watermark", "geom_erasing"),
    ):
        assert settings.default_passes([concept.find(name)], NONE) == (NamedOptions(name=chosen),)
    assert settings.default_passes([concept.find("church"), concept.find("van-gogh")], NONE) == (
        NamedOptions(name="uce"),
    )
    assert settings.default_passes([], NONE) == ()
    described = plan.describe(plan.make_plan(recipe(random_folder, erase=("church", "van-gogh")), pin=False))["passes"]
    assert [(step["name"], step["reason"]) for step in described] == [
        ("uce", "the default for concepts of kind object, style")
    ]


def test_kinds_with_different_default_passes_are_an_error(here: Path, random_folder: Path) -> None:
    mixed = recipe(random_folder, erase=("church", "nudity", "a thing"))
    with pytest.raises(ErasecError) as caught:
        plan.make_plan(mixed)
    assert "uce for church (kind object), a thing (kind none); trce for nudity (kind safety)" in caught.value.why
    assert "--pass" in caught.value.fix
    chosen = mixed.model_copy(update={"passes": (NamedOptions(name="rece"),)})
    assert [step["reason"] for step in plan.describe(plan.make_plan(chosen, pin=False))["passes"]] == [""]


def test_a_disk_without_room_is_refused(here: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 1000))
    with pytest.raises(ErasecError, match="too little room") as caught:
        plan.make_plan(recipe(random_folder))
    assert "1 kB are free" in caught.value.why and "temporary files" not in caught.value.why


@pytest.mark.parametrize(("what", "refused"), [("cache", False), ("output, cache", True), ("output", True)])
def test_only_a_disk_without_room_for_the_cache_is_a_remark(what: str, refused: bool) -> None:
    optional = 0 if what == "output" else 600 if what == "cache" else 100
    disk = {"what": what, "path": "/x", "needed": 600, "optional": optional, "free": 0}
    if refused:
        with pytest.raises(ErasecError, match="the disk of /x has too little room"):
            plan.estimates.check_disks([disk])
    else:
        (remark,) = plan.estimates.check_disks([disk])
        assert "no room for the cache (600 B more are needed)" in remark
    assert plan.estimates.check_disks([{**disk, "free": 600}]) == ()


def test_graphs_in_the_cache_and_in_tmpdir_are_counted_on_their_disks(
    here: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = {"out": 1, "tmp": 2, "cache": 3}
    for name in ("tmp", "cache"):
        (here / name).mkdir()
    monkeypatch.setattr(plan.estimates.tempfile, "gettempdir", lambda: str(here / "tmp"))
    monkeypatch.setenv("ERASEC_CACHE", str(here / "cache"))
    one = plan.describe(plan.make_plan(recipe(random_folder, targets=("onnx",)), pin=False))["disk"]
    plain = plan.describe(plan.make_plan(recipe(random_folder), pin=False))["disk"]
    assert [disk["what"] for disk in one["disks"]] == ["output, temporary files, cache"]
    assert [disk["what"] for disk in plain["disks"]] == ["output"]

    class Separate:
        def __init__(self, path: Path) -> None:
            self.path = path

        def stat(self) -> Any:
            return SimpleNamespace(st_dev=disks.get(self.path.name, 1))

    monkeypatch.setattr(plan.estimates, "existing", Separate)
    three = plan.describe(plan.make_plan(recipe(random_folder, targets=("onnx",)), pin=False))["disk"]["disks"]
    assert [disk["what"] for disk in three] == ["output", "temporary files", "cache"]
    assert sum(disk["needed"] for disk in three) == one["needed"] and all(disk["needed"] > 0 for disk in three)


def test_names_of_output_folders(here: Path) -> None:
    words = [Concept(name="in the style of X", erase=("x",)), Concept(name="b/..", erase=("b",))]
    assert output_paths.default_out("owner/model", words) == Path("model-without-in-the-style-of-X-b")
    long = output_paths.default_out("owner/model", [Concept(name="\u732b" * 100, erase=("x",))])
    assert len(str(long).encode()) <= 120


JUDGE = """
from erasec.glyphs.judge import GlyphJudge

class Anything(GlyphJudge):
    name = "anything"
    title = "judge of anything"

    @classmethod
    def for_model(cls, model, tuning=False):
        return cls()
"""


class TestJudge:
    """The judge of a build: the one that is named, by default the first registered one that knows the model."""

    def test_by_default_it_is_the_one_that_knows_the_model(self, here: Path, random_folder: Path) -> None:
        known = plan.make_plan(recipe(Path("glyphs")), pin=False)
        assert known.judge is not None and known.judge.name == "glyphs"
        assert plan.describe(known)["judge"] == "glyphs judge B" and known.recipe.judge == ""
        unknown = plan.make_plan(recipe(random_folder), pin=False)
        assert unknown.judge is None and plan.describe(unknown)["judge"] == ""

    def test_a_judge_from_a_file_is_used_and_stays_in_the_recipe(self, here: Path, random_folder: Path) -> None:
        (here / "mine.py").write_text(JUDGE)
        resolved = plan.make_plan(recipe(random_folder, judge="mine.py:Anything"), pin=False)
        assert resolved.judge is not None and plan.describe(resolved)["judge"] == "judge of anything"
        assert resolved.recipe.judge == "mine.py:Anything"
        again = plan.make_plan(from_toml(to_toml(resolved.recipe)), pin=False)
        assert type(again.judge).__name__ == "Anything"

    def test_a_judge_that_does_not_know_the_model_is_an_error(self, here: Path, random_folder: Path) -> None:
        with pytest.raises(ErasecError, match="the judge glyphs cannot judge pictures of") as caught:
            plan.make_plan(recipe(random_folder, judge="glyphs"), pin=False)
        assert "--judge" in caught.value.fix
        assert not list(here.iterdir())

    def test_an_unknown_name_suggests_the_nearest(self, here: Path, random_folder: Path) -> None:
        with pytest.raises(ErasecError, match="there is no judge 'glyhps'") as caught:
            plan.make_plan(recipe(random_folder, judge="glyhps"), pin=False)
        assert caught.value.why == "did you mean 'glyphs'?"


def test_sites_are_grouped_by_part_attention_and_projection(here: Path, random_folder: Path) -> None:
    (step,) = plan.describe(plan.make_plan(recipe(random_folder), pin=False))["passes"]
    assert len(step["groups"]) == 6
    assert sum(group["tensors"] for group in step["groups"]) == len(step["sites"]) == 14
    sizes = [site["shape"][0] * site["shape"][1] for site in step["sites"]]
    assert sum(group["parameters"] for group in step["groups"]) == sum(sizes)
    mid = next(group for group in step["groups"] if (group["part"], group["proj"]) == ("mid", "k"))
    assert (mid["attn"], mid["tensors"]) == ("cross", 1)
