"""How pictures are sampled. This module imports no torch, so that a plan can say it."""

from __future__ import annotations

from dataclasses import dataclass

from erasec.errors import shown

# The classes of diffusers whose pipelines make a picture of a prompt alone. A model_index.json may name no other one:
# inpainting and image-to-image need a picture, and a model must not choose the code that runs. The first can carry
# memories, tokens and a negative prompt.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
# Parameters of a denoiser. Above, one picture takes seconds and uses all cores of a CPU, and activations of a training
# take more memory than most machines have.
LARGE = 200_000_000


@dataclass(frozen=True)
class Sampling:
    """How images are generated: with the checkpoint's own scheduler, in ``steps`` steps, with classifier-free guidance
    of scale ``guidance``, on ``device``, with weights and activations of type ``dtype``, as torch names it.

    ``side`` is the longest side in pixels; 0, or a ``side`` above the pipeline's own size, is that size.
    """

    steps: int
    guidance: float
    device: str = "cpu"
    dtype: str = "float32"
    side: int = 0

    @property
    def where(self) -> str:
        """The type of the numbers and the kind of the device, for texts that say how pictures were made."""
        return f"{self.dtype} on {self.device.partition(':')[0]}"


def fit_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width in pixels of a picture whose longest side is at most ``side``; 0 is no limit.

    Smaller pictures have multiples of 64 pixels, which suit every family: a latent of eight, halved three times.
    """
    if not side or max(height, width) <= side:
        return height, width
    scale = side / max(height, width)
    return max(64, int(height * scale) // 64 * 64), max(64, int(width * scale) // 64 * 64)


def unsupported(name: object) -> str:
    """Why erasec cannot make pictures with a pipeline of the class ``name``; "" where it can."""
    if name in PIPELINES:
        return ""
    if isinstance(name, str) and any(kind in name for kind in ("Inpaint", "Img2Img", "ImageToImage", "Upscale")):
        return f"a {shown(name)} needs an image besides the prompt"
    return f"its pipeline is {shown(name)}, and erasec runs {', '.join(PIPELINES)}"
