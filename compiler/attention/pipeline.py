"""The pipeline of a bundle: a StableDiffusionPipeline with all that the folder carries, and images from it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from erasec.attention.processors import attach, call_state
from erasec.checkpoint.configs import described_by, read_index
from erasec.checkpoint.folder import only_variant
from erasec.checkpoint.tokenizer_files import read_tokenizer
from erasec.errors import ErasecError
from erasec.model.sidecar import Extras, read_extras
from erasec.model.text_encoders import limit_length
from erasec.progress import bar, disable_library_bars

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import StableDiffusionPipeline
    from torch import Tensor

    from erasec.base import Images

BATCH = 32  # images that are generated at once


def pipeline(folder: str | Path, **options: Any) -> StableDiffusionPipeline:
    """The StableDiffusionPipeline of a diffusers folder, with the memories, tokens and negative prompt that it carries.

    ``options`` go to ``StableDiffusionPipeline.from_pretrained``. Memories are attached to the UNet, new tokens are
    added to tokenizer and text encoder, and calls without a negative prompt use the folder's. ``save_pretrained`` of
    the pipeline saves weights and tokens alone. Raises ErasecError where ``folder`` is not a diffusers folder, or what
    it carries does not fit its weights.
    """
    from diffusers import StableDiffusionPipeline

    root = Path(folder).expanduser()
    if not (root / "model_index.json").is_file():
        raise ErasecError(
            f"{folder} is not a diffusers folder",
            why="it has no model_index.json",
            fix="give a folder on this machine; fetch a model from the hub first: hf download NAME --local-dir DIR",
        )
    extras = read_extras(root)
    options = {"variant": only_variant(root) or None} | options
    disable_library_bars()
    read_index(root)  # diffusers imports every module that it names
    read_tokenizer(root / "tokenizer")
    with described_by("the pipeline", root):
        pipe = StableDiffusionPipeline.from_pretrained(root, **options)
    limit_length(pipe.tokenizer, pipe.text_encoder.config.max_position_embeddings)
    if extras.tokens:
        _add_tokens(pipe, extras.tokens)
    attach(pipe.unet, extras.memories, pipe.scheduler.config.num_train_timesteps)
    if extras.negative or any(memory.guided for memory in extras.memories):
        _wrap_encode_prompt(pipe, extras)
    return pipe


def _add_tokens(pipe: Any, tokens: Mapping[str, Tensor]) -> None:
    """Add tokens to a pipeline's tokenizer, and their rows (d,) unchanged to its text encoder."""
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    if known := tokens.keys() & tokenizer.get_vocab().keys():
        raise ErasecError(
            f"the token {min(known)!r} is not new",
            why="the tokenizer has a token of this name",
            fix="give it another name",
        )
    width = encoder.get_input_embeddings().weight.shape[1]
    if wrong := [name for name, row in tokens.items() if tuple(row.shape) != (width,)]:
        raise ErasecError(
            f"the row of the token {wrong[0]!r} is {tuple(tokens[wrong[0]].shape)}",
            why=f"this text encoder's rows are ({width},): the token was made for another model",
        )
    tokenizer.add_tokens(list(tokens))
    encoder.resize_token_embeddings(
        max(len(tokenizer), encoder.get_input_embeddings().num_embeddings), mean_resizing=False
    )
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        for name, row in tokens.items():
            table[tokenizer.convert_tokens_to_ids(name)] = row.to(table)


def _wrap_encode_prompt(pipe: Any, extras: Extras) -> None:
    """Make a pipeline's encode_prompt fill in the negative prompt, and tell the memories whether the call is guided."""
    stock, state = pipe.encode_prompt, call_state(pipe.unet)

    @functools.wraps(stock)
    def encode_prompt(
        prompt: str | list[str] | None,
        device: Any,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **more: Any,
    ) -> Any:
        if state is not None:
            state.guided = do_classifier_free_guidance
        if extras.negative and negative_prompt is None and negative_prompt_embeds is None:
            count = len(prompt) if isinstance(prompt, list) else len(prompt_embeds) if prompt_embeds is not None else 1
            negative_prompt = extras.negative if isinstance(prompt, str) else [extras.negative] * count
        return stock(
            prompt,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            **more,
        )

    pipe.encode_prompt = encode_prompt


@dataclass(frozen=True)
class Sampling:
    """How images are generated: with the checkpoint's own scheduler, in ``steps`` steps, with classifier-free guidance
    of scale ``guidance``, on ``device``."""

    steps: int
    guidance: float
    device: str = "cpu"


def generate(folder: Path, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, title: str) -> Images:
    """Images (n, h, w, 3) of n prompts as the pipeline of a folder generates them, with all that the folder carries.

    Each image starts from its own seed of ``seeds`` (n,), so that it does not depend on the batch. ``title`` is the
    label of the progress bar.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipeline(folder, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False).to(
            sampling.device
        )
    pipe.set_progress_bar_config(disable=True)
    batches = []
    with bar(title, len(prompts)) as advance:
        for start in range(0, len(prompts), BATCH):
            batch = list(prompts[start : start + BATCH])
            images = pipe(
                batch,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + BATCH]],
                output_type="np",
            ).images
            batches.append(np.rint(np.nan_to_num(images) * 255).astype(np.uint8))
            advance(len(batch))
    return np.concatenate(batches)
