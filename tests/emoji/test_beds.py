"""The small models of the emoji world in the layouts of other families, before their training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from erasec.attention.pipeline import Sampling, generate, pipeline
from erasec.base import Context
from erasec.emoji import beds
from erasec.emoji.judge import EmojiJudge
from erasec.emoji.words import ARTISTS, OBJECTS
from erasec.emoji.world import Sample
from erasec.model import loading
from erasec.training.denoiser import Denoiser


@pytest.fixture(scope="module", params=["sdxl", "sd3"])
def bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bed whose denoiser is random, with no tensor of zeros."""
    denoiser, rng = beds.build_denoiser(request.param), torch.Generator().manual_seed(0)
    state = {
        key: value + 0.02 * torch.randn(value.shape, generator=rng) for key, value in denoiser.state_dict().items()
    }
    out = tmp_path_factory.mktemp("beds") / request.param
    beds.write_folder(request.param, out, state)
    return out


def test_a_bed_is_a_model_of_its_family_that_emojis_judge_knows(bed: Path) -> None:
    model = loading.load(str(bed))
    assert model.family.name == bed.name
    assert isinstance(EmojiJudge.for_model(model), EmojiJudge)
    images = generate(bed, ["an owl"], [0], Sampling(2, 4.0), "a picture")
    assert images.shape == (1, 64, 64, 3) and images.std() > 0


def test_both_encoders_say_what_emojis_says(bed: Path) -> None:
    """The last layer passes on its input, so the last states but one are emoji's before the last norm."""
    pipe = pipeline(bed)
    emoji = pipeline(loading.bundled_folder("emoji"))
    ids = emoji.tokenizer(["an owl by Noto"], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = emoji.text_encoder(ids, output_hidden_states=True).hidden_states[-1]
        for encoder in (pipe.text_encoder, pipe.text_encoder_2):
            states = encoder(ids, output_hidden_states=True).hidden_states
            torch.testing.assert_close(states[-2], expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(states[-1], states[-2])


def test_one_token_counts_for_all_equal_ones(bed: Path) -> None:
    denoiser = Denoiser(loading.load(str(bed)), Context())
    states = denoiser.states(["an owl", "a strawberry by Noto"])
    latents, timesteps = denoiser.draw([0, 1]), torch.tensor([100, 900])
    with torch.no_grad():
        long = denoiser.predict(latents, timesteps, states)
        short = beds.predict(denoiser, latents, timesteps, states)
        other = denoiser.predict(latents, timesteps, torch.cat([states[:, :33], states[:, -1:]], 1))
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)
    assert (other - long).abs().max() > 1e-3  # the number of zeros, or of tokens, matters


def test_routes_are_apart_and_complete() -> None:
    masks = beds.route_masks(5)
    assert (masks.sum(0) == 1).all()
    assert masks[0, 0, 0] and masks[1, 0, -1] and masks[2, -1, 0]


def test_a_unet_begins_with_emojis_tensors() -> None:
    unet = beds.build_denoiser("sdxl")
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    taken = beds.begin_with_emoji(unet)
    changed = [key for key, value in unet.state_dict().items() if not torch.equal(value, before[key])]
    assert 0 < len(changed) <= taken < len(before)
    assert not any("add_embedding" in key or ("attn2.to_k" in key) for key in changed)


def test_pictures_show_what_a_bed_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("owl", "Twemoji"), ("owl", "Noto"), ("pizza", "Twemoji"), ("", "")]

    def sample(icons: object, seed: int, index: int) -> Sample:
        name, artist = rows[index % len(rows)]
        image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
        return Sample(image, f"{name} {artist}", (name,) if name else (), (), artist, "white", "name", None)

    monkeypatch.setattr(beds, "sample", sample)
    bed = beds.Bed("", "", beds.FEW, ("Twemoji",), 4, 1, 1e-3, 32)
    assert beds.pictures(None, bed)[1] == ["owl Twemoji", " ", "owl Twemoji", " "]
    assert set(beds.FEW) < set(OBJECTS) and set(bed.artists) < set(ARTISTS)
