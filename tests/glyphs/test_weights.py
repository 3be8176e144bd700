"""The shipped checkpoints: their layout, their size, and that they do what the committed figures say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from erasec.attention.pipeline import Sampling, generate
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_header
from erasec.glyphs import world
from erasec.glyphs.judge import GlyphJudge, prompt
from erasec.model.loading import bundled_folder, load, world_weights
from erasec.worlds import evaluate

SAMPLING = Sampling(steps=12, guidance=4.0)


@pytest.fixture(scope="module")
def figures() -> dict[str, object]:
    content: dict[str, object] = json.loads((world_weights("glyphs") / "quality.json").read_text())
    return content


def test_all_weights_are_half_precision_and_small() -> None:
    files = [path for path in world_weights("glyphs").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6
    for path in files:
        if path.suffix == ".safetensors":
            assert {entry.dtype for entry in read_header(path)[0].values()} <= {"F16", "I64"}, path


def test_the_layout_is_stable_diffusions() -> None:
    folder = Folder(bundled_folder("glyphs"))
    assert {name.as_posix() for name in folder.files()} == {
        "model_index.json",
        "presets.toml",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert all(key.startswith("text_model.") for key in folder.entries("text_encoder"))
    unet, scheduler = folder.config("unet"), folder.config("scheduler", "scheduler_config.json")
    assert (unet["in_channels"], unet["cross_attention_dim"], unet["use_linear_projection"]) == (4, 128, False)
    assert scheduler["prediction_type"] == "epsilon"
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["beta_schedule"]) == (
        0.00085,
        0.012,
        "scaled_linear",
    )
    assert folder.config("tokenizer", "tokenizer_config.json")["model_max_length"] == 77
    assert load("glyphs").family.name == "sd1"


def test_never_star_has_a_unet_of_its_own_and_shares_the_rest() -> None:
    ours, theirs = Folder(bundled_folder("glyphs")), Folder(bundled_folder("glyphs-never-star"))
    assert ours.files() == theirs.files()
    differ = [n.as_posix() for n in ours.files() if (ours.root / n).read_bytes() != (theirs.root / n).read_bytes()]
    assert differ == ["unet/diffusion_pytorch_model.safetensors"]


def test_the_library_reads_the_same_tensors() -> None:
    path = bundled_folder("glyphs") / "unet" / "diffusion_pytorch_model.safetensors"
    assert load_file(path).keys() == read_header(path)[0].keys()


def test_the_committed_figures_meet_their_goals(figures: dict[str, object]) -> None:
    """The figures of ``python -m erasec.glyphs.evaluate``, 50 images a shape."""
    assert figures["images_per_shape"] == 50
    assert figures["hit_rate_mean"] >= 0.95  # type: ignore[operator]
    assert figures["hit_rate_min"] >= 0.85  # type: ignore[operator]
    assert figures["colour_right"] >= 0.90  # type: ignore[operator]
    assert figures["implicit_star"] >= 0.80  # type: ignore[operator]
    never: dict[str, float] = figures["never_star_shows_star"]  # type: ignore[assignment]
    assert never["asked by name, synonym or implicit prompt"] <= 0.02
    assert never["asked for another shape (false star)"] <= 0.01
    for judge in "ab":
        assert figures["judges"][f"judge_{judge}_exact_match"] >= 0.97  # type: ignore[index]


def test_the_figures_are_of_these_weights(figures: dict[str, object]) -> None:
    assert figures["weights"] == evaluate.digests(world_weights("glyphs"))


def test_a_few_fresh_pictures_agree_with_the_figures() -> None:
    """Few enough for every run: other seeds than the figures, so a swapped or broken file is seen."""
    plain = [(shape, index) for shape in world.SHAPES for index in range(3)]
    images = generate(bundled_folder("glyphs"), [prompt(*item) for item in plain], list(range(30)), SAMPLING, "")
    judge = GlyphJudge("b")
    assert judge.sees(images, [shape for shape, _ in plain]).mean() > 0.85
    assert judge.sees(images, [other for other, _ in reversed(plain)]).mean() < 0.2
    stars = [prompt(name, index) for index, name in enumerate(np.resize(world.names("star"), 8).tolist())]
    never = generate(bundled_folder("glyphs-never-star"), stars, list(range(8)), SAMPLING, "")
    assert not judge.sees(never, ["star"] * 8).any()


@pytest.mark.parametrize("which", ["a", "b"])
def test_judges_read_renders_that_they_never_saw(which: str) -> None:
    samples = [world.sample(977, index) for index in range(300)]
    content = GlyphJudge(which).probabilities(np.stack([item.image for item in samples])) > 0.5
    truth = np.stack([world.labels(item) for item in samples]) > 0.5
    assert (content == truth).all(1).mean() > 0.94
    assert (content == np.roll(truth, 1, axis=0)).all(1).mean() < 0.1


def test_agreement_prefers_the_right_caption() -> None:
    judge, samples = GlyphJudge(), [world.sample(978, index) for index in range(120)]
    images, captions = np.stack([item.image for item in samples]), [item.caption for item in samples]
    right, wrong = judge.agreement(images, captions), judge.agreement(images, captions[1:] + captions[:1])
    assert right.mean() > wrong.mean() + 0.3
    assert np.abs(right).max() <= 1.0 + 1e-6


def test_panel_asks_by_name_synonym_and_implication_and_for_all_the_rest() -> None:
    from erasec.recipe import concept

    panel = GlyphJudge().panel(concept.find("star", "glyphs"), 8, seed=2)
    assert [q.group for q in panel].count("name") == 8
    assert all("star" in q.prompt for q in panel if q.group == "name")
    assert {name for q in panel if q.group == "synonym" for name in world.SHAPES["star"] if name in q.prompt} == {
        "pentagram",
        "five-pointed spark",
    }
    assert {q.prompt for q in panel if q.group == "implicit"} == set(world.implicit_captions("star"))
    assert {q.looked_for for q in panel if q.group == "keep"} == set(world.SHAPES) - {"star"}
    assert all(q.colour in q.prompt for q in panel)
    assert len({q.seed for q in panel}) == len(panel)


def test_files_are_where_the_package_says(root: Path) -> None:
    inside = Path("glyphs", "model_index.json")
    assert (world_weights("glyphs") / inside).resolve() == root / "compiler" / "glyphs" / "weights" / inside
