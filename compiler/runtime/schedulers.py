"""Schedulers in numpy, from the config of a diffusers scheduler, that take its steps number by number.

DDIM (arXiv 2010.02502), Euler (arXiv 2206.00364, algorithm 2 without churn), DPM-Solver++ 2M (arXiv 2211.01095), the
linear multistep half of PNDM (arXiv 2202.09778), and Euler steps of rectified flows. Latents are x = alpha x0 + sigma
noise; all arrays are float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from erasec.errors import ErasecError, shown, suggestion
from erasec.graphs.signature import LAYOUTS, layout
from erasec.ldm.configs import NOISE_DEFAULTS

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Folder

Array = NDArray[Any]
KINDS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
}
FLOW = "FlowMatchEulerDiscreteScheduler"  # of models that predict velocities; no other one here samples them
# The options of each class with diffusers' defaults, as old configs lack some.
SHARED = NOISE_DEFAULTS | {"steps_offset": 0}
SIGMAS = {
    "rescale_betas_zero_snr": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": SHARED
    | {
        "timestep_spacing": "leading",
        "set_alpha_to_one": True,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    },
    "EulerDiscreteScheduler": SHARED | SIGMAS | {"interpolation_type": "linear", "timestep_type": "discrete"},
    "DPMSolverMultistepScheduler": SHARED
    | SIGMAS
    | {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "thresholding": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "variance_type": None,
        "lambda_min_clipped": -np.inf,
    },
    FLOW: {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "time_shift_type": "exponential",
        "invert_sigmas": False,
        "shift_terminal": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "stochastic_sampling": False,
    },
    "PNDMScheduler": SHARED | {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
}
# The supported values of options of which diffusers supports more.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (1, 2),
    "solver_type": ("midpoint", "heun"),
    "skip_prk_steps": (True,),
    "trained_betas": (None,),
    "variance_type": (None,),
    "lambda_min_clipped": (-np.inf,),
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "time_shift_type": ("exponential",),
    "invert_sigmas": (False, None),
    "shift_terminal": (None,),
    "stochastic_sampling": (False, None),
}


class Scheduler(Protocol):
    """One denoising run. Its steps must be taken in order, as multistep methods use earlier predictions.

    ``timesteps`` (n,) are the denoiser's at each step; ``start`` is the standard deviation of the initial noise.
    """

    timesteps: NDArray[np.float64]
    start: float

    def scaled(self, at: int, sample: Array) -> Array:
        """The denoiser's input at step ``at``, for the latents ``sample``."""

    def step(self, at: int, output: Array, sample: Array) -> Array:
        """The latents after step ``at``, where the denoiser predicted ``output`` for the latents ``sample``."""


def make_scheduler(
    config: Mapping[str, Any], steps: int, kind: str = "auto", patches: int = 0, flow: bool = False
) -> Scheduler:
    """The scheduler of a scheduler_config.json, or the one called ``kind`` with this config's noise schedule.

    ``patches`` is the number of patches of the picture where the model is a FLUX: its schedule depends on it. ``flow``
    says that the model predicts velocities of a rectified flow. Raises ErasecError for a class, an option or a number
    of steps that is not supported.
    """
    if kind != "auto" and kind not in KINDS:
        raise ErasecError(f"there is no scheduler {kind!r}", why=suggestion(kind, ("auto", *KINDS)))
    name = str(config.get("_class_name")) if kind == "auto" else KINDS[kind]
    if flow != (name == FLOW):
        model = "velocities of a rectified flow" if flow else "no velocities of a rectified flow"
        raise ErasecError(
            f"the scheduler {name} cannot sample this model",
            why=f"it predicts {model}",
            fix="leave out --scheduler" if kind != "auto" else "sample with diffusers, which reads the same folder",
        )
    if name == FLOW and config.get("use_dynamic_shifting") and not patches:
        raise ErasecError(
            "the schedule of this model depends on the size of the picture",
            why="its scheduler has use_dynamic_shifting, which is read for FLUX alone",
            fix="sample with diffusers, which reads the same folder",
        )
    instead = f"--scheduler {'euler' if name == KINDS['ddim'] else 'ddim'}   uses the same model's noise schedule"
    elsewhere = "sample with diffusers, which reads the same folder"  # no other scheduler here has the noise schedule
    if name not in DEFAULTS:
        raise ErasecError(f"the scheduler is a {name}", why=f"supported are {', '.join(DEFAULTS)}", fix=instead)
    # Configs of other classes lack the first option, and its default is not supported. The second belongs to the model:
    # PNDM has no such option, and would take another noise schedule.
    overrides = {"skip_prk_steps": True, "rescale_betas_zero_snr": False} if kind != "auto" else {}
    defaults = DEFAULTS[name] | overrides
    options = {key: config.get(key, default) for key, default in defaults.items()}
    for key, value in options.items():
        if type(defaults[key]) in (int, float) and type(value) not in (int, float):
            raise ErasecError(
                f"the {name} has {key} = {shown(value)}", why="it takes a number", fix="fetch the model again"
            )
        if key in SUPPORTED and value not in SUPPORTED[key]:
            raise ErasecError(
                f"the {name} has {key} = {value!r}",
                why=f"supported are {', '.join(map(repr, SUPPORTED[key]))}",
                fix=elsewhere if key in (*NOISE_DEFAULTS, "rescale_betas_zero_snr") else instead,
            )
    total = options["num_train_timesteps"]
    if not 0 < steps < total:
        raise ErasecError(
            f"{steps} steps cannot be taken", why=f"the model has {total} timesteps", fix=f"take 1 to {total - 1}"
        )
    if name == FLOW:
        return FlowEuler(options, steps, patches)
    classes: dict[str, type[Ddim | Euler | Dpm | Pndm]] = {
        KINDS["ddim"]: Ddim,
        KINDS["euler"]: Euler,
        KINDS["dpm"]: Dpm,
        KINDS["pndm"]: Pndm,
    }
    scheduler = classes[name](options, steps)
    if scheduler.timesteps.max() >= total:
        raise ErasecError(
            f"{steps} steps cannot be taken",
            why=f"steps_offset = {options['steps_offset']} leads beyond the last timestep {total - 1}",
            fix="take fewer",
        )
    return scheduler


def sampling_notes(target: str, checkpoint: Folder) -> tuple[str, ...]:
    """A sentence where ``erasec run`` cannot sample with the scheduler of a checkpoint, for a target's plan."""
    name = layout(checkpoint)
    try:
        config = checkpoint.config("scheduler", "scheduler_config.json")
        make_scheduler(config, 2, patches=int(name == "flux"), flow="transformer" in LAYOUTS[name])
    except ErasecError as error:
        return (f"{target}: erasec run cannot sample with the model's scheduler: {error.what}; {error.fix}.",)
    return ()


def alphas_cumprod(options: Mapping[str, Any]) -> Array:
    """alpha squared at each of the model's timesteps (t,), bit for bit as torch computes it."""
    first, last, count = options["beta_start"], options["beta_end"], options["num_train_timesteps"]
    root = options["beta_schedule"] == "scaled_linear"
    start, end = (np.float32(value**0.5 if root else value) for value in (first, last))
    # torch.linspace counts from both ends with a float32 increment, and rounds each number once.
    at, width = np.arange(count), np.float64((end - start) / np.float32(count - 1))
    line = np.where(at < count // 2, start + width * at, end - width * (count - 1 - at)).astype(np.float32)
    betas = line * line if root else line
    return np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)


def spaced_timesteps(options: Mapping[str, Any], steps: int, more: int = 0) -> NDArray[np.float64]:
    """``steps`` of the model's timesteps, descending, spaced as in arXiv 2305.08891, table 2; not rounded.

    The spacing is that of ``steps`` + ``more`` timesteps, of which the last ``more`` are left out.
    """
    total, offset, count = int(options["num_train_timesteps"]), float(options["steps_offset"]), steps + more
    if options["timestep_spacing"] == "trailing":
        # arange may return one number more, by rounding of floating point numbers.
        return np.arange(total, 0, -total / steps, dtype=np.float64).round()[:steps] - 1
    if options["timestep_spacing"] == "linspace":
        return np.linspace(0, total - 1, count)[::-1][:steps]
    return (np.arange(count, dtype=np.float64) * (total // count))[::-1][:steps] + offset


class Ddim:
    """DDIM without noise between the steps (eta = 0)."""

    start = 1.0

    def __init__(self, options: Mapping[str, Any], steps: int) -> None:
        self.options = options
        self.alphas_cumprod = alphas_cumprod(options)
        self.timesteps = spaced_timesteps(options, steps).round()
        self.stride = options["num_train_timesteps"] // steps

    def scaled(self, at: int, sample: Array) -> Array:
        return sample

    def step(self, at: int, output: Array, sample: Array) -> Array:
        alpha, sigma = self.levels(self.timesteps[at])
        next_alpha, next_sigma = self.levels(self.timesteps[at] - self.stride)
        if self.options["prediction_type"] == "epsilon":
            clean, noise = (sample - sigma * output) / alpha, output
        else:
            clean, noise = alpha * sample - sigma * output, alpha * output + sigma * sample
        if self.options["clip_sample"]:
            clean = clean.clip(-self.options["clip_sample_range"], self.options["clip_sample_range"])
        return next_alpha * clean + next_sigma * noise

    def levels(self, timestep: float) -> tuple[float, float]:
        """alpha and sigma at a timestep; a negative one is beyond the last."""
        last = 1.0 if self.options["set_alpha_to_one"] else float(self.alphas_cumprod[0])
        squared = float(self.alphas_cumprod[int(timestep)]) if timestep >= 0 else last
        return math.sqrt(squared), math.sqrt(1 - squared)


class Pndm:
    """PLMS: PNDM without its Runge-Kutta start. The first step is taken twice, the second time with the mean of both
    predictions."""

    start = 1.0

    def __init__(self, options: Mapping[str, Any], steps: int) -> None:
        self.prediction = options["prediction_type"]
        self.ddim = Ddim({**options, "clip_sample": False, "prediction_type": "epsilon"}, steps)
        timesteps = self.ddim.timesteps
        self.timesteps = np.concatenate([timesteps[:2], timesteps[1:]])
        self.outputs: list[Array] = []
        self.initial: Array | None = None

    def scaled(self, at: int, sample: Array) -> Array:
        return sample

    def step(self, at: int, output: Array, sample: Array) -> Array:
        begin = self.timesteps[at]
        if at == 1 and self.initial is not None:
            begin, sample = begin + self.ddim.stride, self.initial
            output = (output + self.outputs[0]) * np.float32(0.5)
        else:
            if at == 0:
                self.initial = sample
            self.outputs = [*self.outputs[-3:], output]
            output = _adams_bashforth(self.outputs)
        alpha, sigma = self.ddim.levels(begin)
        next_alpha, next_sigma = self.ddim.levels(begin - self.ddim.stride)
        noise = output if self.prediction == "epsilon" else alpha * output + sigma * sample
        return next_alpha / alpha * sample + (next_sigma - next_alpha * sigma / alpha) * noise


def _adams_bashforth(outputs: list[Array]) -> Array:
    """The Adams-Bashforth combination of the last one to four predictions, of which the newest is the last."""
    weights = ((1.0,), (-1 / 2, 3 / 2), (5 / 12, -16 / 12, 23 / 12), (-9 / 24, 37 / 24, -59 / 24, 55 / 24))
    combined = np.zeros_like(outputs[0])
    for weight, output in zip(weights[len(outputs) - 1], outputs, strict=True):
        combined += weight * output
    return combined


def _sigmas(options: Mapping[str, Any], timesteps: NDArray[np.float64]) -> list[float]:
    """sigma / alpha at each timestep, then a final value: 0, or that of the model's timestep 0."""
    squared = alphas_cumprod(options)
    table = ((1 - squared) / squared) ** np.float32(0.5)
    last = 0.0 if options["final_sigmas_type"] == "zero" else float(table[0])
    interpolated = np.interp(timesteps, np.arange(len(table)), table)
    return [float(np.float32(sigma)) for sigma in (*interpolated, last)]


class Euler:
    """Euler steps over descending sigmas, on latents x0 + sigma noise; ``scaled`` makes their variance 1."""

    def __init__(self, options: Mapping[str, Any], steps: int) -> None:
        # Unlike the other schedulers, this one does not round timesteps to whole numbers; they are float32.
        self.timesteps = spaced_timesteps(options, steps).astype(np.float32).astype(np.float64)
        self.sigmas = _sigmas(options, self.timesteps)
        self.prediction = options["prediction_type"]
        largest = max(self.sigmas)
        self.start = math.hypot(largest, 1) if options["timestep_spacing"] == "leading" else largest

    def scaled(self, at: int, sample: Array) -> Array:
        return sample / math.hypot(self.sigmas[at], 1)

    def step(self, at: int, output: Array, sample: Array) -> Array:
        sigma, next_sigma = self.sigmas[at : at + 2]
        noise = output
        if self.prediction == "v_prediction":
            clean = sample / (sigma**2 + 1) - sigma / math.hypot(sigma, 1) * output
            noise = (sample - clean) / sigma
        return sample + (next_sigma - sigma) * noise


class FlowEuler:
    """Euler steps along a rectified flow, on latents (1 - sigma) x0 + sigma noise (arXiv 2403.03206, section 3.1).

    A schedule of ``patches`` above 0 is that of FLUX: even sigmas, shifted by the number of patches where the options
    have ``use_dynamic_shifting``. Others are even between the first and the last shifted sigma, and shifted again, as
    diffusers has it.
    """

    start = 1.0

    def __init__(self, options: Mapping[str, Any], steps: int, patches: int = 0) -> None:
        total, shift = options["num_train_timesteps"], options["shift"]
        if patches:
            sigmas: Array = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
        else:
            first, last = (float(_shifted(np.float32(end), shift)) for end in (1.0, 1 / total))
            sigmas = np.linspace(first, last, steps)
        if options["use_dynamic_shifting"]:
            # The logarithm of the shift grows with the number of patches.
            least, most = options["base_image_seq_len"], options["max_image_seq_len"]
            slope = (options["max_shift"] - options["base_shift"]) / (most - least)
            shift = math.exp(options["base_shift"] + slope * (patches - least))
        shifted = _shifted(sigmas, shift).astype(np.float32)
        self.timesteps = (shifted * np.float32(total)).astype(np.float64)
        self.sigmas = [*map(float, shifted), 0.0]

    def scaled(self, at: int, sample: Array) -> Array:
        return sample

    def step(self, at: int, output: Array, sample: Array) -> Array:
        return sample + np.float32(self.sigmas[at + 1] - self.sigmas[at]) * output


def _shifted(sigma: Any, shift: float) -> Any:
    """More noise in every step: shift sigma / (1 + (shift - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


class Dpm:
    """DPM-Solver++ of order 1 or 2. Order 2 uses the clean latents that the previous step predicted."""

    start = 1.0

    def __init__(self, options: Mapping[str, Any], steps: int) -> None:
        self.options = options
        self.timesteps = spaced_timesteps(
            options, steps, more=0 if options["timestep_spacing"] == "trailing" else 1
        ).round()
        sigmas = _sigmas(options, self.timesteps)
        self.levels = [(1 / math.hypot(sigma, 1), sigma / math.hypot(sigma, 1)) for sigma in sigmas]
        self.previous_clean: Array | None = None

    def scaled(self, at: int, sample: Array) -> Array:
        return sample

    def step(self, at: int, output: Array, sample: Array) -> Array:
        (alpha, sigma), (next_alpha, next_sigma) = self.levels[at : at + 2]
        if self.options["prediction_type"] == "epsilon":
            clean = (sample - sigma * output) / alpha
        else:
            clean = alpha * sample - sigma * output
        previous, self.previous_clean = self.previous_clean, clean
        # The paper's alpha (e^-h - 1), in a form that is finite where the last sigma is 0.
        decay = next_sigma * alpha / sigma - next_alpha
        first_order = next_sigma / sigma * sample - decay * clean
        if previous is None or self.options["solver_order"] == 1 or self._ends_low(at):
            return first_order
        lambdas = [math.log(alpha / sigma) for alpha, sigma in self.levels[at - 1 : at + 2]]
        width, last_width = lambdas[2] - lambdas[1], lambdas[1] - lambdas[0]
        slope: Array = width / last_width * (clean - previous)
        weight: float = -0.5 * decay if self.options["solver_type"] == "midpoint" else decay / width + next_alpha
        return first_order + weight * slope

    def _ends_low(self, at: int) -> bool:
        """Whether step ``at`` is the last one and takes order 1, for stability."""
        few = self.options["lower_order_final"] and len(self.timesteps) < 15
        zero = self.options["final_sigmas_type"] == "zero"
        return at == len(self.timesteps) - 1 and bool(few or zero or self.options["euler_at_final"])
