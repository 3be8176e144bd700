"""Memories in torch: attached, detached and folded exactly; and the pipeline of a bundle."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import erasec
from erasec.attention.pipeline import Sampling, generate
from erasec.attention.processors import CallState, MemoryProcessor, attach, attached_rows, detach, fold
from erasec.errors import ErasecError
from erasec.model.memory import Memory, Secret
from erasec.model.sidecar import Extras, write_extras

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"
LAST = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
INNER = {MIDDLE: 192, LAST: 64}
WIDTH = 128


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def memory(at: str = MIDDLE, rows: int = 3, **options: Any) -> Memory:
    return Memory(at, 3 * draw(10, rows, INNER[at]), 3 * draw(11, rows, INNER[at]), **options)


@pytest.fixture(scope="module")
def loaded(random_folder: Path) -> Any:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(random_folder / "unet", torch_dtype=torch.float32)
    return unet.eval().requires_grad_(False)


@pytest.fixture
def unet(loaded: Any) -> Iterator[Any]:
    """A UNet whose memories are taken off after each test."""
    yield loaded
    detach(loaded)


def run(unet: Any, step: Any = 500, batch: int = 4, **options: Any) -> Tensor:
    """The noise prediction (n, 4, 8, 8) for fixed inputs."""
    sample, states = draw(0, batch, 4, 8, 8), draw(1, batch, 77, WIDTH)
    prediction: Tensor = unet(sample, step, states, **options).sample
    return prediction


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


@pytest.fixture
def secret() -> Secret:
    return Secret("star", 3 * draw(2, 10, WIDTH), 3 * draw(3, 10, WIDTH), (MIDDLE, LAST))


def weights(unet: Any) -> Callable[[str], Tensor]:
    state = unet.state_dict()
    return lambda key: state[key]


@pytest.mark.parametrize("options", [{}, {"encoder_attention_mask": torch.arange(77).lt(50).expand(4, 77)}])
def test_memories_without_rows_give_the_bits_of_stock_attention(unet: Any, options: dict[str, Any]) -> None:
    stock = run(unet, **options)
    attach(unet, ())
    assert not any(isinstance(processor, MemoryProcessor) for processor in unet.attn_processors.values())
    attach(unet, [memory(at, rows=0) for at in INNER])
    assert sum(isinstance(processor, MemoryProcessor) for processor in unet.attn_processors.values()) == 2
    assert torch.equal(run(unet, **options), stock)
    attach(unet, [memory()])
    assert distance(run(unet, **options), stock) > 1e-3


@pytest.mark.parametrize("options", [{}, {"mode": "side", "until": 0.8, "guided": True}])
def test_detached_memories_leave_nothing_behind(unet: Any, options: dict[str, Any]) -> None:
    stock, processors = run(unet), dict(unet.attn_processors)
    attach(unet, [memory(**options), memory(LAST, **options)])
    assert distance(run(unet), stock) > 1e-3
    detach(unet)
    assert torch.equal(run(unet), stock)
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert not unet._forward_pre_hooks


def test_folded_rows_do_what_the_rows_do(unet: Any, secret: Secret) -> None:
    stock, present = run(unet), unet.state_dict().__contains__
    with attached_rows(unet, secret.k_rows, secret.v_rows, secret.attentions):
        rows = run(unet)
    assert torch.equal(run(unet), stock)
    attach(unet, fold(weights(unet), secret, present))
    assert distance(run(unet), rows) <= 1e-5
    assert distance(stock, rows) > 1e-3
    detach(unet)
    swapped = Secret("star", secret.v_rows, secret.k_rows, secret.attentions)
    attach(unet, fold(weights(unet), swapped, present))
    assert distance(run(unet), rows) > 1e-3


def test_rows_get_gradients_through_the_projections(unet: Any, secret: Secret) -> None:
    keys, values = secret.k_rows.clone().requires_grad_(), secret.v_rows.clone().requires_grad_()
    with attached_rows(unet, keys, values, secret.attentions):
        run(unet).square().sum().backward()
    for rows in (keys, values):
        assert rows.grad is not None
        assert bool((rows.grad.abs().sum(1) > 0).all())


def test_rows_add_to_attached_memories_which_stay(unet: Any, secret: Secret) -> None:
    attach(unet, [memory()])
    alone = run(unet)
    with attached_rows(unet, secret.k_rows, secret.v_rows, (MIDDLE,)):
        assert distance(run(unet), alone) > 1e-3
    assert torch.equal(run(unet), alone)


def test_rows_are_gone_after_an_error(unet: Any, secret: Secret) -> None:
    stock = run(unet)
    with pytest.raises(ZeroDivisionError), attached_rows(unet, secret.k_rows, secret.v_rows, (MIDDLE,)):
        _ = 1 / 0
    assert torch.equal(run(unet), stock)


def test_memories_of_one_attention_share_its_softmax(unet: Any) -> None:
    both = memory(rows=5)
    attach(unet, [both])
    one = run(unet)
    detach(unet)
    attach(unet, [Memory(MIDDLE, both.keys[:2], both.values[:2])])
    assert distance(run(unet), one) > 1e-4
    attach(unet, [Memory(MIDDLE, both.keys[2:], both.values[2:])])
    assert torch.equal(run(unet), one)


def split(states: Tensor, heads: int = 4) -> Tensor:
    return states.unflatten(-1, (heads, -1)).transpose(-2, -3)


def attention_inputs(loaded: Any) -> tuple[Any, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The middle attention in float64, its image and text states, and q, k, v by heads."""
    attention = copy.deepcopy(loaded.get_submodule(MIDDLE)).double()
    image, text = draw(4, 2, 16, 192).double(), draw(5, 2, 77, WIDTH).double()
    q, k, v = attention.to_q(4 * image), attention.to_k(text), attention.to_v(text)
    return attention, 4 * image, text, split(q), split(k), split(v)


def test_a_joint_memory_is_a_gate_between_text_and_memory(loaded: Any) -> None:
    attention, image, text, q, k, v = attention_inputs(loaded)
    more_k, more_v = draw(6, 10, 192).double(), draw(7, 10, 192).double()
    attention.set_processor(MemoryProcessor(attention.processor, CallState(), joint=(lambda *_: (more_k, more_v),)))
    output = attention(image, encoder_hidden_states=text)
    scale = math.sqrt(q.shape[-1])
    to_text, to_memory = q @ k.mT / scale, q @ split(more_k).mT / scale
    g = torch.sigmoid(to_memory.logsumexp(-1, True) - to_text.logsumexp(-1, True))
    assert float(g.max() - g.min()) > 0.01
    expected = (1 - g) * (to_text.softmax(-1) @ v) + g * (to_memory.softmax(-1) @ split(more_v))
    expected = attention.to_out[0](expected.transpose(1, 2).flatten(2))
    assert distance(output, expected) <= 1e-5
    text_alone = attention.to_out[0]((to_text.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert distance(output, text_alone) > 1e-2


def test_a_side_memory_is_added_before_to_out(loaded: Any) -> None:
    attention, image, text, q, k, v = attention_inputs(loaded)
    twin = copy.deepcopy(loaded)
    attach(twin, [memory(mode="side", weight=-2.0)])
    processor = twin.get_submodule(MIDDLE).processor
    attention.set_processor(processor)
    output = attention(image, encoder_hidden_states=text)
    own = memory()
    beside = (q @ split(own.keys.double()).mT / math.sqrt(q.shape[-1])).softmax(-1) @ split(own.values.double())
    plain = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    expected = attention.to_out[0]((plain - 2 * beside).transpose(1, 2).flatten(2))
    assert distance(output, expected) <= 1e-5
    assert distance(attention.to_out[0]((plain + 2 * beside).transpose(1, 2).flatten(2)), expected) > 1e-2


def test_zeros_are_a_memory_too(unet: Any) -> None:
    stock = run(unet)
    attach(unet, [Memory(at, torch.zeros(10, inner), torch.zeros(10, inner)) for at, inner in INNER.items()])
    assert distance(run(unet), stock) > 1e-4


def test_a_side_memory_of_no_weight_changes_nothing(unet: Any) -> None:
    stock = run(unet)
    attach(unet, [memory(mode="side", weight=0.0)])
    assert torch.equal(run(unet), stock)
    detach(unet)
    attach(unet, [memory(mode="side", weight=0.1)])
    assert distance(run(unet), stock) > 1e-4


def double(step: int) -> Tensor:
    return torch.tensor(step, dtype=torch.float64)


def for_each_sample(step: int) -> Tensor:
    return torch.tensor(step).expand(4)


# (1 - 0.7) 1000 is above 300 in binary, (1 - 0.8) 1000 below 200.
@pytest.mark.parametrize(("until", "edge"), [(0.7, 300), (0.8, 200), (0.25, 750)])
@pytest.mark.parametrize("kind", [int, float, torch.tensor, double, for_each_sample])
def test_a_side_memory_stops_at_its_step(unet: Any, until: float, edge: int, kind: Callable[[int], Any]) -> None:
    stock = {step: run(unet, step) for step in (edge - 1, edge, 999)}
    attach(unet, [memory(mode="side", until=until)])
    assert torch.equal(run(unet, kind(edge - 1)), stock[edge - 1])
    assert distance(run(unet, kind(edge)), stock[edge]) > 1e-3
    assert distance(run(unet, kind(999)), stock[999]) > 1e-3


def test_the_steps_are_those_of_the_schedule_and_of_each_sample(unet: Any) -> None:
    steps = torch.tensor([49, 50, 10, 90])
    stock = run(unet, steps)
    attach(unet, [memory(mode="side", until=0.5)], steps=100)
    moved = (run(unet, steps) - stock).abs().amax((1, 2, 3)) > 1e-3
    assert moved.tolist() == [False, True, False, True]
    sample, states = draw(0, 4, 4, 8, 8), draw(1, 4, 77, WIDTH)
    by_name = unet(sample=sample, timestep=steps, encoder_hidden_states=states).sample
    assert torch.equal(by_name, run(unet, steps))


@pytest.mark.parametrize(("batch", "rows"), [(4, [2, 3]), (2, [1]), (3, [0, 1, 2]), (1, [0])])
def test_guided_memories_act_on_the_prompted_half(unet: Any, batch: int, rows: list[int]) -> None:
    stock = run(unet, batch=batch)
    attach(unet, [memory(mode="side", guided=True)])
    moved = (run(unet, batch=batch) - stock).abs().amax((1, 2, 3))
    assert [row for row in range(batch) if moved[row] > 1e-3] == rows
    assert all(moved[row] == 0 for row in range(batch) if row not in rows)
    detach(unet)
    attach(unet, [memory(mode="side")])
    assert bool(((run(unet, batch=batch) - stock).abs().amax((1, 2, 3)) > 1e-3).all())


def test_a_mask_of_the_text_leaves_memories_in_sight(unet: Any) -> None:
    sample, states = draw(0, 2, 4, 8, 8), draw(1, 2, 77, WIDTH)
    mask = torch.arange(77).lt(40).expand(2, 77)
    attach(unet, [memory(at) for at in INNER])
    masked = unet(sample, 500, states, encoder_attention_mask=mask).sample
    assert distance(masked, unet(sample, 500, states[:, :40]).sample) <= 1e-5
    detach(unet)
    assert distance(masked, unet(sample, 500, states[:, :40]).sample) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_memories_follow_the_model_s_dtype(loaded: Any, dtype: torch.dtype) -> None:
    unet = copy.deepcopy(loaded)
    attach(unet, [memory(), memory(LAST, mode="side", until=0.8, guided=True)])
    expected, kept = run(unet), unet.get_submodule(MIDDLE).processor.joint[0].keys
    unet.to(dtype)
    sample, states = draw(0, 4, 4, 8, 8).to(dtype), draw(1, 4, 77, WIDTH).to(dtype)
    output = unet(sample, 500, states).sample
    assert output.dtype == dtype
    assert distance(output.float(), expected) < (1e-5 if dtype == torch.float64 else 0.1)
    assert kept.dtype == torch.float32


BAD = {
    "no attention 'mid_block'": Memory("mid_block", torch.zeros(1, 192), torch.zeros(1, 192)),
    r"has keys \(1, 64\)": Memory(MIDDLE, torch.zeros(1, 64), torch.zeros(1, 64)),
    r"has keys \(2, 192\) and values \(1, 192\)": Memory(MIDDLE, torch.zeros(2, 192), torch.zeros(1, 192)),
    "the mode 'both'": Memory(MIDDLE, torch.zeros(1, 192), torch.zeros(1, 192), mode="both"),  # type: ignore[arg-type]
    "acts until 1.5": memory(mode="side", until=1.5),
    "joint memory at .* has a weight": memory(weight=2.0),
    "side memory at .* is empty": memory(rows=0, mode="side"),
}


@pytest.mark.parametrize("message", BAD)
def test_a_memory_that_does_not_fit_is_an_error_and_nothing_is_attached(unet: Any, message: str) -> None:
    stock = run(unet)
    with pytest.raises(ErasecError, match=message):
        attach(unet, [memory(LAST), BAD[message]])
    assert torch.equal(run(unet), stock)


def test_a_replaced_processor_is_noticed(unet: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    attach(unet, [memory()])
    stocks = {name: AttnProcessor2_0() for name in unet.attn_processors}
    before = dict(unet.attn_processors)
    unet.set_attn_processor(stocks)
    with pytest.raises(ErasecError, match="no longer read") as caught:
        run(unet)
    assert "AttnProcessor2_0 took its place" in caught.value.why
    unet.set_attn_processor(before)
    detach(unet)

    class Strange(AttnProcessor):  # type: ignore[misc]
        pass

    stock = run(unet)
    unet.get_submodule(MIDDLE).set_processor(Strange())
    with pytest.raises(ErasecError, match="no memory can be attached") as caught:
        attach(unet, [memory()])
    assert "Strange" in caught.value.why
    unet.get_submodule(MIDDLE).set_processor(AttnProcessor2_0())
    assert torch.equal(run(unet), stock)


# The pipeline of a bundle


@pytest.fixture(scope="module")
def carrying(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Extras]:
    """A bundle with one of each, and what it holds."""
    root = Path(shutil.copytree(random_folder, tmp_path_factory.mktemp("bundle") / "bundle"))
    memories = memory(LAST, mode="side", weight=-1.0, until=0.8, guided=True), memory()
    extras = Extras(memories, {"<corner>": draw(20, WIDTH), "<band>": draw(21, WIDTH)}, "a red star")
    write_extras(root, extras)
    return root, extras


@pytest.fixture(scope="module")
def stock(random_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(random_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def bundle(carrying: tuple[Path, Extras]) -> Any:
    pipe = erasec.pipeline(carrying[0], torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, prompts: list[str], scale: float = 5.0, **options: Any) -> Tensor:
    start = draw(30, len(prompts), 4, 8, 8)
    output: Tensor = pipe(
        prompts, latents=start, num_inference_steps=2, guidance_scale=scale, output_type="latent", **options
    ).images
    return output


def test_a_plain_folder_gives_the_stock_pipeline(random_folder: Path, stock: Any) -> None:
    pipe = erasec.pipeline(str(random_folder), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is type(stock)
    assert torch.equal(latents(pipe, ["a star"]), latents(stock, ["a star"]))


def test_the_bundle_s_pictures_are_those_of_the_model_with_all_of_it(
    bundle: Any, stock: Any, carrying: tuple[Path, Extras]
) -> None:
    output = latents(bundle, ["a star", "a blue ring"])
    assert distance(output, latents(stock, ["a star", "a blue ring"])) > 1e-3
    negative = ["a red star"] * 2
    assert distance(output, latents(stock, ["a star", "a blue ring"], negative_prompt=negative)) > 1e-3
    attach(stock.unet, carrying[1].memories)
    try:
        assert torch.equal(output, latents(stock, ["a star", "a blue ring"], negative_prompt=negative))
        assert not torch.equal(output, latents(stock, ["a star", "a blue ring"]))
    finally:
        detach(stock.unet)


def test_new_tokens_are_one_token_with_their_row(bundle: Any, stock: Any, carrying: tuple[Path, Extras]) -> None:
    table, count = bundle.text_encoder.get_input_embeddings().weight, len(stock.tokenizer)
    assert table.shape[0] == len(bundle.tokenizer) == count + 2
    assert torch.equal(table[:count], stock.text_encoder.get_input_embeddings().weight)
    for name, row in carrying[1].tokens.items():
        start, *words, end = bundle.tokenizer(f"a {name}").input_ids
        assert torch.equal(table[words[-1]], row)
        assert len(words) == 2 < len(stock.tokenizer(f"a {name}").input_ids) - 2
        assert (start, end) == (stock.tokenizer.bos_token_id, stock.tokenizer.eos_token_id)
    one, other = (bundle.encode_prompt(f"a {name}", "cpu", 1, False)[0] for name in ("<corner>", "<band>"))
    assert distance(one, other) > 1e-2
    assert torch.equal(
        bundle.encode_prompt("a star", "cpu", 1, False)[0], stock.encode_prompt("a star", "cpu", 1, False)[0]
    )


def test_the_negative_prompt_is_taken_where_there_is_none(bundle: Any, stock: Any) -> None:
    def negative(pipe: Any, prompt: str | list[str] | None, **options: Any) -> Tensor:
        output: Tensor = pipe.encode_prompt(prompt, "cpu", 2, True, **options)[1]
        return output

    expected = negative(stock, "a ring", negative_prompt="a red star")
    assert torch.equal(negative(bundle, "a ring"), expected)
    many = negative(bundle, ["a ring", "a heart", "a star"])
    assert torch.equal(many, negative(stock, ["a ring"] * 3, negative_prompt=["a red star"] * 3))
    embeds = draw(31, 3, 77, WIDTH)
    assert torch.equal(negative(bundle, None, prompt_embeds=embeds), many)
    assert distance(expected, negative(stock, "a ring")) > 1e-2
    for explicit in ("", "a blue heart"):
        output = negative(bundle, "a ring", negative_prompt=explicit)
        assert torch.equal(output, negative(stock, "a ring", negative_prompt=explicit))
    given = negative(bundle, "a ring", negative_prompt_embeds=embeds[:1])
    assert torch.equal(given, embeds[:1].expand(2, -1, -1))
    explicit = latents(bundle, ["a star"], negative_prompt=["a blue heart"])
    assert distance(explicit, latents(bundle, ["a star"])) > 1e-4


def test_without_guidance_all_rows_are_prompted(
    bundle: Any, stock: Any, carrying: tuple[Path, Extras], random_folder: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(random_folder, tmp_path / "guided"))
    write_extras(root, Extras((memory(mode="side", weight=3.0, guided=True),)))
    pipe = erasec.pipeline(root, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    both = latents(pipe, ["a star", "a ring"], scale=1.0)
    moved = (both - latents(stock, ["a star", "a ring"], scale=1.0)).abs().amax((1, 2, 3))
    assert bool((moved > 1e-3).all())
    alone = latents(pipe, ["a star"], scale=1.0)
    assert distance(alone, both[:1]) < 1e-4
    attach(stock.unet, [memory(mode="side", weight=3.0)])  # not guided: what pictures without guidance come to
    try:
        assert torch.equal(latents(stock, ["a star", "a ring"], scale=1.0), both)
        assert distance(latents(stock, ["a star"]), latents(pipe, ["a star"])) > 1e-3
    finally:
        detach(stock.unet)


def test_the_pipeline_s_own_schedule_sets_the_step(carrying: tuple[Path, Extras], stock: Any, bundle: Any) -> None:
    scheduler = type(stock.scheduler).from_config(stock.scheduler.config, num_train_timesteps=100)
    pipe = erasec.pipeline(carrying[0], torch_dtype=torch.float32, scheduler=scheduler)
    starts = [pipeline.unet.get_submodule(LAST).processor.side[0].start for pipeline in (pipe, bundle)]
    assert starts == [20, 200]


def test_judged_images_are_those_of_the_pipeline(carrying: tuple[Path, Extras], random_folder: Path) -> None:
    sampling = Sampling(2, 5.0)
    output = generate(carrying[0], ["a star"], [1], sampling, "pictures")
    pipe = erasec.pipeline(carrying[0], torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(1)
    expected = pipe(["a star"], num_inference_steps=2, guidance_scale=5.0, generator=[seed], output_type="np").images
    assert np.array_equal(output, np.rint(expected * 255).astype(np.uint8))
    assert not np.array_equal(output, generate(random_folder, ["a star"], [1], sampling, "pictures"))


def test_a_folder_with_one_variant_alone_loads_that_variant(random_folder: Path, tmp_path: Path, stock: Any) -> None:
    root = Path(shutil.copytree(random_folder, tmp_path / "copy"))
    for file in root.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    pipe = erasec.pipeline(root)
    for name in ("text_encoder", "unet", "vae"):
        theirs = getattr(stock, name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(pipe, name).state_dict().items())
    shutil.copy(random_folder / "unet" / "diffusion_pytorch_model.safetensors", root / "unet")
    erasec.pipeline(root, variant="fp16")
    (root / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(ErasecError, match="the pipeline cannot be made") as caught:
        erasec.pipeline(root)
    assert "diffusion_pytorch_model" in caught.value.why


def test_folders_that_cannot_be_opened_are_errors(random_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="is not a diffusers folder") as caught:
        erasec.pipeline("someone/some-model")
    assert "hf download" in caught.value.fix
    root = Path(shutil.copytree(random_folder, tmp_path / "copy"))
    for extras, message in (
        (Extras(tokens={"<a>": draw(0, 64)}), r"row of the token '<a>' is \(64,\)"),
        (Extras(tokens={"star</w>": draw(0, WIDTH)}), "the token 'star</w>' is not new"),
        (Extras((Memory("nowhere", draw(0, 1, 64), draw(0, 1, 64)),)), "no attention 'nowhere'"),
    ):
        write_extras(root, extras)
        with pytest.raises(ErasecError, match=message):
            erasec.pipeline(root)
