from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from erasec import registry
from erasec.base import Pass
from erasec.checkpoint import safetensors as checkpoint
from erasec.commands import doctor, plan
from erasec.errors import ErasecError, MissingTool
from erasec.keys import key_file as secret
from erasec.ldm.skeleton import random_folder as random_layout
from erasec.model import sidecar as extras
from erasec.model import view as models
from erasec.model.edit import Secret
from erasec.recipe import concept
from erasec.recipe.concept import Concept, find
from erasec.recipe.recipe import PassUse, Recipe, from_flags, from_toml, to_toml

EARLIER = {"schema": "erasec.report/1", "written": [{"path": "hf"}]}


def recipe(model: Path, **changed: Any) -> Recipe:
    return from_flags(str(model), erase=["star"], device="cpu").model_copy(update=changed)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(*folders: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for folder in folders for path in (folder, *folder.rglob("*")))


def test_a_plan_resolves_everything_and_writes_nothing(here: Path, random_folder: Path) -> None:
    before = listing(here, random_folder)
    made = plan.make(recipe(random_folder))
    told = plan.describe(made)
    assert listing(here, random_folder) == before
    assert made.out == Path(f"{random_folder.name}-without-star")
    assert [step.name for step in made.passes] == ["uce"]
    assert made.recipe.digest == made.model.digest
    assert made.recipe.concepts[0].synonyms == made.concepts[0].synonyms
    assert made.recipe.passes[0].options["rows"] == "tail"
    assert told["time"]["seconds"] is None
    sites = told["passes"][0]["sites"]
    assert {(site["attn"], site["proj"]) for site in sites} == {("cross", "k"), ("cross", "v")}
    assert len(sites) == 14
    assert json.loads(json.dumps(told)) == told


def test_a_resolved_recipe_plans_the_same_build_again(here: Path, random_folder: Path) -> None:
    first = plan.make(recipe(random_folder))
    again = plan.make(from_toml(to_toml(first.recipe)))
    assert again == first


def test_estimates_come_from_the_files(here: Path, random_folder: Path) -> None:
    told = plan.describe(plan.make(recipe(random_folder, targets=("hf", "onnx")), pin=False))
    copied = sum(path.stat().st_size for path in random_folder.rglob("*") if path.is_file())
    hf, onnx = (target["bytes"] for target in told["targets"])
    assert hf == copied
    assert 1.9 < onnx / hf < 2.0  # float16 becomes float32
    assert told["disk"]["needed"] == hf + onnx
    assert told["memory"]["bytes"] == max(told["memory"]["steps"].values()) > onnx
    assert "estimate" in told["memory"]["how"]
    assert "estimate" in told["disk"]["how"]


def test_memory_is_that_of_the_maps_and_pictures_count_where_they_are_made(here: Path, random_folder: Path) -> None:
    told = [
        plan.describe(plan.make(recipe(model), pin=False))["memory"]["steps"] for model in (random_folder, "glyphs")
    ]
    assert set(told[0]) == {"solve", "merge"}
    assert set(told[1]) == {"solve", "merge", "pictures"}
    made = plan.make(recipe(random_folder), pin=False)
    counts = {
        name: sum(math.prod(entry.shape) for entry in made.model.entries(name).values())
        for name in ("text_encoder", "unet")
    }
    text = 4 * counts["text_encoder"]
    assert told[0]["solve"] == text + 5 * 8 * 128**2
    assert told[0]["merge"] == 8 * max(math.prod(site.shape) for site in made.model.select("cross", "kv"))
    learned = plan.make(recipe(random_folder, passes=(PassUse(name="esd"),)), pin=False)
    trained = sum(math.prod(site.shape) for site in learned.passes[0].sites(learned.model))
    assert plan.describe(learned)["memory"]["steps"]["train"] == text + 4 * (counts["unet"] + 4 * trained)


def test_a_model_that_a_target_cannot_write_is_refused(here: Path) -> None:
    random_layout(here / "sd1", "sd1", "tiny")
    assert plan.make(recipe(here / "sd1", targets=("hf", "ldm")), pin=False).targets[1].name == "ldm"
    file = here / "sd1" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(file)[0].items()}
    checkpoint.save(file, {**tensors, "adapter.weight": tensors["conv_in.bias"]})
    with pytest.raises(ErasecError, match=r"adapter\.weight has no place in a single file"):
        plan.make(recipe(here / "sd1", targets=("hf", "ldm")), pin=False)
    assert plan.make(recipe(here / "sd1"), pin=False).out == Path("sd1-without-star")


def test_time_is_told_where_it_was_measured(here: Path, random_folder: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "report.json").write_text(json.dumps({**EARLIER, "seconds": {"solve": 1.5, "report": 2.0}}))
    told = plan.describe(plan.make(recipe(random_folder), Path("out"), pin=False))
    assert told["time"] == {"seconds": 3.5, "how": "measured: the earlier build in out took this long"}


def test_another_model_than_the_recipes_is_refused(here: Path, random_folder: Path) -> None:
    with pytest.raises(ErasecError, match="is not the model that the recipe was made for"):
        plan.make(recipe(random_folder, digest="0" * 64), pin=False)


def test_without_pin_the_weights_are_not_read(here: Path, random_folder: Path) -> None:
    made = plan.make(recipe(random_folder), pin=False)
    assert made.recipe.digest == ""
    assert "digest" not in vars(made.model)  # where the cached property would be


def test_concepts_of_the_recipe_come_before_bundled_ones(here: Path, random_folder: Path) -> None:
    own = Concept(name="star", erase=("film star",))
    assert plan.make(recipe(random_folder, concepts=(own,)), pin=False).concepts == (own,)
    assert plan.make(recipe(random_folder), pin=False).concepts != (own,)


def test_a_bare_word_is_noted_and_a_bundled_concept_is_not(here: Path, random_folder: Path) -> None:
    (note,) = plan.notes(plan.make(recipe(random_folder, erase=("strar", "ring")), pin=False))
    assert "'strar'" in note
    assert "did you mean 'star'?" in note


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"erase": ()}, ("nothing to erase", "--erase star")),
        ({"erase": ("star", "star")}, ("'star' is to be erased twice",)),
        ({"passes": ("ucee",)}, ("no pass 'ucee'", "[[pass]] 1 (ucee)", "did you mean 'uce'?")),
        ({"passes": ("uce", "uce:rigde=1")}, ("no option 'rigde'", "[[pass]] 2 (uce)", "did you mean 'ridge'?")),
        ({"passes": ("uce:ridge=much",)}, ("ridge is 'much'", "a float")),
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
        plan.make(recipe(random_folder).model_copy(update=changed))
    for word in words:
        assert word in str(caught.value)
    assert not list(here.iterdir())


def test_a_device_that_is_not_there_is_a_missing_tool(here: Path, random_folder: Path) -> None:
    with pytest.raises(MissingTool, match="no device 'cuda:99'"):
        plan.make(recipe(random_folder, device="cuda:99"))


def test_a_missing_library_of_a_target_is_told_before_the_model_is_opened(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: object) -> None:
        raise MissingTool("the target onnx needs onnx")

    monkeypatch.setattr(registry.load_target("onnx"), "check", missing)
    with pytest.raises(MissingTool, match="needs onnx"):
        plan.make(recipe(Path("no-such-model"), targets=("hf", "onnx")))


def test_a_pass_without_sites_is_an_error(here: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.load_pass("uce"), "sites", lambda self, model: ())
    with pytest.raises(ErasecError, match="pass uce finds no site"):
        plan.make(recipe(random_folder))


def test_a_pass_option_that_no_recipe_can_hold(here: Path, random_folder: Path) -> None:
    (here / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom erasec.passes.uce import Uce\n"
        "@dataclass(frozen=True)\nclass Mine(Uce):\n    layers: tuple = (1, 2)\n"
    )
    with pytest.raises(ErasecError, match="cannot hold the option layers"):
        plan.make(recipe(random_folder, passes=from_flags("x", passes=["mine.py:Mine"]).passes))


LEAVES = """
from erasec.passes.uce import Uce
class Mine(Uce):
    name = "mine"
    leaves = frozenset({"negative"})
"""


def test_the_plain_folder_comes_first_and_is_a_bundle_where_more_than_weights_is_left(
    here: Path, random_folder: Path
) -> None:
    def targets(*given: str, **changed: Any) -> list[str]:
        made = plan.make(recipe(random_folder, targets=given, **changed), pin=False)
        assert [target.name for target in made.targets] == [text.partition(":")[0] for text in made.recipe.targets]
        return list(made.recipe.targets)

    (here / "mine.py").write_text(LEAVES)
    mine = from_flags("x", passes=["mine.py:Mine"]).passes
    assert targets() == ["hf"]
    assert targets("edit:sums=false", "hf") == ["hf", "edit:sums=false"]
    assert targets("bundle") == ["hf", "bundle"]
    assert targets(passes=mine) == ["bundle"]
    assert targets("edit", "bundle", passes=mine) == ["bundle", "edit"]


def test_a_lora_holds_what_trains_matrices_of_the_denoiser_alone(here: Path, random_folder: Path) -> None:
    def make(*passes: str) -> plan.Plan:
        asked = recipe(random_folder, passes=from_flags("x", passes=passes).passes, targets=("lora",))
        return plan.make(asked, pin=False)

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
        with pytest.raises(ErasecError, match="family sdxl cannot be trained here"):
            plan.make(recipe(here / "sdxl", passes=passes), pin=False)
        assert plan.make(recipe(here / "sd2", passes=passes), pin=False).passes[0].name == passes[0].name
    assert plan.make(recipe(here / "sdxl"), pin=False).passes[0].name == "uce"


def test_a_learned_pass_that_trains_tokens_alone_is_refused_there_too(here: Path) -> None:
    random_layout(here / "sdxl", "sdxl", "tiny")
    passes = from_flags("x", passes=["geom_erasing:train=tokens"]).passes
    with pytest.raises(ErasecError, match="family sdxl cannot be trained here"):
        plan.make(recipe(here / "sdxl", passes=passes), pin=False)


@pytest.mark.parametrize("target", ["hf", "ldm", "lora"])
def test_a_target_that_cannot_hold_what_is_left_is_refused(here: Path, random_folder: Path, target: str) -> None:
    (here / "mine.py").write_text(LEAVES)
    mine = from_flags("x", passes=["mine.py:Mine"]).passes
    with pytest.raises(ErasecError, match=f"the target {target} cannot hold") as caught:
        plan.make(recipe(random_folder, targets=(target,), passes=mine))
    assert "pass mine leaves a negative prompt" in caught.value.why and "bundle" in caught.value.fix
    assert [path.name for path in here.iterdir()] == ["mine.py"]


@pytest.mark.parametrize("target", ["onnx", "openvino", "trt-rtx", "triton"])
def test_graphs_of_another_family_are_refused_before_anything_is_solved(here: Path, target: str) -> None:
    random_layout(here / "sdxl", "sdxl", "tiny")
    for name in {"openvino": ("openvino",), "trt-rtx": ("tensorrt_rtx", "polygraphy")}.get(target, ()):
        pytest.importorskip(name)
    with pytest.raises(ErasecError, match="onnx: the model has a text_encoder_2"):
        plan.make(recipe(here / "sdxl", targets=(target,)), pin=False)


def test_a_size_that_no_engine_can_have_is_refused_there_too(here: Path, random_folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert plan.make(recipe(random_folder, targets=("trt-rtx:height=64",)), pin=False).targets[1].name == "trt-rtx"
    with pytest.raises(ErasecError, match="option height has 72"):
        plan.make(recipe(random_folder, targets=("trt-rtx:height=72",)), pin=False)


def test_a_base_that_carries_more_than_weights_stays_a_bundle(here: Path, random_folder: Path) -> None:
    shutil.copytree(random_folder, here / "base")
    extras.write(here / "base", extras.Extras(negative="a star"))
    assert plan.make(recipe(here / "base"), pin=False).recipe.targets == ("bundle",)
    with pytest.raises(ErasecError, match="hf cannot hold"):
        plan.make(recipe(here / "base", targets=("hf",)), pin=False)


class TestKeys:
    """What a keyed build may be, is known before anything is computed."""

    @pytest.fixture
    def key(self, here: Path, random_folder: Path) -> Path:
        rows = torch.ones(2, 128)
        bound = models.load(str(random_folder)).component_digest("unet")
        held = Secret("star", rows, rows, ("mid_block.attentions.0.transformer_blocks.0.attn2",))
        secret.write(here / "star.key", held, find("star"), "kpop", "1", bound)
        return here / "star.key"

    def test_with_a_key_nothing_needs_to_be_erased(self, here: Path, random_folder: Path, key: Path) -> None:
        made = plan.make(recipe(random_folder, erase=(), keys=(str(key),)))
        assert made.recipe.targets == ("bundle",) and made.recipe.keys == (str(key),)
        assert not made.passes and not made.concepts
        assert made.out == Path(f"{random_folder.name}-with-star")
        assert plan.describe(made)["keys"] == [{"path": str(key), "concept": "star"}]
        onnx = plan.make(recipe(random_folder, erase=(), keys=(str(key),), targets=("onnx",)), pin=False)
        assert onnx.recipe.targets == ("bundle", "onnx")

    def test_of_another_model(self, here: Path, key: Path) -> None:
        with pytest.raises(ErasecError, match=r"star\.key is of another model"):
            plan.make(recipe(Path("glyphs"), erase=(), keys=(str(key),)), pin=False)

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
    def test_what_cannot_be(
        self, here: Path, random_folder: Path, key: Path, changed: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ErasecError) as caught:
            plan.make(recipe(random_folder, **{"keys": (str(key),), **changed}))
        assert words in caught.value.what

    def test_what_else_is_erased_is_not_measured_under_a_key(self, here: Path, random_folder: Path, key: Path) -> None:
        passes = from_flags("x", passes=["uce"]).passes
        for erase in (("heart",), ("star", "heart")):
            with pytest.raises(ErasecError, match="heart is to be erased in a build that a key opens") as caught:
                plan.make(recipe(random_folder, erase=erase, keys=(str(key),), passes=passes))
            assert "--key FILE" in caught.value.fix
        both = plan.make(recipe(random_folder, keys=(str(key),), passes=passes), pin=False)
        assert [concept.name for concept in both.concepts] == ["star"] and len(both.keys) == 1

    def test_an_output_folder_that_holds_a_key_is_not_replaced(
        self, here: Path, random_folder: Path, key: Path
    ) -> None:
        out = here / "out"
        (out / "hf").mkdir(parents=True)
        (out / "report.json").write_text(json.dumps(EARLIER))
        held = key.rename(out / "star.key")
        with pytest.raises(ErasecError, match=r"out holds star\.key") as caught:
            plan.make(recipe(random_folder), out)
        assert "opens what was built with that key" in caught.value.why
        held.rename(here / "star.key")
        assert plan.make(recipe(random_folder), out, pin=False).out == out
        (out / "star.key").write_text("no key file, and no part of a build")
        with pytest.raises(ErasecError, match="out is not empty"):
            plan.make(recipe(random_folder), out)

    def test_a_key_in_the_output_folder_would_be_lost(self, here: Path, random_folder: Path, key: Path) -> None:
        out = here / "out"
        (out / "hf").mkdir(parents=True)
        (out / "report.json").write_text(json.dumps(EARLIER))
        inside = key.rename(out / "hf" / "star.key")
        with pytest.raises(ErasecError, match="lies in the output folder"):
            plan.make(recipe(random_folder, keys=(str(inside),)), out)
        assert plan.make(recipe(random_folder, keys=(str(inside),)), here / "beside", pin=False).out == here / "beside"


def test_a_third_party_pass_from_a_file(here: Path, random_folder: Path) -> None:
    (here / "mine.py").write_text("from erasec.passes.uce import Uce\nclass Mine(Uce):\n    pass\n")
    made = plan.make(recipe(random_folder, passes=from_flags("x", passes=["mine.py:Mine:ridge=2"]).passes))
    assert isinstance(made.passes[0], Pass)
    assert made.recipe.passes[0].name == "mine.py:Mine"
    assert made.recipe.passes[0].options["ridge"] == 2.0


class TestOutputFolder:
    """A build replaces its output folder, so what may stand there is decided here."""

    @pytest.mark.parametrize("earlier", ["nothing", "empty", "report.json", ".rejected"])
    def test_taken(self, here: Path, random_folder: Path, earlier: str) -> None:
        out = here / "out"
        if earlier != "nothing":
            out.mkdir()
        if earlier == "report.json":
            (out / earlier).write_text(json.dumps(EARLIER))
            (out / "hf").mkdir()
        if earlier == ".rejected":
            (out / earlier).mkdir()
        assert plan.make(recipe(random_folder), out, pin=False).out == out

    def test_refused_where_other_things_are(self, here: Path, random_folder: Path) -> None:
        (here / "photos").mkdir()
        (here / "photos" / "me.jpg").write_text("")
        with pytest.raises(ErasecError, match="photos is not empty") as caught:
            plan.make(recipe(random_folder), Path("photos"))
        assert "me.jpg" in caught.value.why
        with pytest.raises(ErasecError, match=r"me\.jpg is a file"):
            plan.make(recipe(random_folder), Path("photos/me.jpg"))

    @pytest.mark.parametrize(("report", "beside"), [({}, "hf"), ({"schema": "other"}, "hf"), (None, "thesis.tex")])
    def test_refused_where_something_only_looks_like_a_build(
        self, here: Path, random_folder: Path, report: dict[str, str] | None, beside: str
    ) -> None:
        out = here / "out"
        (out / beside).mkdir(parents=True)
        (out / "report.json").write_text(json.dumps(EARLIER if report is None else report))
        with pytest.raises(ErasecError, match="out is not empty"):
            plan.make(recipe(random_folder), out, pin=False)
        assert (out / beside).is_dir()

    @pytest.mark.parametrize("out", [".", "..", "/"])
    def test_refused_around_the_working_directory(self, here: Path, random_folder: Path, out: str) -> None:
        with pytest.raises(ErasecError, match="holds the working directory"):
            plan.make(recipe(random_folder), Path(out))

    def test_refused_in_or_around_the_model(self, here: Path, random_folder: Path) -> None:
        build = here / "build"
        shutil.copytree(random_folder, build / "hf")
        (build / "report.json").write_text(json.dumps(EARLIER))
        for out in (build, build / "hf" / "new"):
            with pytest.raises(ErasecError, match="lie in each other"):
                plan.make(recipe(build / "hf"), out)
        assert plan.make(recipe(build / "hf"), here / "beside", pin=False).out == here / "beside"

    def test_refused_without_room(self, here: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 1000))
        with pytest.raises(ErasecError, match="too little room") as caught:
            plan.make(recipe(random_folder))
        assert "1 kB are free" in caught.value.why


def test_names_of_output_folders(here: Path) -> None:
    words = [Concept(name="in the style of X", erase=("x",)), Concept(name="b/..", erase=("b",))]
    assert plan._default_out("owner/model", words) == Path("model-without-in-the-style-of-X-b")
    assert len(str(plan._default_out("owner/model", [Concept(name="\u732b" * 100, erase=("x",))])).encode()) <= 120


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (4_265_000_000, "4.26 GB")]
)
def test_sizes_for_people(count: int, words: str) -> None:
    assert plan.size(count) in (words, words.replace("4.26", "4.27"))


def test_the_doctor_says_what_is_missing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    found = {item.name: item for item in doctor.examine(here)}
    assert found["torch"].there
    assert found["torch"].fix == ""
    assert found["hub"].there
    monkeypatch.setattr(doctor, "version", lambda package: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {item.name: item for item in doctor.examine(here)}
    assert found["onnx"].fix == 'pip install "erasec[onnx]"'
    assert not found["onnx"].required
    assert found["torch"].required
    assert not found["torch"].there
    assert "HF_HUB_OFFLINE" in found["hub"].found


def test_the_doctor_tells_a_cuda_build_without_loading_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    spec = namedtuple("spec", "origin")(str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(doctor, "_devices", lambda: "H200, 143771 MiB")
    assert doctor._cuda() == doctor.Finding("cuda", True, "H200, 143771 MiB; torch is built for CUDA 13.0")
    monkeypatch.setattr(doctor, "_devices", lambda: "")
    assert not doctor._cuda().there
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    assert "CPU build" in doctor._cuda().found


def test_the_kind_of_a_concept_chooses_the_pass(here: Path, random_folder: Path) -> None:
    for name, chosen in (
        ("star", "uce"),
        ("church", "uce"),
        ("van-gogh", "uce"),
        ("nudity", "trce"),
        ("watermark", "geom_erasing"),
    ):
        assert plan.defaults([concept.find(name)]) == (PassUse(name=chosen),)
    assert plan.defaults([concept.find("church"), concept.find("van-gogh")]) == (PassUse(name="uce"),)
    assert plan.defaults([]) == ()
    told = plan.describe(plan.make(recipe(random_folder, erase=("church", "van-gogh")), pin=False))["passes"]
    assert [(step["name"], step["reason"]) for step in told] == [
        ("uce", "the default for concepts of kind object, style")
    ]


def test_kinds_that_want_different_passes_are_told(here: Path, random_folder: Path) -> None:
    mixed = recipe(random_folder, erase=("church", "nudity", "a thing"))
    with pytest.raises(ErasecError) as caught:
        plan.make(mixed)
    assert "uce for church (kind object), a thing (kind none); trce for nudity (kind safety)" in caught.value.why
    assert "--pass" in caught.value.fix
    chosen = mixed.model_copy(update={"passes": (PassUse(name="rece"),)})
    assert [step["reason"] for step in plan.describe(plan.make(chosen, pin=False))["passes"]] == [""]
