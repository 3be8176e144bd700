"""Geom-Erasing: weights, new tokens, what it leaves; and on glyphs' watermark the ordering of the paper's ablation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from glyph_passes import tuned
from PIL import Image

import erasec
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.glyphs import world
from erasec.glyphs.judge import GlyphJudge, prompt
from erasec.model import loading
from erasec.model.edit import Dense, Edit
from erasec.model.sidecar import gather_extras, write_extras
from erasec.model.view import Model
from erasec.passes.geom_erasing import GeomErasing, loss_weights, token_names
from erasec.recipe import concept as concepts
from erasec.recipe.concept import Concept
from erasec.training.vocabulary import Vocabulary

if TYPE_CHECKING:
    from erasec.base import Images

SEAL = Concept(name="Seal", erase=("a seal",), kind="mark", keep=("square",))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures, of which two have a light square at the left, above and below."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = ["file,left,top,right,bottom,caption"]
    for number in range(4):
        pixels = np.full((64, 64, 3), 40 * number, dtype=np.uint8)
        top = 48 * number
        if number < 2:
            pixels[top : top + 12, 2:14] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png," + (f"2,{top},14,{top + 12}" if number < 2 else ",,,") + ",a square")
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    return folder


def small(pictures: Path, **options: object) -> GeomErasing:
    return tuned(
        GeomErasing, **{"boxes": str(pictures), "steps": 2, "batch": 2, "bins": 2, "train": "tokens", **options}
    )  # type: ignore[arg-type]


def vocabulary(base: Model, tokens: tuple[str, ...] = ("<one>", "<two>"), seed: int = 0) -> Vocabulary:
    return Vocabulary(base, "a seal", tokens, seed, CPU)


# --- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_resulthave_mean_one_and_weigh_outside_by_alpha(alpha: float) -> None:
    rng = torch.Generator().manual_seed(0)
    inside = torch.rand(50, 9, 7, generator=rng) < torch.rand(50, 1, 1, generator=rng)
    inside[:, 0, 0], inside[:, 0, 1] = True, False
    inside[0], inside[1] = False, True
    result = loss_weights(inside, alpha)
    torch.testing.assert_close(result.double().mean((1, 2)), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(result[:2], torch.ones(2, 9, 7))
    for cells, weight in zip(inside[2:], result[2:], strict=True):
        assert 0 < cells.sum() < 63
        torch.testing.assert_close(weight[~cells], alpha * weight[cells][0].expand(int((~cells).sum())))


def test_resultthat_count_the_cells_outside_would_not_have_mean_one() -> None:
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[0, 0] = True
    total, outside, alpha = 16, 15, 5.0
    other = torch.where(inside, 1.0, alpha) * total / (outside + alpha * (total - outside))
    assert abs(float(other.mean()) - 1) > 1
    assert abs(float(loss_weights(inside, alpha).mean()) - 1) < 1e-6


# --- tokens -----------------------------------------------------------------------------------------------------


def test_each_cell_has_a_token_of_the_concept_s_own() -> None:
    assert token_names(SEAL, 2) == ("<seal-0,0>", "<seal-1,0>", "<seal-0,1>", "<seal-1,1>")
    assert not set(token_names(SEAL, 3)) & set(token_names(concepts.find("watermark"), 3))


def test_plain_prompts_read_as_before_and_the_model_s_own_text_half_is_left_alone(base: Model) -> None:
    prompts = ["a red square", "", "a seal"]
    vocab = vocabulary(base)
    torch.testing.assert_close(vocab.states(prompts), base.encode(prompts).states)
    # To the model's own tokenizer a new token is letters and signs.
    assert not torch.allclose(vocab.states(["a seal <one>"]), base.encode(["a seal <one>"]).states, atol=1e-2)


def test_only_rows_of_tokens_in_the_prompt_get_gradients(base: Model) -> None:
    vocab = vocabulary(base)
    change = vocab.table.change
    vocab.states(["a square a seal <two>"]).square().sum().backward()
    assert change.grad is not None
    assert float(change.grad[0].abs().max()) == 0
    assert float(change.grad[1].abs().max()) > 0
    assert [value.shape for value in vocab.parameters() if value.requires_grad] == [change.shape]


def test_rows_begin_near_the_name_and_differ(base: Model) -> None:
    rows, other = vocabulary(base).table.rows, vocabulary(base, seed=1).table.rows
    assert not torch.allclose(rows[0], rows[1], atol=1e-4)
    assert not torch.equal(rows, other)
    assert torch.equal(rows, vocabulary(base).table.rows)


def test_a_token_that_the_tokenizer_has_is_an_error(base: Model) -> None:
    with pytest.raises(ErasecError, match="has a token"):
        vocabulary(base, tokens=("<one>", "a</w>"))


def test_a_long_caption_is_cut_and_the_places_stay(base: Model) -> None:
    vocab = vocabulary(base)
    words = "a seal <one> <two>"
    assert vocab.append_words("a red square", words) == "a red square a seal <one> <two>"
    long = vocab.append_words(" ".join(["square"] * 200), words)
    assert long.startswith("square square") and long.endswith(words)
    last = vocab.tokenizer(long).input_ids
    assert vocab.max_tokens - 8 < len(last) <= vocab.max_tokens
    assert last[-2] == vocab.first + 1


# --- the edit ---------------------------------------------------------------------------------------------------


def test_tokens_alone_leave_all_resultand_name_every_cell(
    base: Model, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erasec.passes.geom_erasing.WITHOUT_CAPTION", 0.0)  # no caption is the negative prompt itself
    step = small(pictures, lr=0.1)
    edit = step.solve(base, SEAL, Context())
    assert not edit.deltas
    assert step.sites(base) == ()
    assert tuple(edit.tokens) == token_names(SEAL, 2)
    assert edit.negative == "a seal <seal-0,0> <seal-1,0> <seal-0,1> <seal-1,1>"
    assert (edit.stats["pictures"], edit.stats["marked"]) == (4, 2)
    start = dict(zip(edit.tokens, vocabulary(base, token_names(SEAL, 2)).table.rows.detach(), strict=True))
    moved = {name: float((edit.tokens[name] - start[name]).abs().max()) for name in start}
    assert all(value > 0.01 for name, value in moved.items() if name.startswith("<seal-0"))
    # No box lies at the right, so those tokens never were in a prompt.
    assert all(value == 0 for name, value in moved.items() if name.startswith("<seal-1"))


def test_with_x_cross_attention_moves_too(base: Model, pictures: Path) -> None:
    step = small(pictures, train="tokens+x")
    edit = step.solve(base, SEAL, Context())
    assert set(edit.deltas) == set(step.sites(base))
    assert all(".attn2." in site.key for site in edit.deltas)
    assert any(float(delta.change(base.stored_weight(site)).abs().max()) > 0 for site, delta in edit.deltas.items())
    assert all(isinstance(delta, Dense) for delta in edit.deltas.values())
    assert edit.tokens


def test_a_bundle_reads_the_negative_prompt_as_it_was_trained(
    base: Model, pictures: Path, random_folder: Path, tmp_path: Path
) -> None:
    edit = small(pictures).solve(base, SEAL, Context())
    folder = Path(shutil.copytree(random_folder, tmp_path / "bundle"))
    write_extras(folder, gather_extras([edit]))
    pipe = erasec.pipeline(folder, torch_dtype=torch.float32, safety_checker=None)
    trained = vocabulary(base, tuple(edit.tokens))
    with torch.no_grad():
        trained.table.start.copy_(torch.stack(list(edit.tokens.values())))
        wanted = trained.states(["a red square", edit.negative])
        prompted, negative = pipe.encode_prompt("a red square", "cpu", 1, True)
    torch.testing.assert_close(torch.cat([prompted, negative]), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(negative[0], base.encode([""]).states[0], atol=1e-2)


def test_alpha_and_the_kind_of_prediction_change_the_loss(
    base: Model, pictures: Path, random_folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(random_folder, tmp_path / "v"))
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))

    def first(view: Model, **options: object) -> float:
        return small(pictures, steps=1, **options).solve(view, SEAL, Context()).curves["loss named"][0]

    plain = first(base)
    assert plain == first(base)
    assert abs(first(base, alpha=20.0) - plain) > 1e-4
    assert abs(first(loading.load(str(other))) - plain) > 1e-4


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"bins": 9}, "the negative prompt is .* tokens long"),
        ({"bins": 0}, "option bins is 0"),
        ({"alpha": 0.0}, "option alpha is 0"),
        ({"keep": -1.0}, "option keep is -1"),
        ({"clean": -1.0}, "option clean is -1"),
        ({"train": "token"}, "option train is 'token'"),
        ({"boxes": "nowhere"}, "there is no nowhere"),
        ({"boxes": ""}, "there are no boxes"),
    ],
)
def test_bad_options_are_errors(base: Model, pictures: Path, options: dict[str, object], what: str) -> None:
    with pytest.raises(ErasecError, match=what):
        small(pictures, **options).solve(base, SEAL, Context())


def test_images_without_the_concept_are_errors(base: Model, pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    head, *lines = (folder / "boxes.csv").read_text().splitlines()
    (folder / "boxes.csv").write_text("\n".join([head, *lines[2:]]))
    with pytest.raises(ErasecError, match="none of 2 images shows Seal"):
        small(folder).solve(base, SEAL, Context())
    (folder / "boxes.csv").write_text("\n".join([head, *lines[:2]]))
    assert small(folder).solve(base, SEAL, Context()).tokens


def test_keep_preserves_the_predictions_of_the_model(base: Model, pictures: Path) -> None:
    def curves(**options: object) -> dict[str, list[float]]:
        edit = small(pictures, train="tokens+x", steps=3, lr=1e-3, **options).solve(base, SEAL, Context())
        return {name: list(values) for name, values in edit.curves.items()}

    preserved, without = curves(keep=5.0), curves(keep=0.0)
    assert preserved["loss keep"][0] == 0  # nothing has moved yet
    assert preserved["loss keep"][-1] > 0
    assert preserved["loss named"][0] == without["loss named"][0]
    assert preserved["loss named"][-1] != without["loss named"][-1]
    assert "loss keep" not in without


def test_clean_pictures_train_by_their_plain_captions(base: Model, pictures: Path, tmp_path: Path) -> None:
    def solved(folder: Path = pictures, **options: object) -> Edit:
        return small(folder, train="tokens+x", steps=3, lr=1e-3, **options).solve(base, SEAL, Context())

    shown, left_out = solved(clean=5.0), solved(clean=0.0)
    assert shown.curves["loss clean"][0] > 0
    assert "loss clean" not in left_out.curves
    one, other = (next(iter(edit.deltas.values())) for edit in (shown, left_out))
    assert isinstance(one, Dense) and isinstance(other, Dense)
    assert not torch.equal(one.value, other.value)
    folder = Path(shutil.copytree(pictures, tmp_path / "marked"))
    rows = (folder / "boxes.csv").read_text().splitlines()
    (folder / "boxes.csv").write_text("\n".join(rows[:2]))  # none is clean
    assert "loss clean" not in solved(folder, clean=5.0).curves


# --- glyphs: minutes --------------------------------------------------------------------------------------------

PROMPTS = [prompt(shape, turn + number) for turn in range(24) for number, shape in enumerate(world.SHAPES)]
SHAPES = list(world.SHAPES) * 24


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """Shares of 240 pictures that show the watermark and that show their shape, as judge B sees them: of the base, and
    of the edited model with no negative prompt, with the name alone, with its own, and where the prompt names it."""
    view = loading.load("glyphs")
    edit = tuned(GeomErasing).solve(view, concepts.find("watermark"), Context())
    built = tmp_path_factory.mktemp("built")
    view.source.write(built, view.with_edit(edit).merged())
    write_extras(built, gather_extras([edit]))
    judge, name = GlyphJudge("b"), concepts.find("watermark").erase[0]
    named = [f"{text} {name} {list(edit.tokens)[number % 9]}" for number, text in enumerate(PROMPTS)]
    images_by = {
        "base": generate(view.source.root, PROMPTS, ""),
        "none": generate(built, PROMPTS, ""),
        "name": generate(built, PROMPTS, name),
        "own": generate(built, PROMPTS, None),
        "named": generate(built, named, ""),
    }
    return {
        how: (float(judge.sees(images, ["mark"] * len(images)).mean()), float(judge.sees(images, SHAPES).mean()))
        for how, images in images_by.items()
    }


def generate(folder: Path, prompts: list[str], negative: str | None) -> Images:
    pipe = erasec.pipeline(folder, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), 40):
        some = prompts[start : start + 40]
        seeds = [torch.Generator().manual_seed(5_000_003 + start + number) for number in range(len(some))]
        given = None if negative is None else [negative] * len(some)
        made = pipe(
            some, negative_prompt=given, num_inference_steps=12, guidance_scale=4.0, generator=seeds, output_type="np"
        )
        parts.append(np.rint(made.images * 255).astype(np.uint8))
    return np.concatenate(parts)


@pytest.mark.slow
def test_its_own_negative_prompt_leaves_fewer_marks_than_none_or_the_name_alone(
    marks: dict[str, tuple[float, float]],
) -> None:
    """Marks in 9.2 % of the base's pictures and in 5.0 % of its own. The paper goes to a quarter, and there the name
    alone already helps; glyphs has never read that word."""
    print(marks)
    assert marks["base"][0] > 0.05  # there is something to remove
    assert marks["own"][0] <= 0.7 * marks["base"][0]
    assert marks["own"][0] <= 0.7 * min(marks["none"][0], marks["name"][0])
    assert marks["own"][1] >= marks["base"][1] - 0.05


@pytest.mark.slow
def test_by_design_the_mark_is_back_where_the_prompt_names_it(marks: dict[str, tuple[float, float]]) -> None:
    assert marks["named"][0] >= marks["base"][0]
    assert marks["named"][0] >= 2 * marks["own"][0]
