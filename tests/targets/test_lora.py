"""Target lora: diffusers loads the file to the edited model, and a truncated one loses what the algebra predicts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import random_models
import torch
from torch import Tensor

from erasec.base import Check, Context
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import patch_file, read_header, read_tensor, save_tensors
from erasec.errors import ErasecError
from erasec.family import FAMILIES, Site
from erasec.model import loading
from erasec.model.edit import Dense, Edit, LowRank, Remap
from erasec.model.view import Model
from erasec.options import configure
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept
from erasec.targets.lora import FILE, Lora, edited_sites, factors, loss_check, site_tensors, truncate

STAR = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))
HEART = Concept(name="heart", erase=("heart",), anchor="square", keep=("ring",))
SITE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
START = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed, and diffusers loads no LoRA without it"
)


def edited_by(model: Model, *concepts: Concept) -> Model:
    for concept in concepts:
        model = model.with_edit(Uce().solve(model, concept, Context()))
    return model


def with_deltas(model: Model, deltas: dict[Site, Any]) -> Model:
    """A view with an edit that no pass makes, unchecked."""
    return replace(model, edits=(Edit(deltas, by="hand", concepts=("none",), base=""),))


def export(model: Model, out: Path, **options: Any) -> Check:
    """The one check of an export."""
    out.mkdir(exist_ok=True)
    (check,) = Lora(**options).export(model, out, Context()).checks
    assert check.name == "lora/loss"
    return check


def fused(pipe: Any, folder: Path) -> Any:
    pipe.load_lora_weights(folder)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


def changed_weights(before: dict[str, Tensor], module: torch.nn.Module) -> dict[str, Tensor]:
    """The changes of a module's tensors, float64, without those that are the same bit for bit."""
    after = module.state_dict()
    assert after.keys() == before.keys()
    return {
        key: after[key].double() - value.double() for key, value in before.items() if not torch.equal(after[key], value)
    }


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def read_ranks(folder: Path) -> list[int]:
    return [entry.shape[0] for key, entry in read_header(folder / FILE)[0].items() if key.endswith("lora_down.weight")]


def change(model: Model, site: Site) -> Tensor:
    return model.weight(site) - model.stored_weight(site).double()


def distance(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model(base: Model) -> Model:
    return edited_by(base, STAR)


def site_of(model: Model, key: str = SITE) -> Site:
    (site,) = (candidate for candidate in model.sites if candidate.key == key)
    return site


@needs_peft
def test_diffusers_loads_it_to_the_edited_unet(base: Model, tmp_path: Path) -> None:
    """Two edits in sequence: fused, every site has its change, and no other tensor of the pipeline has changed."""
    from diffusers import StableDiffusionPipeline

    model = edited_by(base, STAR, HEART)
    assert export(model, tmp_path).passed
    pipe = StableDiffusionPipeline.from_pretrained(base.source.root, torch_dtype=torch.float32)
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    before = [snapshot(part) for part in parts]
    fused(pipe, tmp_path)
    unet, *others = (changed_weights(state, part) for state, part in zip(before, parts, strict=True))
    assert others == [{}, {}]
    assert unet.keys() == {site.key for site in edited_sites(model)}
    assert len(unet) == 14
    assert max(distance(unet[site.key], change(model, site)) for site in edited_sites(model)) < 1e-5
    assert len(set(read_ranks(tmp_path))) > 1  # diffusers takes one alpha for all
    # A file of the first edit alone is another model.
    first = replace(model, edits=model.edits[:1])
    assert min(distance(unet[site.key], change(first, site)) for site in edited_sites(model)) > 1e-2


@needs_peft
def test_diffusers_loads_it_to_the_edited_sdxl_unet(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    random_models.random_folder(tmp_path / "sdxl", "sdxl", "tiny")
    base = loading.load(str(tmp_path / "sdxl"))
    sites = base.select("cross", "kv")
    width = sites[0].shape[1]
    remap = Remap(random(width, 3), random(3, width, seed=1) / width)
    model = base.with_edit(Edit(dict.fromkeys(sites, remap), by="hand", concepts=("none",), base=""))
    assert export(model, tmp_path / "lora").passed
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "sdxl" / "unet")
    before = snapshot(unet)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(tmp_path / "lora", unet_config=unet.config)
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet)
    unet.fuse_lora()
    unet.unload_lora()
    changes = changed_weights(before, unet)
    assert changes.keys() == {site.key for site in sites}
    assert max(distance(changes[site.key], change(model, site)) for site in sites) < 1e-5


def test_the_matrix_of_the_pooled_state_is_refused_because_readers_leave_it_out(tmp_path: Path) -> None:
    random_models.random_folder(tmp_path / "sdxl", "sdxl", "tiny")
    base = loading.load(str(tmp_path / "sdxl"))
    with pytest.raises(ErasecError, match=r"add_embedding\.linear_1\.weight cannot be written") as caught:
        Lora().accept(Uce().sites(base))
    assert "uce:routes=tokens" in caught.value.fix
    Lora().accept(Uce(routes="tokens").sites(base))


def sd3_transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )


def flux_transformer() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )


@needs_peft
@pytest.mark.parametrize(
    ("family", "make", "pipeline"),
    [
        ("sd3", sd3_transformer, "StableDiffusion3Pipeline"),
        ("flux", flux_transformer, "FluxPipeline"),
    ],
)
def test_loaders_apply_a_change_of_a_transformer_whose_sites_differ_in_rank(
    tmp_path: Path, family: str, make: Callable[[], Any], pipeline: str
) -> None:
    """With diffusers' loader, and with peft alone as older versions of diffusers call it: one alpha for all sites."""
    import diffusers
    import peft

    torch.manual_seed(0)
    transformer = make()
    transformer.save_pretrained(tmp_path / "transformer")
    folder = Folder(tmp_path)
    keys = ("context_embedder.weight", "transformer_blocks.0.attn.add_k_proj.weight")
    shapes = {key: entry.shape for key, entry in folder.entries("transformer").items()}
    sites = [Site("transformer", key, shapes[key], "cross", "k", "context") for key in keys]
    deltas = {
        site: LowRank(random(site.shape[0], rank), random(rank, site.shape[1], seed=1))
        for rank, site in zip((6, 2), sites, strict=True)
    }
    model = with_deltas(
        Model(replace(FAMILIES[family], components=("transformer",), streams=()), folder, family), deltas
    )
    assert export(model, tmp_path / "lora").passed
    before = snapshot(transformer)
    kind = getattr(diffusers, pipeline)
    state = kind.lora_state_dict(tmp_path / "lora")
    kind.load_lora_into_transformer(state, *([None] if family == "flux" else []), transformer=transformer)
    transformer.fuse_lora()
    transformer.unload_lora()

    stored = {key: read_tensor(entry) for key, entry in read_header(tmp_path / "lora" / FILE)[0].items()}
    ranks = {key: len(value) for key, value in stored.items() if ".lora_A." in key}
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=next(iter(ranks.values())),
        target_modules=[key.removesuffix(".weight") for key in keys],
    )
    bare = peft.get_peft_model(type(transformer).from_pretrained(tmp_path / "transformer"), config)
    renamed = {f"base_model.model.{key.removeprefix('transformer.')}": value for key, value in stored.items()}
    assert not peft.set_peft_model_state_dict(bare, renamed).unexpected_keys
    merged = bare.merge_and_unload()
    for loaded in (transformer, merged):
        changes = changed_weights(before, loaded)
        assert changes.keys() == set(keys)
        assert max(distance(changes[site.key], change(model, site)) for site in sites) < 1e-5


def test_the_keys_are_kohyas(model: Model, tmp_path: Path) -> None:
    check = export(model, tmp_path)
    entries, metadata = read_header(tmp_path / FILE)
    assert len(entries) == 3 * 14
    down, up, alpha = (entries[f"{START}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    rank = down.shape[0]
    assert (down.shape, up.shape, alpha.shape) == ((rank, 128), (64, rank), ())
    assert float(read_tensor(alpha)) == 1
    assert {entry.dtype for entry in entries.values()} == {"F32"}
    assert metadata == {"format": "pt", "ss_base_model_version": "sd_v1"}
    stored = sum(model.stored_weight(site).nbytes for site in edited_sites(model))
    assert f"{(tmp_path / FILE).stat().st_size} bytes, the edited tensors themselves have {stored}" in check.how
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_keys_of_transformers_are_those_of_diffusers() -> None:
    site = Site("transformer", "transformer_blocks.0.attn.add_k_proj.weight", (3, 4), "context", "k", "0")
    up, down = random(3, 2), random(2, 4)
    tensors = site_tensors(site, up, down, torch.float16)
    start = "transformer.transformer_blocks.0.attn.add_k_proj"
    assert tensors.keys() == {f"{start}.lora_A.weight", f"{start}.lora_B.weight"}
    assert torch.equal(tensors[f"{start}.lora_A.weight"], down.half())
    assert torch.equal(tensors[f"{start}.lora_B.weight"], up.half())


def test_a_file_says_which_base_it_is_for(base: Model, tmp_path: Path) -> None:
    site = site_of(base)
    small = with_deltas(base, {site: LowRank(random(site.shape[0], 1), random(1, site.shape[1]))})
    by_family = {}
    for name in ("sd1", "sd2", "sdxl"):
        export(replace(small, family=replace(base.family, lora=FAMILIES[name].lora)), tmp_path / name)
        by_family[name] = read_header(tmp_path / name / FILE)[1]
    assert {name: metadata["ss_base_model_version"] for name, metadata in by_family.items()} == {
        "sd1": "sd_v1",
        "sd2": "sd_v2",
        "sdxl": "sdxl_base_v1-0",
    }
    assert {name for name, metadata in by_family.items() if metadata.get("ss_v2") == "True"} == {"sd2"}


def test_the_same_model_gives_the_same_bytes(base: Model, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(edited_by(base, STAR), tmp_path / name)
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
    export(edited_by(base, HEART), tmp_path / "three")
    assert (tmp_path / "one" / FILE).read_bytes() != (tmp_path / "three" / FILE).read_bytes()


def test_a_cut_loses_the_tail_of_the_singular_values(model: Model, tmp_path: Path) -> None:
    values = [torch.linalg.svdvals(change(model, site)) for site in edited_sites(model)]
    whole = sum(float(value.square().sum()) for value in values)
    losses = []
    for rank in (8, 4, 2, 1):
        check = export(model, tmp_path / str(rank), rank=rank)
        tail = sum(float(value[rank:].square().sum()) for value in values)
        assert check.value == pytest.approx((tail / whole) ** 0.5, rel=1e-4, abs=1e-7)
        assert check.limit is None
        assert check.passed
        assert f"rank {rank} to {rank}, F32" in check.how
        losses.append(check.value)
    assert losses == sorted(losses)
    assert losses[-1] > 2 * losses[0]
    assert losses[-1] > 1e-2


def test_the_loss_of_half_precision_is_reported_and_not_enforced(model: Model, tmp_path: Path) -> None:
    whole, half = (export(model, tmp_path / dtype, dtype=dtype) for dtype in ("float32", "float16"))
    assert whole.limit == 1e-5
    assert whole.value < 1e-6 < 1e-5 < half.value < 1e-3
    assert half.limit is None
    assert half.passed
    assert (tmp_path / "float16" / FILE).stat().st_size < 0.6 * (tmp_path / "float32" / FILE).stat().st_size


def test_the_tolerance_is_the_limit(model: Model, tmp_path: Path) -> None:
    check = export(model, tmp_path, tolerance=1e-12)
    assert check.limit == 1e-12
    assert not check.passed


@pytest.mark.parametrize("suffix", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_a_damaged_file_fails(model: Model, tmp_path: Path, suffix: str) -> None:
    export(model, tmp_path)
    assert loss_check(model, tmp_path / FILE, 1e-5).passed
    key = f"{START}.{suffix}"
    tensor = read_tensor(read_header(tmp_path / FILE)[0][key])
    patch_file(tmp_path / FILE, tmp_path / FILE, {key: lambda: tensor * 1.5})
    check = loss_check(model, tmp_path / FILE, 1e-5)
    site = site_of(model)
    whole = sum(float(change(model, edited).square().sum()) for edited in edited_sites(model)) ** 0.5
    assert not check.passed
    assert check.value == pytest.approx(0.5 * float(change(model, site).norm()) / whole, rel=1e-4)
    assert f"worst 0.5 at {SITE}" in check.how


def test_a_file_that_lacks_a_site_or_is_not_finite_fails(model: Model, tmp_path: Path) -> None:
    export(model, tmp_path)
    file = tmp_path / FILE
    tensors = {key: read_tensor(entry) for key, entry in read_header(file)[0].items()}
    save_tensors(file, {key: value for key, value in tensors.items() if not key.startswith(START)})
    check = loss_check(model, file, 1e-5)
    assert not check.passed
    assert f"worst 1 at {SITE}" in check.how
    save_tensors(file, tensors | {f"{START}.alpha": torch.tensor(float("nan"))})
    assert not loss_check(model, file, None).passed


def test_another_models_file_fails(base: Model, model: Model, tmp_path: Path) -> None:
    export(model, tmp_path)
    check = loss_check(edited_by(base, HEART), tmp_path / FILE, 1e-5)
    assert not check.passed
    assert check.value > 1e-2


def test_all_kinds_of_deltas_in_any_order(base: Model, tmp_path: Path) -> None:
    site = site_of(base)
    height, width = site.shape
    deltas = (
        LowRank(random(height, 2), random(2, width, seed=1)),
        Remap(random(width, 3, seed=2) / width, random(3, width, seed=3)),
        Dense(random(height, 1, seed=4) @ random(1, width, seed=5)),
        Remap(random(width, 1, seed=6) / width, random(1, width, seed=7)),
    )
    ranks = []
    for count, order in ((1, deltas), (2, deltas), (3, deltas), (4, deltas), (4, deltas[::-1])):
        model = replace(base, edits=tuple(Edit({site: delta}, "hand", ("none",), "") for delta in order[:count]))
        left, right = factors(base.stored_weight(site), model.deltas(site))
        assert distance(left @ right, change(model, site)) < 1e-12
        up, down = truncate(left, right)
        assert distance(up @ down, change(model, site)) < 1e-12
        ranks.append(len(down))
        assert export(model, tmp_path).passed
    assert ranks == [2, 5, 6, 7, 7]


def test_a_change_of_full_rank_is_exact_and_no_wider_than_its_matrix(base: Model, tmp_path: Path) -> None:
    site = max(base.sites, key=lambda site: site.shape[0] - site.shape[1])
    assert site.shape[0] > site.shape[1]
    model = with_deltas(base, {site: Dense(random(*site.shape))})
    assert export(model, tmp_path).passed
    ranks = {entry.shape for key, entry in read_header(tmp_path / FILE)[0].items() if "lora_down" in key}
    assert ranks == {(site.shape[1], site.shape[1])}


def test_the_cut_is_the_nearest_matrix_with_balanced_factors_and_settled_signs() -> None:
    left, right = random(9, 5), random(5, 7, seed=1)
    u, values, v = torch.linalg.svd(left @ right, full_matrices=False)
    up, down = truncate(left, right, 3)
    assert distance(up @ down, (u[:, :3] * values[:3]) @ v[:3]) < 1e-12
    assert torch.allclose(up.norm(dim=0), values[:3].sqrt())
    assert torch.allclose(down.norm(dim=1), values[:3].sqrt())
    assert bool((up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all())
    again = truncate(-left, -right, 3)
    assert torch.allclose(again[0], up)
    assert [part.shape for part in truncate(left, right, 6)] == [(9, 5), (5, 7)]
    assert [part.shape for part in truncate(left * 0, right)] == [(9, 0), (0, 7)]
    assert [part.shape for part in truncate(left[:, :0], right[:0])] == [(9, 0), (0, 7)]


def test_a_site_that_does_not_change_is_left_out(base: Model, model: Model, tmp_path: Path) -> None:
    site = site_of(base)
    still = Edit({**model.edits[0].deltas, site: Dense(torch.zeros(site.shape))}, "hand", ("none",), "")
    check = export(replace(base, edits=(still,)), tmp_path)
    assert check.passed
    assert len(read_header(tmp_path / FILE)[0]) == 3 * 13
    assert "rank 0 to " in check.how


def test_no_change_is_an_error(base: Model, tmp_path: Path) -> None:
    still = with_deltas(base, {site_of(base): Dense(torch.zeros(site_of(base).shape))})
    for model, count in ((base, 0), (still, 1)):
        with pytest.raises(ErasecError, match="no change") as error:
            Lora().export(model, tmp_path, Context())
        assert f"{count} edits" in error.value.why
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("component", "key", "shape", "words"),
    [
        ("unet", "conv_in.weight", (64, 4, 3, 3), "cannot be written as a LoRA"),
        ("unet", "conv_in.bias", (64,), "cannot be written as a LoRA"),
        ("vae", "decoder.mid_block.attentions.0.to_q.weight", (64, 64), "in vae cannot be written as a LoRA"),
    ],
)
def test_a_change_that_no_lora_can_hold_is_refused(
    base: Model, tmp_path: Path, component: str, key: str, shape: tuple[int, ...], words: str
) -> None:
    site = Site(component, key, shape, "self", "q", "")
    with pytest.raises(ErasecError, match=words) as error:
        Lora().export(with_deltas(base, {site: Dense(torch.ones(shape))}), tmp_path, Context())
    assert key in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"dtype": "float61"}, "did you mean 'float16'"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"ranks": 4}, "did you mean 'rank'"),
    ],
)
def test_a_bad_option_is_an_error(options: dict[str, object], words: str) -> None:
    with pytest.raises(ErasecError) as error:
        configure(Lora, options, "target lora")
    assert words in str(error.value)


def test_the_size_of_a_plan(base: Model, model: Model, tmp_path: Path) -> None:
    """It is an upper bound, and less than twice the size where every singular value is kept."""
    for options in ({}, {"rank": 4}, {"rank": 4, "dtype": "float16"}):
        export(model, tmp_path, **options)
        tensors = sum(entry.stop - entry.start for entry in read_header(tmp_path / FILE)[0].values()) - 4 * 14
        assert tensors <= Lora(**options).size(model) < 2 * tensors
    assert Lora(rank=1).size(base) == 4 * sum(sum(site.shape) for site in base.sites)
    assert Lora().size(base) > Lora().size(model)
