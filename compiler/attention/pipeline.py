"""The pipeline of a folder: that of diffusers with all that the folder carries, and images from it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from erasec.attention.batches import FIX, in_batches
from erasec.attention.processors import attach, call_state
from erasec.attention.sampling import LARGE, PIPELINES, fit_side, unsupported
from erasec.attention.sampling import Sampling as Sampling
from erasec.checkpoint.configs import described_by, read_index
from erasec.checkpoint.folder import only_variant
from erasec.checkpoint.tokenizer_files import read_tokenizer
from erasec.errors import ErasecError, is_out_of_memory, reason
from erasec.model.sidecar import KINDS, Extras, describe, read_extras
from erasec.model.text_encoders import limit_length
from erasec.progress import bar, disable_library_bars

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from erasec.base import Images

# What pipelines can carry besides weights, by their class.
CARRIED = {
    "StableDiffusionPipeline": KINDS,
    "StableDiffusionXLPipeline": frozenset({"memory"}),
    "StableDiffusion3Pipeline": frozenset({"memory"}),
}
BATCH = 32  # images that are generated at once
LARGE_BATCH = {"cuda": 8}  # images of a large model that are generated at once, by kind of device; elsewhere one


def pipeline(folder: str | Path, **options: Any) -> Any:
    """The diffusers pipeline of a folder, with the memories, tokens and negative prompt that it carries.

    Its class is the one that model_index.json names, one of PIPELINES, and ``options`` go to its ``from_pretrained``.
    Memories are attached to the denoiser, new tokens are added to tokenizer and text encoder, and calls without a
    negative prompt use the folder's; ``CARRIED`` says which pipelines can carry what. ``save_pretrained`` of the
    pipeline saves weights and tokens alone. Raises ErasecError where ``folder`` is not a diffusers folder, has a
    pipeline of another class, or what it carries does not fit its weights.
    """
    import diffusers

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
    name = read_index(root)["_class_name"]  # diffusers imports every module that the index names
    if why := unsupported(name):
        raise ErasecError(f"{folder} cannot be run with a prompt alone", why=why, where=str(root))
    if lost := extras.kinds - CARRIED.get(name, frozenset()):
        why = f"it has {describe(lost)}"
        raise ErasecError(f"a {name} cannot carry what {folder} has besides its weights", why=why, where=str(root))
    for tokenizer in sorted(root.glob("tokenizer*")):
        read_tokenizer(tokenizer)
    if not (root / "text_encoder_3").is_dir() and name == "StableDiffusion3Pipeline":  # which diffusers requires
        options = {"text_encoder_3": None, "tokenizer_3": None} | options
    if name != PIPELINES[0]:  # the others have no safety checker, which would replace pictures by black ones
        options = {key: value for key, value in options.items() if "safety_checker" not in key}
    with described_by("the pipeline", root):
        pipe = getattr(diffusers, name).from_pretrained(root, **options)
    limit_length(pipe.tokenizer, pipe.text_encoder.config.max_position_embeddings)
    if extras.tokens:
        add_tokens(pipe.tokenizer, pipe.text_encoder, extras.tokens)
    if extras.memories:
        attach(_denoiser(pipe), extras.memories, pipe.scheduler.config.num_train_timesteps)
    if extras.negative or any(memory.guided for memory in extras.memories):
        _wrap_encode_prompt(pipe, extras)
    return pipe


def _denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def add_tokens(tokenizer: Any, encoder: Any, tokens: Mapping[str, Tensor]) -> None:
    """Add tokens to a tokenizer, and their rows (d,) unchanged to its text encoder. Raises ErasecError for a token that
    is not new, or a row of another width."""
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
    stock, state = pipe.encode_prompt, call_state(_denoiser(pipe))
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        if state is not None:
            state.guided = given.get("do_classifier_free_guidance", True)
        if extras.negative and given.get("negative_prompt") is None and given.get("negative_prompt_embeds") is None:
            prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
            count = len(prompt) if isinstance(prompt, list) else len(embeds) if embeds is not None else 1
            given["negative_prompt"] = extras.negative if isinstance(prompt, str) else [extras.negative] * count
        return stock(*bound.args, **bound.kwargs)

    pipe.encode_prompt = encode_prompt


def generate(
    folder: Path, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, title: str, variant: str = ""
) -> Images:
    """Images (n, h, w, 3) of n prompts as the pipeline of a folder generates them, with all that the folder carries.

    Each image starts from its own seed of ``seeds`` (n,), so that it does not depend on the batch. ``title`` is the
    label of the progress bar. ``variant`` is that of the weights; by default the plain one, or the only one.
    """
    return np.concatenate(list(paint(folder, prompts, seeds, sampling, title, variant)))


def paint(
    folder: Path, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, title: str, variant: str = ""
) -> Iterator[Images]:
    """The images of ``generate``, one batch after another. A batch that does not fit into memory is halved.

    Raises ErasecError where the pipeline, or one image, does not fit into memory.
    """
    pipe = _loaded(folder, sampling, variant)
    size = _size(pipe, sampling.side)

    def run(start: int, stop: int) -> Images:
        images = pipe(
            list(prompts[start:stop]),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[start:stop]],
            output_type="np",
            **size,
        ).images
        pictures: Images = np.rint(np.nan_to_num(images) * 255).astype(np.uint8)
        return pictures

    with bar(title, len(prompts)) as advance:
        for images in in_batches(len(prompts), first_batch(_denoiser(pipe), sampling.device), run):
            advance(len(images))
            yield images


def _loaded(folder: Path, sampling: Sampling, variant: str) -> Any:
    """The pipeline of a folder on its device, without a safety checker and without bars."""
    options = {"torch_dtype": getattr(torch, sampling.dtype), "safety_checker": None, "requires_safety_checker": False}
    options |= {"variant": variant} if variant else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipe = pipeline(folder, **options).to(sampling.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            what = "the model does not fit into the memory of the device"
            raise ErasecError(what, why=reason(error), fix=FIX) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def first_batch(denoiser: torch.nn.Module, device: str) -> int:
    """The largest batch to begin with: that of small models, or that of large ones on this kind of device."""
    small = sum(weight.numel() for weight in denoiser.parameters()) <= LARGE
    return BATCH if small else LARGE_BATCH.get(device.partition(":")[0], 1)


def _size(pipe: Any, side: int) -> dict[str, int]:
    """The arguments height and width for pictures of at most ``side`` pixels; none where that is the pipeline's own."""
    if not side:
        return {}
    native = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    height, width = native if isinstance(native, (list, tuple)) else (native, native)
    own = height * pipe.vae_scale_factor, width * pipe.vae_scale_factor
    smaller = fit_side(*own, side)
    return {} if smaller == own else {"height": smaller[0], "width": smaller[1]}
