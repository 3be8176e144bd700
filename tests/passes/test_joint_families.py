"""sd3 and flux: text states as their pipelines make them, and closed-form edits of the matrices through which text
enters, biases and all. On small models with random weights, built from the libraries' own classes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from joint_models import pipeline
from torch import Tensor

from erasec import registry
from erasec.attention.pipeline import Sampling, generate
from erasec.base import Context
from erasec.checkpoint import safetensors as checkpoint
from erasec.closed_form import solver
from erasec.closed_form.joint_attention import SIGMAS, capture_inputs
from erasec.closed_form.token_rows import EMPTY, find_spans, neutral_rows, row_pairs
from erasec.commands.prompt_lengths import check_lengths
from erasec.errors import ErasecError
from erasec.family import Site
from erasec.model import loading
from erasec.model.edit import Delta, Edit, Remap
from erasec.model.networks import load_network
from erasec.model.view import Model
from erasec.passes.project import Project
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept

CONTEXT, POOLED = "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"
PROMPTS = ["", "a star", "a photo of a pentagram on navy"]
CONCEPT = Concept(name="star", erase=("star",), synonyms=("pentagram",), anchor="circle", keep=("square",))
BARE = Concept(name="star", erase=("star",), anchor="circle", templates=("a photo of a {}",))
CLOSED = ("uce", "rece", "mace", "project", "trce.remap", "speed", "double_projection", "cure")


@pytest.fixture(scope="module", params=["sd3", "sd3-no-t5", "flux"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp(request.param)
    pipeline(request.param).save_pretrained(folder)
    return loading.load(str(folder))


def parts(base: Model) -> int:
    return len(base.family.streams[0].parts)


def opened(base: Model, folder: Path) -> Any:
    """The folder as diffusers opens it, which needs to be told where there is no T5."""
    without = base.family.name == "sd3" and parts(base) == 1
    return diffusers.DiffusionPipeline.from_pretrained(
        folder, **({"text_encoder_3": None, "tokenizer_3": None} if without else {})
    )


@torch.no_grad()
def test_states_are_those_of_the_pipeline(base: Model) -> None:
    pipe = opened(base, base.source.root)
    if base.family.name == "flux":
        context, pooled, _ = pipe.encode_prompt(PROMPTS, device="cpu")
    else:
        context, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, "cpu", do_classifier_free_guidance=False)
    tokens, pooled_tokens = base.encode(PROMPTS), base.encode(PROMPTS, "pooled")
    length = tokens.states.shape[1]
    assert length == {"flux": 512, "sd3": 77 + 256 * (parts(base) - 1)}[base.family.name]
    assert torch.allclose(tokens.states, context[:, :length], atol=1e-5)
    assert not context[:, length:].any()  # zeros take the place of T5's states, and no matrix changes zeros
    assert torch.allclose(pooled_tokens.states, pooled[:, None], atol=1e-5)
    for states in (tokens.states, pooled_tokens.states):
        assert not torch.allclose(states[1], states[2], atol=1e-2)


def test_spans_of_a_phrase_are_right_in_every_part(base: Model) -> None:
    prompts = BARE.prompts(["star", "pentagram"])
    for part, spans in zip(base.family.streams[0].parts, find_spans(base, prompts, "context"), strict=True):
        tokenizer = base._text_encoders.tokenizer(part.encoders[0])
        ids = base._text_encoders.ids([prompt.text for prompt in prompts], part.encoders[0], part.length)
        for row, word in enumerate(("star", "pentagram")):
            own = ids[row, spans.first[row] : spans.last[row] + 1]
            assert tokenizer.decode(own).strip() == word
            assert int(ids[row, spans.end[row]]) == tokenizer.eos_token_id
            assert spans.end[row] == spans.last[row] + 1
        if not tokenizer.bos_token:  # "pentagram" is no word of the small T5: it is at least a token for each letter
            assert spans.last[1] - spans.first[1] + 1 >= len("pentagram")


def test_phrases_have_the_room_of_each_text_encoder(base: Model) -> None:
    """CLIP reads 75 words between its two marks, T5 all words before its one mark: 255 in sd3 and 511 in FLUX."""
    rooms = {"text_encoder": 75, "text_encoder_2": 511} if base.family.name == "flux" else {}
    rooms = rooms or {"text_encoder": 75, "text_encoder_2": 75, "text_encoder_3": 255}
    rooms = {name: rooms[name] for name in base.family.text_encoders}
    words = ["star", "heart"] * 300
    assert {name: len(part.split()) for name, part in base.text_read(" ".join(words)).items()} == rooms
    for name, room in rooms.items():
        length = next(p.length for stream in base.family.streams for p in stream.parts if name in p.encoders)
        fits, more = base._text_encoders.ids([" ".join(words[:room]), " ".join(words[: room + 1])], name, length)
        assert torch.equal(fits, more)  # the encoder reads nothing of the word after the room
        assert base.text_read(" ".join(words[:room]))[name] == " ".join(words[:room])
    most = max(rooms.values())

    def long(count: int) -> Concept:
        return Concept(name="long", erase=(" ".join(words[:count]),), templates=("{}",))

    assert check_lengths([long(75)], base) == []
    notes = check_lengths([long(most)], base)
    assert len(notes) == (1 if most > 75 else 0)
    clips = [name for name, room in rooms.items() if room == 75]
    read = f"{' and '.join(clips)} {'read' if len(clips) > 1 else 'reads'} it up to 'heart star heart star'"
    assert all(note.endswith(f"is cut: {read}.") for note in notes)
    with pytest.raises(ErasecError, match="is too long") as caught:
        check_lengths([long(most + 1)], base)
    assert read in caught.value.why
    assert all(name in caught.value.why for name in rooms)


def test_the_empty_prompt_is_taken_at_its_end_token(base: Model) -> None:
    for part, spans in zip(base.family.streams[0].parts, find_spans(base, [EMPTY], "context"), strict=True):
        first = 0 if part.encoders[0] == base.family.text_encoders[-1] and part.length else 1
        assert (spans.last, spans.end) == ([first], [first])
        tokenizer = base._text_encoders.tokenizer(part.encoders[0])
        assert int(base._text_encoders.ids([""], part.encoders[0], part.length)[0, first]) == tokenizer.eos_token_id


def test_rows_of_all_parts_make_one_system(base: Model) -> None:
    prompts, goals = BARE.prompts(["star"]), BARE.prompts(["circle"])
    rows, target_rows = row_pairs(base, prompts, goals, "last", "context")
    assert len(rows) == len(target_rows) == parts(base)
    for part, own in enumerate(find_spans(base, prompts, "context")):
        assert torch.equal(rows[part], own.states[0, own.last[0]])
    assert len(row_pairs(base, prompts, goals, "all", "context")[0]) == base.encode([""]).states.shape[1]
    for selector in ("last", "tail", "all", "context", "words", "eot"):
        assert len(row_pairs(base, prompts, goals, selector, "pooled")[0]) == 1


@pytest.mark.parametrize("name", CLOSED)
def test_only_the_two_matrices_that_read_text_move(name: str, base: Model, tmp_path: Path) -> None:
    edited = base.with_edit(registry.load_pass(name)().solve(base, CONCEPT, Context()))
    base.source.write(tmp_path, edited.merged())
    merged = loading.load(str(tmp_path))
    moved = set()
    for component in base.family.components:
        old, new = base.source.entries(component), merged.source.entries(component)
        assert old.keys() == new.keys()
        for key in old:
            before, after = checkpoint.read_tensor(old[key]), checkpoint.read_tensor(new[key])
            assert bool(after.isfinite().all())
            if not torch.equal(before, after):
                moved.add((component, key))
    assert moved == {("transformer", CONTEXT), ("transformer", POOLED)}


def bias(base: Model, site: Site) -> Tensor:
    key = site.key.removesuffix("weight") + "bias"
    return checkpoint.read_tensor(base.source.entries("transformer")[key]).double()


def reference(weight: Tensor, c: Tensor, wanted: Tensor) -> Tensor:
    """The least change of a weight after which it takes the rows ``c`` to the rows ``wanted``."""
    return weight + (wanted - c @ weight.T).T @ torch.linalg.pinv(c).T


@pytest.mark.parametrize("stream", ["context", "pooled"])
def test_the_layer_gives_the_anchors_output_for_the_erased_state_and_its_bias_counts_once(
    base: Model, stream: str
) -> None:
    """layer'(c) = layer(v). A target that holds the bias, for a layer that adds it again, gives layer(v) + b."""
    edited = base.with_edit(Uce(rows="last", keep=0.0, ridge=1e-10).solve(base, BARE, Context()))
    (site,) = base.streams[stream]
    rows = row_pairs(base, BARE.prompts(["star"]), BARE.prompts(["circle"]), "last", stream)
    c, v = (side.double() for side in rows)
    before, after, b = base.weight(site), edited.weight(site), bias(base, site)
    goal = v @ before.T + b
    assert torch.allclose(c @ after.T + b, goal, atol=1e-4)
    assert not torch.allclose(c @ before.T + b, goal, atol=1e-2)
    assert torch.allclose(after, reference(before, c, v @ before.T), atol=1e-4)
    twice = c @ reference(before, c, goal).T + b
    assert not torch.allclose(twice, goal, atol=1e-2)
    assert torch.allclose(twice, goal + b, atol=1e-4)


def test_kept_states_stay(base: Model) -> None:
    """With few rows and a large keep weight, kept states move less than with none, in both streams."""
    heavy, unconstrained = (
        base.with_edit(Uce(rows="last", keep=weight).solve(base, CONCEPT, Context())) for weight in (100.0, 0.0)
    )
    for stream, (site,) in base.streams.items():
        prompts = CONCEPT.prompts(["square"])
        rows = row_pairs(base, prompts, prompts, "last", stream)[0].double()
        drift = [
            float((rows @ (edited.weight(site) - base.weight(site)).T).norm()) for edited in (heavy, unconstrained)
        ]
        assert drift[0] < 0.5 * drift[1]


def test_the_merged_folder_runs_in_diffusers(base: Model, tmp_path: Path) -> None:
    edited = base.with_edit(Uce().solve(base, CONCEPT, Context()))
    base.source.write(tmp_path, edited.merged())
    images = []
    (site,) = base.streams["context"]
    for folder, view in ((base.source.root, base), (tmp_path, edited)):
        pipe = opened(base, folder)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(
            pipe(
                "a star",
                num_inference_steps=2,
                height=16,
                width=16,
                generator=generator,
                output_type="latent",
            ).images
        )
        assert torch.allclose(pipe.transformer.context_embedder.weight.double(), view.weight(site), atol=1e-6)
    assert all(bool(image.isfinite().all()) for image in images)
    assert not torch.allclose(images[0], images[1], atol=1e-5)


def test_t5_is_read_by_either_name_of_its_token_embeddings(base: Model, tmp_path: Path) -> None:
    """Files hold the shared matrix once, by one of two names."""
    name = base.family.text_encoders[-1]
    if base._text_encoders.encoder(name).config.model_type != "t5":
        pytest.skip("this folder has no T5")
    base.source.write(tmp_path, {})
    path = tmp_path / name / "model.safetensors"
    tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(path)[0].items()}
    assert "encoder.embed_tokens.weight" not in tensors
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    checkpoint.save_tensors(path, tensors)
    assert torch.equal(loading.load(str(tmp_path)).encode(PROMPTS).states, base.encode(PROMPTS).states)


def keys_and_values(base: Model) -> list[Site]:
    return list(base.select("context", ("k", "v")))


def test_inputs_of_inner_keys_and_values_are_recorded_as_the_transformer_runs(base: Model) -> None:
    """The first block reads the embedded text after its norm: that depends on the timestep and not on the seed."""
    first, last = ([site.key for site in keys_and_values(base) if site.proj == "k"][at] for at in (0, -1))
    inputs = capture_inputs(base, PROMPTS, [first, last], (0.2, 1.0), side=2)
    length = base.encode([""]).states.shape[1]
    assert {rows.shape for rows in inputs.values()} == {(2, 3, length, 32)}
    network = load_network(base, base.family.denoiser, base.family.denoiser_class)
    block = network.transformer_blocks[0]
    states, pooled = base.encode(PROMPTS).states, base.encode(PROMPTS, "pooled").states[:, 0]
    with torch.no_grad():
        text = network.context_embedder(states)
        for sigma, rows in zip((0.2, 1.0), inputs[first], strict=True):
            steered = [torch.full((3,), 3500.0)] if base.family.name == "flux" else []
            state = network.time_text_embed(torch.full((3,), sigma * 1000), *steered, pooled)
            assert torch.allclose(block.norm1_context(text, emb=state)[0], rows, atol=1e-4)
    assert not torch.allclose(inputs[first][0], inputs[first][1], atol=1e-3)
    other = capture_inputs(base, PROMPTS, [first, last], (0.2, 1.0), seed=1, side=2)
    assert torch.equal(other[first], inputs[first])
    assert not torch.allclose(other[last], inputs[last], atol=1e-5)


def test_inner_keys_and_values_can_be_solved_from_their_inputs(base: Model) -> None:
    """In a run with the edit, each layer's output for the erased prompt is that for its anchor, at that noise level."""
    prompts, goals = (BARE.prompts([word]) for word in ("star", "circle"))
    source_index, target_index = (find_spans(base, side, "context")[0].last[0] for side in (prompts, goals))
    sites = [site for site in keys_and_values(base) if site.key.startswith("transformer_blocks.0.")]
    keys = [site.key for site in sites]
    rows = capture_inputs(base, [prompts[0].text, goals[0].text], keys, (0.5,), side=2)
    deltas: dict[Site, Delta] = {}
    for site in sites:
        c, v = rows[site.key][0, 0, source_index][None], rows[site.key][0, 1, target_index][None]
        system = solver.weighted_system(c, v, torch.ones(1), c[:0], torch.ones(0))
        solution = solver.solve(system, 1e-10)
        deltas[site] = Remap(solution.left, solution.right)
    edited = base.with_edit(Edit(deltas, "test", ("star",), ""))
    again = capture_inputs(edited, [prompts[0].text], keys, (0.5,), side=2)
    for site in sites:
        c, v = again[site.key][0, 0, source_index].double(), rows[site.key][0, 1, target_index].double()
        goal = base.weight(site) @ v + bias(base, site)
        assert torch.allclose(edited.weight(site) @ c + bias(base, site), goal, atol=1e-4)
        assert not torch.allclose(base.weight(site) @ c + bias(base, site), goal, atol=1e-3)


@pytest.mark.parametrize(
    ("key", "sigma", "words"),
    [(CONTEXT, 0.5, "reads no text states"), ("transformer_blocks.0.attn.add_k_proj.weight", 7.0, "no noise level 7")],
)
def test_impossible_captures_are_refused(base: Model, key: str, sigma: float, words: str) -> None:
    with pytest.raises(ErasecError, match=words):
        capture_inputs(base, ["a star"], [key], (sigma,))


def test_families_without_joint_attention_have_nothing_to_capture() -> None:
    with pytest.raises(ErasecError, match="no keys and values of text inside") as caught:
        capture_inputs(loading.load("glyphs"), ["a star"], [], (0.5,))
    assert "flux, sd3" in caught.value.why


def test_uce_edits_keys_and_values_of_every_block_on_their_inputs(base: Model) -> None:
    """W' c = W v at the recorded noise levels, with or without bias; only add_k_proj and add_v_proj change."""
    step = Uce(at="blocks", rows="last", keep=1e-9, ridge=1e-9)
    concept = BARE.model_copy(update={"templates": ("{}",)})
    edit = step.solve(base, concept, Context())
    sites = keys_and_values(base)
    assert set(edit.deltas) == set(sites) == set(step.sites(base))
    assert all(site.key.endswith(("add_k_proj.weight", "add_v_proj.weight")) for site in sites)
    prompts, goals = (concept.prompts([word]) for word in ("star", "circle"))
    source_index, target_index = (find_spans(base, side, "context")[0].last[0] for side in (prompts, goals))
    first = [site for site in sites if site.block == sites[0].block]
    rows = capture_inputs(base, [prompts[0].text, goals[0].text], [first[0].key], SIGMAS)[first[0].key]
    for site, states in itertools.product(first, rows):
        c, v = states[0, source_index].double(), states[1, target_index].double()
        weight = base.weight(site)
        actual = (weight + edit.deltas[site].change(weight)) @ c
        assert float((actual - weight @ v).norm()) < 1e-2 * float((weight @ c - weight @ v).norm())


def test_other_families_have_no_blocks_to_edit() -> None:
    with pytest.raises(ErasecError, match="no keys and values of text inside"):
        Uce(at="blocks").solve(loading.load("glyphs"), BARE, Context())
    with pytest.raises(ErasecError, match="option at is 'everywhere'"):
        Uce(at="everywhere")
    with pytest.raises(ErasecError, match="prior is given with at=blocks"):
        Uce(at="blocks", prior="some.prior.safetensors")


def test_blocks_do_not_keep_what_another_concept_erases(base: Model) -> None:
    """With "circle" kept for the star and erased next, the kept rows are those of a star that keeps nothing."""
    circle = Concept(name="circle", erase=("circle",), anchor="square", templates=("{}",))
    star = BARE.model_copy(update={"keep": ("circle",), "templates": ("{}",)})
    step = Uce(at="blocks", rows="last")
    together = list(step.solve_all(base, [star, circle], Context()))
    alone = step.solve(base, star.model_copy(update={"keep": ()}), Context())
    kept = step.solve(base, star, Context())
    assert [edit.concepts for edit in together] == [("star",), ("circle",)]
    site = keys_and_values(base)[0]
    weight = base.stored_weight(site)
    assert torch.equal(together[0].deltas[site].change(weight), alone.deltas[site].change(weight))
    assert not torch.allclose(kept.deltas[site].change(weight), alone.deltas[site].change(weight))


def test_pictures_are_those_of_the_pipeline(base: Model) -> None:
    """The family's own class paints, with T5 or without it."""
    pictures = generate(base.source.root, PROMPTS[:1], [3], Sampling(2, 3.0, side=64), "")
    pipe = opened(base, base.source.root)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    side = pictures.shape[1]
    seeds = [torch.Generator("cpu").manual_seed(seed) for seed in (3, 4)]
    same, other = (
        pipe(PROMPTS[:1], height=side, width=side, generator=[seed], **options).images[0] * 255 for seed in seeds
    )
    assert np.abs(pictures[0] - same).max() <= 1 and np.abs(pictures[0] - other).max() > 2


def test_the_projector_takes_directions_from_every_part_of_a_stream(base: Model) -> None:
    """CLIP's and T5's states have other lengths: taken together, the longer would hide the shorter. Without kept states
    and guide the directions themselves are removed."""
    edit = Project(keep=0.0, guide=False).solve(base, CONCEPT, Context())
    (site,) = base.streams["context"]
    pairs = neutral_rows(base, CONCEPT, "context")
    assert len(pairs) == parts(base)
    unit = torch.eye(site.shape[1], dtype=torch.float64)
    matrix = unit + edit.deltas[site].change(unit)
    for rows, neutral in pairs:
        main = torch.linalg.svd((rows - neutral).double(), full_matrices=False)[2][0]
        assert float((matrix @ main).norm()) < 1e-3
    assert edit.sums  # no heads were edited
