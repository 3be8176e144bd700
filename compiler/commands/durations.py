"""Seconds of each step of a build before it runs, from counted operations and the speed of the device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from erasec import registry
from erasec.base import Pass, Work
from erasec.checkpoint.folder import downscale, trained_size
from erasec.commands.speed import Speed, bounds
from erasec.errors import ErasecError
from erasec.judging.evidence import collect_questions
from erasec.judging.validate import PICTURES
from erasec.model import operations
from erasec.reporting.read import read_report
from erasec.tensorrt.base import EngineTarget
from erasec.training.base import Learned, Measures
from erasec.training.measures import unlimited

if TYPE_CHECKING:
    from erasec.attention.sampling import Sampling
    from erasec.commands.plan import Plan
    from erasec.model.operations import Cost
    from erasec.model.view import Model

# Python's own work, in units of the time of a small layer, which is mostly Python's as well.
TRACED = 40  # tracing and linking a layer of a graph: 3.5 s for the 213 of glyphs, where a small layer took 0.47 ms
REPORT = 500  # the charts of a report: 0.01 s for a closed-form edit of glyphs, 0.9 s for trce at full size
LOADED = 60_000  # loading libraries and tokenizers
# Norms, activations, copies and the optimizer, relative to counted operations: the processor seconds of learned passes
# on glyphs (tests/benchmarks/results/passes_glyphs.json) are 0.7 to 2.3 times those of the operations alone.
OTHERS = 1.5
ENGINE = 1.2e-8  # assumed seconds a byte of building an engine on few cores; never compared with an engine's time
COMPARED = 8  # predictions with which a graph is compared with torch's
WRITES = 3  # times that a byte of an output is written or read: written, read back for its checks, and hashed


def estimate(plan: Plan) -> dict[str, Any]:
    """The time of a build: ``range`` and ``steps`` are the least and the most seconds, in all and by step, as the steps
    are named in a report. ``seconds`` is what an earlier build in the same folder took, else None."""
    slow, fast, how = bounds(plan.context.device)
    most, least = by_step(plan, slow), by_step(plan, fast)
    steps = {name: [least[name], most[name]] for name in most}
    earlier = _earlier(plan)
    if earlier:
        how = f"measured: the earlier build in {plan.out} took this long"
    total = [sum(least.values()), sum(most.values())]
    return {"seconds": earlier or None, "range": total, "steps": steps, "how": how}


def _earlier(plan: Plan) -> float:
    try:
        return float(sum(read_report(plan.out).get("seconds", {}).values()))
    except ErasecError:
        return 0.0


def by_step(plan: Plan, speed: Speed) -> dict[str, float]:
    """Seconds of each step of a build with a device of this speed."""
    model = plan.model
    steps = {"solve": 0.0}
    for step, measures in zip(plan.passes, plan.measures or (None,) * len(plan.passes), strict=True):
        for concept in plan.concepts:
            steps["solve"] += solving(step, step.work(model, concept), model, measures, speed)
    first, *_ = plan.targets
    steps["merge and write"] = WRITES * first.size(model) / speed.disk
    for target in plan.targets:
        written = target.size(model)
        seconds = 2 * written / speed.disk
        if target.cached(model):  # graphs
            networks = _graphs(model)
            seconds += TRACED * speed.layer * sum(cost.layers for cost in networks)
            seconds += COMPARED * sum(calls(cost, 1, 1, speed) for cost in networks)
        if isinstance(target, EngineTarget):
            seconds += ENGINE * written
        steps[f"export {target.name}"] = seconds
    painting, sampling = plan.painting, plan.painting.sampling
    if painting:
        images, seed = (painting.images, painting.pictures), plan.context.seed
        questions = collect_questions(plan.judge, plan.looked_for, *images, seed, plan.earlier)
        seconds = 2 * pictures(model, len(questions), sampling, speed)
        steps["pictures and judge"] = min(seconds, 60 * (painting.minutes or math.inf))
        labelled = sum(bool(question.looked_for) for question in questions)
        if painting.judged and (artifacts := sum(target.name in _portable() for target in plan.targets)):
            again = artifacts * min(PICTURES, labelled)
            steps["pictures of what was written"] = pictures(model, again, sampling, speed)
    if plan.files.pictures:
        steps["prompt and caption files"] = pictures(model, plan.files.pictures, sampling, speed)
    steps["report"] = REPORT * speed.layer + first.size(model) / speed.disk
    return steps


def _portable() -> set[str]:
    """The targets of which a build checks pictures."""
    runtimes = (registry.load_runtime(name) for name in registry.runtimes())
    return {folder for runtime in runtimes if runtime.portable for folder in runtime.folders}


def _graphs(model: Model) -> list[Cost]:
    return [operations.text(model), operations.denoiser(model), operations.decoder(model), operations.encoder(model)]


def calls(cost: Cost, rows: float, count: float, speed: Speed, factor: float = 1.0) -> float:
    """Seconds of ``count`` calls of a network with ``rows`` rows in all; ``factor`` is 1 for a forward pass."""
    return OTHERS * factor * (rows * cost.operations / speed.operations + count * cost.layers * speed.layer)


def pictures(model: Model, count: int, sampling: Sampling, speed: Speed) -> float:
    """Seconds of generating ``count`` pictures. Operations grow with the area of a picture."""
    config = model.source.config(model.family.denoiser)
    native = max(trained_size(config)) * downscale(model.source.config("vae"))
    area = min(1.0, sampling.side / native) ** 2 if sampling.side else 1.0
    rows = area * count * sampling.steps * (1 if sampling.guidance == 1 else 2)
    batches = math.ceil(count / 32)
    seconds = calls(operations.denoiser(model), rows, batches * sampling.steps, speed)
    return seconds + calls(operations.decoder(model), area * count, batches, speed)


def solving(step: Pass, work: Work, model: Model, measures: Measures | None, speed: Speed) -> float:
    """Seconds of computing the edit of one concept."""
    text, sites = operations.text(model), step.sites(model)
    width = max((site.shape[-1] for stream in model.streams.values() for site in stream), default=0)
    seconds = LOADED * speed.layer
    # Factors of a few systems of the width of the text states; then one product for each matrix.
    seconds += 12 * width**3 / speed.double
    seconds += sum(2 * math.prod(site.shape) * width for site in sites if site.proj in ("k", "v")) / speed.double / 4
    seconds += calls(text, work.prompts, work.prompts / 16, speed) + calls(text, work.trained_prompts, 0, speed, 3)
    if not isinstance(step, Learned):
        return seconds
    denoiser, total = operations.denoiser(model), model.count(model.family.denoiser)
    trained = sum(math.prod(site.shape) for site in sites if site.component == model.family.denoiser)
    taken = measures or unlimited(model)
    # Forward, and backward for activations; backward for the weights that are trained; and what is computed again.
    factor = 2 + trained / total + taken.checkpointing + bool(taken.rows)
    parts = math.ceil(work.graph_rows / taken.rows) if taken.rows else 1
    seconds += calls(denoiser, work.rows, work.calls, speed)
    seconds += calls(denoiser, work.trained_rows, work.trained_calls * parts, speed, factor)
    seconds += calls(operations.encoder(model), work.encoded, work.encoded / 4, speed)
    seconds += calls(operations.decoder(model), work.decoded, work.decoded / 4, speed)
    seconds += 4 * total / (4 * speed.disk)  # the networks are read, from a disk that reads faster than it writes
    return min(seconds, 60 * step.minutes) if step.minutes else seconds
