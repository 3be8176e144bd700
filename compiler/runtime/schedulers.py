"""Samplers in numpy, made from the config of a diffusers scheduler, that take its steps number by number.

DDIM (arXiv 2010.02502), Euler (arXiv 2206.00364, algorithm 2 without churn), DPM-Solver++ 2M (arXiv 2211.01095) and the
linear multistep half of PNDM (arXiv 2202.09778). A latent is x = alpha x0 + sigma noise; all arrays are float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from erasec.errors import ErasecError, nearest

Array = NDArray[Any]
KINDS = {
    "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpm": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
}  # fmt: skip
# The options that a class reads, with diffusers' own defaults: old configs leave some out.
SHARED = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "steps_offset": 0,
}  # fmt: skip
SIGMAS = {
    "rescale_betas_zero_snr": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "final_sigmas_type": "zero", "timestep_spacing": "linspace",
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": SHARED | {
        "timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True, "clip_sample_range": 1.0,
        "thresholding": False, "rescale_betas_zero_snr": False,
    },
    "EulerDiscreteScheduler": SHARED | SIGMAS | {"interpolation_type": "linear", "timestep_type": "discrete"},
    "DPMSolverMultistepScheduler": SHARED | SIGMAS | {
        "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True,
        "euler_at_final": False, "thresholding": False, "use_lu_lambdas": False, "use_flow_sigmas": False,
        "variance_type": None, "lambda_min_clipped": -np.inf,
    },
    "PNDMScheduler": SHARED | {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
}  # fmt: skip
# What an option may be here, where that is less than in diffusers.
DONE: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear"), "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"), "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",), "timestep_type": ("discrete",), "algorithm_type": ("dpmsolver++",),
    "solver_order": (1, 2), "solver_type": ("midpoint", "heun"), "skip_prk_steps": (True,),
    "trained_betas": (None,), "variance_type": (None,), "lambda_min_clipped": (-np.inf,),
    "rescale_betas_zero_snr": (False,), "thresholding": (False,), "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None), "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
}  # fmt: skip


class Sampler(Protocol):
    """One walk from noise to latents; its steps must be taken in order, as some remember those before.

    ``timesteps`` (n,) is what the denoiser is told at each step, ``start`` the deviation of the first noise.
    """

    timesteps: NDArray[np.float64]
    start: float

    def scaled(self, at: int, sample: Array) -> Array:
        """The latents as the denoiser reads them at step ``at``."""

    def step(self, at: int, output: Array, sample: Array) -> Array:
        """The latents after step ``at``, where the denoiser gave ``output``."""


def sampler(config: Mapping[str, Any], steps: int, kind: str = "auto") -> Sampler:
    """The sampler of a scheduler_config.json, or the one called ``kind`` with this config's noise schedule.

    Raises ErasecError for a class, an option or a number of steps that cannot be taken here.
    """
    if kind != "auto" and kind not in KINDS:
        raise ErasecError(f"there is no scheduler {kind!r}", why=nearest(kind, ("auto", *KINDS)))
    name = str(config.get("_class_name")) if kind == "auto" else KINDS[kind]
    instead = f"--scheduler {'euler' if name == KINDS['ddim'] else 'ddim'}   takes the same model's noise schedule"
    if name not in DEFAULTS:
        raise ErasecError(f"the scheduler is a {name}", why=f"taken here: {', '.join(DEFAULTS)}", fix=instead)
    # Configs of other classes do not say how PNDM is to begin.
    own = {"skip_prk_steps": True} if kind != "auto" else {}
    options = {key: config.get(key, default) for key, default in (DEFAULTS[name] | own).items()}
    for key, value in options.items():
        if key in DONE and value not in DONE[key]:
            raise ErasecError(
                f"the {name} has {key} = {value!r}", why=f"taken here: {', '.join(map(repr, DONE[key]))}", fix=instead
            )
    total = options["num_train_timesteps"]
    if not 0 < steps < total:
        raise ErasecError(f"{steps} steps cannot be taken", why=f"the model knows {total}: take 1 to {total - 1}")
    made: dict[str, type[Ddim | Euler | Dpm | Pndm]] = {
        KINDS["ddim"]: Ddim, KINDS["euler"]: Euler, KINDS["dpm"]: Dpm, KINDS["pndm"]: Pndm,
    }  # fmt: skip
    chosen = made[name](options, steps)
    if chosen.timesteps.max() >= total:
        raise ErasecError(
            f"{steps} steps cannot be taken", why=f"steps_offset = {options['steps_offset']} leads beyond {total - 1}",
            fix="take fewer",
        )  # fmt: skip
    return chosen


def signals(options: Mapping[str, Any]) -> Array:
    """alpha squared at each of the model's timesteps (t,), bit by bit as torch computes it."""
    first, last, count = options["beta_start"], options["beta_end"], options["num_train_timesteps"]
    root = options["beta_schedule"] == "scaled_linear"
    start, end = (np.float32(value**0.5 if root else value) for value in (first, last))
    # torch.linspace fills from both ends with a float32 increment and rounds once a number.
    at, width = np.arange(count), np.float64((end - start) / np.float32(count - 1))
    line = np.where(at < count // 2, start + width * at, end - width * (count - 1 - at)).astype(np.float32)
    betas = line * line if root else line
    return np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)


def spaced(options: Mapping[str, Any], steps: int, more: int = 0) -> NDArray[np.float64]:
    """``steps`` of the model's timesteps, falling, spaced as arXiv 2305.08891 (table 2) names it; not rounded.

    ``more`` steps beyond the last are counted when the way is divided, and not taken.
    """
    total, offset, count = int(options["num_train_timesteps"]), float(options["steps_offset"]), steps + more
    if options["timestep_spacing"] == "trailing":
        # Cut off, as arange may overrun by one in floating point.
        return np.arange(total, 0, -total / steps, dtype=np.float64).round()[:steps] - 1
    if options["timestep_spacing"] == "linspace":
        return np.linspace(0, total - 1, count)[::-1][:steps]
    return (np.arange(count, dtype=np.float64) * (total // count))[::-1][:steps] + offset


class Ddim:
    """DDIM without noise between the steps (eta = 0)."""

    start = 1.0

    def __init__(self, options: Mapping[str, Any], steps: int) -> None:
        self.options = options
        self.signals = signals(options)
        self.timesteps = spaced(options, steps).round()
        self.stride = options["num_train_timesteps"] // steps

    def scaled(self, at: int, sample: Array) -> Array:
        return sample

    def step(self, at: int, output: Array, sample: Array) -> Array:
        alpha, sigma = self.levels(self.timesteps[at])
        after, noisy = self.levels(self.timesteps[at] - self.stride)
        if self.options["prediction_type"] == "epsilon":
            clean, noise = (sample - sigma * output) / alpha, output
        else:
            clean, noise = alpha * sample - sigma * output, alpha * output + sigma * sample
        if self.options["clip_sample"]:
            clean = clean.clip(-self.options["clip_sample_range"], self.options["clip_sample_range"])
        return after * clean + noisy * noise

    def levels(self, timestep: float) -> tuple[float, float]:
        """alpha and sigma at a timestep; a negative one is past the end."""
        past = 1.0 if self.options["set_alpha_to_one"] else float(self.signals[0])
        squared = float(self.signals[int(timestep)]) if timestep >= 0 else past
        return math.sqrt(squared), math.sqrt(1 - squared)


class Pndm:
    """PLMS, PNDM without its Runge-Kutta start: the first step is taken twice, then with the mean of both outputs."""

    start = 1.0

    def __init__(self, options: Mapping[str, Any], steps: int) -> None:
        self.prediction = options["prediction_type"]
        self.ddim = Ddim({**options, "clip_sample": False, "prediction_type": "epsilon"}, steps)
        falling = self.ddim.timesteps
        self.timesteps = np.concatenate([falling[:2], falling[1:]])
        self.outputs: list[Array] = []
        self.first: Array | None = None

    def scaled(self, at: int, sample: Array) -> Array:
        return sample

    def step(self, at: int, output: Array, sample: Array) -> Array:
        begin = self.timesteps[at]
        if at == 1 and self.first is not None:
            begin, sample = begin + self.ddim.stride, self.first
            output = (output + self.outputs[0]) * np.float32(0.5)
        else:
            if at == 0:
                self.first = sample
            self.outputs = [*self.outputs[-3:], output]
            output = _extrapolated(self.outputs)
        alpha, sigma = self.ddim.levels(begin)
        after, noisy = self.ddim.levels(begin - self.ddim.stride)
        noise = output if self.prediction == "epsilon" else alpha * output + sigma * sample
        return after / alpha * sample + (noisy - after * sigma / alpha) * noise


def _extrapolated(outputs: list[Array]) -> Array:
    """Adams-Bashforth over the last one to four outputs, the newest last."""
    weights = ((1.0,), (-1 / 2, 3 / 2), (5 / 12, -16 / 12, 23 / 12), (-9 / 24, 37 / 24, -59 / 24, 55 / 24))
    found = np.zeros_like(outputs[0])
    for weight, output in zip(weights[len(outputs) - 1], outputs, strict=True):
        found += weight * output
    return found


def _sigmas(options: Mapping[str, Any], timesteps: NDArray[np.float64]) -> list[float]:
    """sigma / alpha at each timestep, and after the last: 0, or what the model's first timestep has."""
    squared = signals(options)
    table = ((1 - squared) / squared) ** np.float32(0.5)
    last = 0.0 if options["final_sigmas_type"] == "zero" else float(table[0])
    found = np.interp(timesteps, np.arange(len(table)), table)
    return [float(np.float32(sigma)) for sigma in (*found, last)]


class Euler:
    """Euler's steps down the sigmas, with latents as clean + sigma noise; ``scaled`` makes their variance 1."""

    def __init__(self, options: Mapping[str, Any], steps: int) -> None:
        # Unlike the others it takes timesteps between two whole numbers, in float32.
        self.timesteps = spaced(options, steps).astype(np.float32).astype(np.float64)
        self.sigmas = _sigmas(options, self.timesteps)
        self.prediction = options["prediction_type"]
        largest = max(self.sigmas)
        self.start = math.hypot(largest, 1) if options["timestep_spacing"] == "leading" else largest

    def scaled(self, at: int, sample: Array) -> Array:
        return sample / math.hypot(self.sigmas[at], 1)

    def step(self, at: int, output: Array, sample: Array) -> Array:
        sigma, after = self.sigmas[at : at + 2]
        noise = output
        if self.prediction == "v_prediction":
            clean = sample / (sigma**2 + 1) - sigma / math.hypot(sigma, 1) * output
            noise = (sample - clean) / sigma
        return sample + (after - sigma) * noise


class Dpm:
    """DPM-Solver++ of order 1 or 2, which remembers the clean latents of the step before."""

    start = 1.0

    def __init__(self, options: Mapping[str, Any], steps: int) -> None:
        self.options = options
        self.timesteps = spaced(options, steps, more=0 if options["timestep_spacing"] == "trailing" else 1).round()
        sigmas = _sigmas(options, self.timesteps)
        self.levels = [(1 / math.hypot(sigma, 1), sigma / math.hypot(sigma, 1)) for sigma in sigmas]
        self.before: Array | None = None

    def scaled(self, at: int, sample: Array) -> Array:
        return sample

    def step(self, at: int, output: Array, sample: Array) -> Array:
        (alpha, sigma), (after, noisy) = self.levels[at : at + 2]
        if self.options["prediction_type"] == "epsilon":
            clean = (sample - sigma * output) / alpha
        else:
            clean = alpha * sample - sigma * output
        before, self.before = self.before, clean
        fall = noisy * alpha / sigma - after  # alpha (e^-h - 1) of the paper, finite also where the last sigma is 0
        moved = noisy / sigma * sample - fall * clean
        if before is None or self.options["solver_order"] == 1 or self._ends_low(at):
            return moved
        lambdas = [math.log(alpha / sigma) for alpha, sigma in self.levels[at - 1 : at + 2]]
        width, last = lambdas[2] - lambdas[1], lambdas[1] - lambdas[0]
        slope: Array = width / last * (clean - before)
        more: float = -0.5 * fall if self.options["solver_type"] == "midpoint" else fall / width + after
        return moved + more * slope

    def _ends_low(self, at: int) -> bool:
        """Whether step ``at`` is the last and of order 1 for stability."""
        few = self.options["lower_order_final"] and len(self.timesteps) < 15
        zero = self.options["final_sigmas_type"] == "zero"
        return at == len(self.timesteps) - 1 and bool(few or zero or self.options["euler_at_final"])
