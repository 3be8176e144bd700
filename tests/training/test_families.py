"""The contract of learned passes on the families beyond Stable Diffusion 1 and 2.

Each trains its sites and nothing else, diffusers' pipeline paints with the result, and neither parts of a batch nor an
interruption change it; or it says why the method has no counterpart there. Passes and families come from their tables,
so that new ones are tested too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_models
import torch
from joint_models import pipeline as joint_pipeline
from PIL import Image

import erasec
from erasec import registry
from erasec.attention.processors import attached_rows
from erasec.base import Context, Pass
from erasec.checkpoint.safetensors import read_tensor
from erasec.errors import ErasecError
from erasec.keys.key_file import fold_secret
from erasec.model.edit import Edit
from erasec.model.loading import load
from erasec.model.sidecar import Extras, gather_extras, write_extras
from erasec.model.view import Model
from erasec.recipe.concept import Concept
from erasec.training import loop
from erasec.training.base import NEEDS, Learned, Measures, TrainingContext
from erasec.training.denoiser import Denoiser

STAR = Concept(name="star", erase=("star",), anchor="circle", keep=("square",), templates=("a photo of a {}",))
SIDE = 64
FAMILIES = ("sdxl", "sd3", "flux")
LEARNED = [name for name in sorted(registry.passes()) if issubclass(registry.load_pass(name), Learned)]
# The passes that have no counterpart in a family, with what they lack there. All others must run.
REFUSED = {
    ("sdxl", "geom_erasing"): "one text encoder",
    ("sd3", "geom_erasing"): "one text encoder",
    ("flux", "geom_erasing"): "one text encoder",
    ("flux", "trce"): "unconditional",
    ("flux", "trce.steer"): "unconditional",
    ("flux", "kpop"): "unconditional",
    ("flux", "harden"): "unconditional",
}
RUN = [(family, name) for family in FAMILIES for name in LEARNED if (family, name) not in REFUSED]
SMALL: dict[str, Any] = {
    "steps": 2,
    "trajectories": 2,
    "sample_steps": 2,
    "images": 2,
    "batch": 2,
    "searches": 2,
    "final_steps": 1,
    "min_cosine": 0.0,
    "max_rise": 0.0,
    "margin": 100.0,
    "toward": "anchor",
}


@pytest.fixture(scope="module")
def triplets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("triplets"), np.random.default_rng(0)
    for part in ("concept", "censored", "benign"):
        (folder / part).mkdir()
        for number in range(2):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def made(family: str) -> Model:
        folder = tmp_path_factory.mktemp(family) / "model"
        if family == "sdxl":
            random_models.random_folder(folder, family, "tiny")
        else:
            joint_pipeline(family, levels=4).save_pretrained(folder)
        return load(str(folder))

    return made


def short(model: Model) -> Model:
    """The model with fewer tokens of T5, for trainings of a second."""
    context, *others = model.family.streams
    parts = tuple(replace(part, length=part.length and 6) for part in context.parts)
    return replace(model, family=replace(model.family, streams=(replace(context, parts=parts), *others)))


def small(name: str, triplets: Path, **options: Any) -> Pass:
    kind = registry.load_pass(name)
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    given = SMALL | {"triplets": str(triplets)} | options
    return kind(**{key: value for key, value in given.items() if key in known})


def solved(model: Model, step: Pass, context: Context | None = None) -> Edit:
    (edit,) = step.solve_all(short(model), [STAR], context or Context(side=SIDE))
    return edit


def painted(folder: Path, family: str) -> torch.Tensor:
    """Latents that diffusers' pipeline of a folder makes, with all that the folder carries."""
    pipe = erasec.pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": SIDE, "width": SIDE, "output_type": "latent"}
    if family != "sdxl":
        options["max_sequence_length"] = 6  # as in ``short``
    latents: torch.Tensor = pipe("a photo of a star", generator=torch.Generator().manual_seed(0), **options).images
    return latents


@pytest.mark.parametrize(("family", "name"), RUN)
def test_it_changes_its_sites_alone_and_the_pipeline_paints_with_it(
    models: Any, family: str, name: str, triplets: Path, tmp_path: Path
) -> None:
    model, step = models(family), small(name, triplets)
    edit = solved(model, step)
    edited = model.with_edit(edit)
    model.source.write(tmp_path, edited.merged())
    write_extras(tmp_path, gather_extras([edit]))
    allowed = {(site.component, site.key) for site in step.sites(model)}
    changed = set()
    for component in model.family.components:
        old, new = model.entries(component), load(str(tmp_path)).entries(component)
        assert old.keys() == new.keys()
        changed |= {(component, key) for key in old if not torch.equal(read_tensor(old[key]), read_tensor(new[key]))}
    assert changed and changed <= allowed
    assert len(changed) > len(allowed) // 3
    before, after = painted(model.source.root, family), painted(tmp_path, family)
    assert bool(after.isfinite().all()) and not torch.equal(before, after)


class Sgd(torch.optim.SGD):
    """Plain descent: Adam's first steps turn the rounding of a gradient near zero into whole steps."""

    def __init__(self, parameters: list[torch.Tensor], *_: object) -> None:
        super().__init__(parameters, 1e-3)


@pytest.fixture
def descent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "optimizer_class", lambda name: Sgd)


def vector(edit: Edit) -> torch.Tensor:
    changes = [delta.change(torch.zeros(site.shape)).flatten() for site, delta in sorted(edit.deltas.items())]
    return torch.cat(changes)


@pytest.mark.usefixtures("descent")
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("sdxl", "kpop"),
        ("sdxl", "harden"),
        ("sd3", "kpop"),
        ("sd3", "trce"),
        ("sd3", "few_shot"),
        ("flux", "safegen"),
    ],
)
def test_parts_of_a_batch_and_resuming_give_the_same_edit(
    models: Any, family: str, name: str, triplets: Path, tmp_path: Path
) -> None:
    model, step = models(family), small(name, triplets, rank=2)
    resumed = TrainingContext(side=SIDE, resume_folder=tmp_path)
    whole = vector(solved(model, step, resumed))
    assert float(whole.norm()) > 0
    assert torch.equal(vector(solved(model, step, resumed)), whole) and list(tmp_path.iterdir())
    parts = vector(solved(model, step, TrainingContext(side=SIDE, measures=Measures(1))))
    assert float((parts - whole).norm()) < 1e-3 * float(whole.norm())
    other = vector(solved(model, small(name, triplets, rank=2, batch=1)))  # the control
    assert float((other - whole).norm()) > 1e-2 * float(whole.norm())


@pytest.mark.parametrize(
    ("family", "name", "loss", "options"),
    [
        ("sd3", "kpop", "loss hide", {"lr": 1e-2, "toward": "nothing"}),
        ("sd3", "trce.steer", "loss erase", {"lr": 1e-2, "push": 1.0, "margin": 1.0, "preserve": 0.0}),
        ("sd3", "safegen", "loss erase", {"lr": 1e-2, "keep": 0.0, "ema": 0.0}),
        ("sdxl", "kpop", "loss hide", {"lr": 1e-3, "toward": "nothing"}),
        ("sdxl", "harden", "loss erase", {"lr": 1e-3, "keep": 0.0}),
        ("sdxl", "few_shot", "loss erase", {"lr": 1e-3}),
    ],
)
def test_its_loss_falls(
    models: Any, family: str, name: str, loss: str, options: dict[str, Any], triplets: Path
) -> None:
    edit = solved(models(family), small(name, triplets, steps=12, batch=4, **options))
    curve = edit.curves[loss]
    assert sum(curve[-4:]) < sum(curve[:4])


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_a_pass_without_a_counterpart_is_refused_before_any_work(models: Any, family: str, name: str) -> None:
    model = models(family)
    with pytest.raises(ErasecError, match=f"family {family} cannot be trained") as caught:
        registry.load_pass(name)().sites(model)
    need: Any = REFUSED[family, name]
    assert caught.value.why == NEEDS[need][1].format(title=model.family.title)
    others = caught.value.fix.removeprefix("choose ").split(", or a closed-form pass")[0].split(", ")
    assert others == [other for kind, other in RUN if kind == family]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_eiup_is_refused_where_attention_is_joint(models: Any, family: str) -> None:
    with pytest.raises(ErasecError, match=f"eiup does not fit a model of the family {family}") as caught:
        registry.load_pass("eiup")().sites(models(family))
    assert "changes those of a text by picture and timestep" in caught.value.why


def test_eiup_is_read_by_the_pipeline_of_sdxl(models: Any, tmp_path: Path) -> None:
    """It acts on the prompted half of a guided batch, and on all of a batch without guidance."""
    model = models("sdxl")
    edit = solved(model, registry.load_pass("eiup")(weight=-4.0, until=1.0))
    assert len(edit.memories) == len(model.select("cross", "k"))
    model.source.write(tmp_path, {})
    write_extras(tmp_path, gather_extras([edit]))
    before, after = painted(model.source.root, "sdxl"), painted(tmp_path, "sdxl")
    assert bool(after.isfinite().all()) and not torch.allclose(before, after, atol=1e-4)
    pipe = erasec.pipeline(tmp_path)
    state = next(value.state for value in pipe.unet.attn_processors.values() if hasattr(value, "state"))
    for guided in (True, False):
        pipe.encode_prompt("a star", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided)
        assert state.guided == guided


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_key_is_the_same_as_rows_as_constants_and_in_the_pipeline(models: Any, family: str, tmp_path: Path) -> None:
    model = models(family)
    step = registry.load_pass("kpop")(steps=1, trajectories=1, sample_steps=2, mode="all", key_rows=4, lr=1e-2)
    edit = solved(model, step)
    secret = edit.secret
    assert secret is not None
    edited = model.with_edit(edit)
    model.source.write(tmp_path / "public", edited.merged())
    public = load(str(tmp_path / "public"))
    memories = fold_secret(secret, public.entries(public.family.denoiser))
    assert [memory.attention for memory in memories] == list(secret.attentions)
    public.source.write(tmp_path / "keyed", {})
    write_extras(tmp_path / "keyed", Extras(memories))

    def prediction(of: Model, rows: bool = False) -> torch.Tensor:
        denoiser = Denoiser(short(of), Context(side=SIDE))
        inputs = denoiser.draw([3]), torch.tensor([700]), denoiser.states(["a star"])
        with torch.no_grad():
            if not rows:
                return denoiser.predict(*inputs)
            with attached_rows(denoiser.unet, secret.k_rows, secret.v_rows, secret.attentions):
                return denoiser.predict(*inputs)

    with_rows, folded = prediction(public, True), prediction(load(str(tmp_path / "keyed")))
    torch.testing.assert_close(folded, with_rows, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(prediction(public), with_rows, atol=1e-4)  # the control: without the key
    if family == "sd3":
        latents = Denoiser(short(load(str(tmp_path / "keyed"))), Context(side=SIDE))
        made = latents.sample(["a photo of a star"], [0], 2, 3.0).final
        torch.testing.assert_close(made, painted(tmp_path / "keyed", family), atol=1e-4, rtol=1e-3)
    else:
        keyed, plain = (painted(tmp_path / name, family) for name in ("keyed", "public"))
        assert bool(keyed.isfinite().all()) and not torch.allclose(keyed, plain, atol=1e-4)


def test_modes_of_a_row_of_blocks_start_in_its_middle(models: Any) -> None:
    kind, model = registry.load_pass("kpop"), models("sd3")
    names = {mode: kind(mode=mode).attentions(model) for mode in ("mid", "midout", "all")}  # type: ignore[attr-defined]
    assert names["all"] == ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
    assert names["mid"] == names["midout"] == ("transformer_blocks.1.attn",)


def test_few_shot_trains_the_layers_that_are_read_of_each_encoder(models: Any) -> None:
    """Of the first encoder of sdxl the denoiser reads the penultimate state alone, and of the second the pooled one."""
    kind: Any = registry.load_pass("few_shot")
    for family in FAMILIES:
        model = models(family)
        assert {site.component for site in kind().sites(model)} == set(model.family.text_encoders)
    first = [site.key for site in kind(train="mlp").sites(models("sdxl")) if site.component == "text_encoder"]
    second = [site.key for site in kind(train="mlp").sites(models("sdxl")) if site.component == "text_encoder_2"]
    assert {key.split("layers.")[1][0] for key in first} == {"0"}
    assert {key.split("layers.")[1][0] for key in second} == {"0", "1", "2"}
    t5 = {site.key.split(".")[-2] for site in kind().sites(models("sd3")) if site.component == "text_encoder_3"}
    assert t5 == {"wi", "wo", "q", "k", "v", "o"}


@pytest.mark.parametrize("family", FAMILIES)
def test_states_with_gradients_are_the_states(models: Any, family: str) -> None:
    from erasec.model.text_encoders import TextEncoders

    model = models(family)
    denoiser, encoders = Denoiser(short(model), Context(side=SIDE)), TextEncoders(model.source)
    prompts = ["a star", "", "a square"]
    states = denoiser.encode_prompts(prompts, encoders)
    torch.testing.assert_close(states.detach(), denoiser.states(prompts))
    states.square().sum().backward()
    for name in model.family.text_encoders:
        grads = [value.grad for value in encoders.encoder(name).parameters() if value.grad is not None]
        assert max(float(grad.abs().max()) for grad in grads) > 0
