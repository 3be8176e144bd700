"""Recipe -> Plan: names resolved, the model found and pinned, sites matched, tools, disk and output folder checked.

A plan writes nothing. (A model that is only on the hub is fetched into the hub's own cache first.)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from erasec import registry
from erasec.base import Context, EditTarget, Pass, Target, file_name, with_options
from erasec.commands import doctor, estimates
from erasec.commands.output_paths import check_apart, check_free
from erasec.errors import ErasecError, MissingTool, nearest
from erasec.judging.validate import judge_of
from erasec.keys import key_file as secret
from erasec.keys.key_file import Key
from erasec.ldm.single_file import SingleFile
from erasec.model import sidecar as extras
from erasec.model import view as models
from erasec.recipe import concept as concepts_
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import PassUse, Recipe, parse_use

if TYPE_CHECKING:
    from erasec.model.view import Model


# What solving holds of d x d numbers for each stream: a system, its two sides, its solution and a copy.
MAPS = 5
EXTRAS = {"memory": "a memory of its attentions", "tokens": "tokens of its own", "negative": "a negative prompt"}


@dataclass(frozen=True)
class Plan:
    """A build that can run. ``recipe`` is resolved: concepts inlined, pass options spelled out, the model pinned.

    The first target is the plain folder, "hf" or, where more than weights is left, "bundle". ``keys`` are attached to
    what the passes leave.
    """

    recipe: Recipe
    model: Model
    concepts: tuple[Concept, ...]
    passes: tuple[Pass, ...]
    targets: tuple[Target | EditTarget, ...]
    out: Path
    context: Context
    keys: tuple[Key, ...] = ()


def make(recipe: Recipe, out: Path | None = None, pin: bool = True) -> Plan:
    """Resolve ``recipe``; ``out`` is by default MODEL-without-CONCEPT in the working directory. Raises ErasecError.

    ``pin`` fills in the model's digest, for which all of its weights are read. A digest that the recipe brings is
    compared in any case.
    """
    if not (recipe.erase or recipe.keys):
        raise ErasecError("nothing to erase", why="the recipe names no concept", fix="add --erase star, or any phrase")
    if recipe.passes and not recipe.erase:
        raise ErasecError("there is a pass and nothing to erase", fix="add --erase star, or leave out the pass")
    if recipe.absorb and not recipe.keys:
        raise ErasecError("there is no key to absorb", why="--absorb puts a key into weights", fix="add --key FILE")
    concepts = _concepts(recipe)
    keys = tuple(secret.read(Path(name).expanduser()) for name in recipe.keys)
    uses = recipe.passes or defaults(concepts)
    passes = tuple(_pass(number, use) for number, use in enumerate(uses, 1))
    out = (out or _default_out(recipe.model, concepts, keys)).expanduser()
    check_free(out)
    if inside := [key.path for key in keys if key.path.resolve().is_relative_to(out.resolve())]:
        raise ErasecError(
            f"the key {inside[0]} lies in the output folder",
            why="an output folder is replaced as a whole, and the key would be lost",
            fix="give another folder with --out, or keep the key elsewhere",
        )
    for text in recipe.targets:
        _target(text).check()
    context = Context(_device(recipe.device), recipe.seed)

    model = models.load(recipe.model, recipe.revision or None, recipe.variant, recipe.allow_pickle)
    model.source.prepare()
    check_apart(out, model)
    if recipe.digest and model.digest != recipe.digest:
        raise ErasecError(
            f"{recipe.model} is not the model that the recipe was made for",
            why=f"its digest is {model.digest[:12]}..., the recipe says {recipe.digest[:12]}...",
            fix="give the model of the recipe, or delete the line `digest` to build from this one",
        )
    for step in passes:
        if not step.sites(model) and not step.leaves:
            why = f"its family is {model.family.name}"
            raise ErasecError(f"pass {step.name} finds no site to edit in {model.name}", why)
    if not passes:  # with passes, the weights that the keys are bound to are known only once they are solved
        for key in keys:
            secret.check_bound(key, model.component_digest(model.family.denoiser))
    if rest := [each.name for each in concepts if keys and each.name not in {key.concept.name for key in keys}]:
        raise ErasecError(
            f"{rest[0]} is to be erased in a build that a key opens",
            why="such a build is compared with the one without the key, which cannot say that something else is gone",
            fix="erase first, then open what was built: erasec build OUT/hf --key FILE",
        )
    texts, targets = _targets(recipe, passes, model)
    resolved = _resolved(recipe, model, concepts, uses, passes, texts, pin)
    plan = Plan(resolved, model, concepts, passes, targets, out, context, keys)
    _check_disk(plan)
    return plan


def _concepts(recipe: Recipe) -> tuple[Concept, ...]:
    own = {concept.name: concept for concept in recipe.concepts}
    found = tuple(own[name] if name in own else concepts_.find(name) for name in recipe.erase)
    names = [concept.name for concept in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ErasecError(f"the concept {twice[0]!r} is to be erased twice", fix="name it once")
    return found


def defaults(concepts: Sequence[Concept]) -> tuple[PassUse, ...]:
    """The pass for concepts of these kinds. Raises ErasecError where they want different ones."""
    wanted: dict[str, list[str]] = {}
    for concept in concepts:
        wanted.setdefault(registry.DEFAULTS[concept.kind], []).append(f"{concept.name} (kind {concept.kind or 'none'})")
    if len(wanted) > 1:
        why = "; ".join(f"{name} for {', '.join(names)}" for name, names in wanted.items())
        fix = f"choose one: --pass {next(iter(wanted))}; or erase one after the other, in two builds"
        raise ErasecError("these concepts are of kinds that want different passes", why, fix)
    return tuple(PassUse(name=name) for name in wanted)


def _reason(name: str, concepts: Sequence[Concept]) -> str:
    """That a pass is what the concepts' kinds want, else nothing."""
    if any(registry.DEFAULTS[concept.kind] != name for concept in concepts):
        return ""
    return f"the default for concepts of kind {', '.join(sorted({concept.kind or 'none' for concept in concepts}))}"


def _pass(number: int, use: PassUse) -> Pass:
    try:
        return with_options(registry.load_pass(use.name), use.options, use.name)
    except ErasecError as error:
        error.where = error.where or f"[[pass]] {number} ({use.name})"
        raise


def _targets(
    recipe: Recipe, passes: Sequence[Pass], model: Model
) -> tuple[tuple[str, ...], tuple[Target | EditTarget, ...]]:
    """The targets as text and as objects, the plain folder first. Raises ErasecError for one that cannot hold all."""
    left = {kind: f"pass {step.name} leaves" for step in passes for kind in sorted(step.leaves)}
    left |= dict.fromkeys(extras.read(model.source.root).kinds, f"{model.name} carries")
    if recipe.keys and not recipe.absorb:
        left["memory"] = "a key is"
    named = {parse_use(text, "--target").name: text for text in recipe.targets}
    plain = "bundle" if left else "hf"
    texts = tuple(dict.fromkeys((named.get(plain, plain), *recipe.targets)))
    targets = tuple(_target(text) for text in texts)
    names = [target.name for target in targets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ErasecError(f"the target {twice[0]!r} is asked for twice", why="each has one folder", fix="name it once")
    sites = [site for step in passes for site in step.sites(model)]
    for target in targets:
        target.accept(sites)
        if lost := [kind for kind in left if kind not in target.holds]:
            raise ErasecError(
                f"the target {target.name} cannot hold what this build makes",
                why=f"{left[lost[0]]} {EXTRAS[lost[0]]}, and {target.summary} has no place for it",
                fix=f"leave out --target {target.name}: the folder bundle, which is always written, holds it",
            )
        if recipe.keys and isinstance(target, EditTarget):
            raise ErasecError(
                f"the target {target.name} cannot hold a key", why="it is made of the edit, which has no key in it",
                fix=f"leave out --target {target.name}, or --key",
            )  # fmt: skip
    return texts, targets


def _target(text: str) -> Target | EditTarget:
    use = parse_use(text, "--target")
    found = with_options(registry.load_target(use.name), use.options, f"target {use.name}")
    assert isinstance(found, Target | EditTarget)  # load_target gives no other
    return found


def _default_out(model: str, concepts: Sequence[Concept], keys: Sequence[Key] = ()) -> Path:
    words = [Path(model).expanduser().resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]]
    words += ["with", *(key.concept.name for key in keys)] if keys else ["without", *(each.name for each in concepts)]
    return Path(file_name(words))


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= here:
        raise MissingTool(
            f"there is no device {name!r} on this machine",
            why=f"torch {torch.__version__} finds {here} of kind {kind}",
            fix="use --device cpu; erasec doctor says what this machine can do",
        )
    return name


def _resolved(
    recipe: Recipe, model: Model, concepts: tuple[Concept, ...], uses: Sequence[PassUse], passes: tuple[Pass, ...],
    targets: tuple[str, ...], pin: bool,
) -> Recipe:  # fmt: skip
    spelled = (PassUse(name=use.name, options=_options(step)) for use, step in zip(uses, passes, strict=True))
    return recipe.model_copy(
        update={
            "revision": model.revision or recipe.revision,
            "digest": model.digest if pin else recipe.digest,
            "erase": tuple(concept.name for concept in concepts),
            "passes": tuple(spelled),
            "concepts": concepts,
            "targets": targets,
        }
    )


def _options(step: Pass) -> dict[str, Any]:
    """Every option of a pass with its value. Raises ErasecError for one that a recipe cannot hold."""
    options = asdict(cast("Any", step))
    for name, value in options.items():
        if not isinstance(value, bool | int | float | str):
            why = f"options are text, numbers, true or false; this is a {type(value).__name__}"
            raise ErasecError(f"pass {step.name}: a recipe cannot hold the option {name}", why)
    return options


def _written(plan: Plan) -> dict[str, int]:
    """Bytes by target, as each estimates them."""
    return {target.name: target.size(plan.model) for target in plan.targets}


def _free(out: Path) -> int:
    place = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.is_dir())
    return shutil.disk_usage(place).free


def _check_disk(plan: Plan) -> None:
    need, free = sum(_written(plan).values()), _free(plan.out)
    if need > free:
        raise ErasecError(
            f"the disk of {plan.out} has too little room",
            why=f"about {size(need)} will be written, {size(free)} are free",
            fix="free some space, or give a folder on another disk with --out",
        )


def size(count: int) -> str:
    """Bytes for people: decimal units, three digits."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def describe(plan: Plan) -> dict[str, Any]:
    """Everything that ``erasec plan`` tells, as plain data; ``disk`` and ``memory`` hold estimates and say how made."""
    model, written = plan.model, _written(plan)
    return {
        "model": {"name": model.name, "revision": model.revision, "family": model.family.name},
        "concepts": [
            concept.model_dump(mode="json", include={"name", "erase", "synonyms", "anchor", "keep", "implicit"})
            for concept in plan.concepts
        ],
        "passes": [
            {
                "name": step.name,
                "version": step.version,
                "paper": step.paper,
                "options": _options(step),
                "reason": _reason(step.name, plan.concepts),
                "sites": [{**asdict(site), "shape": list(site.shape)} for site in step.sites(model)],
            }
            for step in plan.passes
        ],
        "keys": [{"path": str(key.path), "concept": key.concept.name} for key in plan.keys],
        "targets": [
            {"name": target.name, "summary": target.summary, "bytes": written[target.name]} for target in plan.targets
        ],
        "disk": {
            "out": str(plan.out),
            "needed": sum(written.values()),
            "free": _free(plan.out),
            "how": "estimate of each target; all weights in float32 where it knows no better",
        },
        "memory": estimates.memory(model, plan.passes, judge_of(model) is not None, len(plan.targets) > 1),
        "time": estimates.time(plan.out),
        "device": plan.context.device,
        "seed": plan.context.seed,
        "tools": {name: doctor.version(name) or "missing" for name in (*doctor.CORE, *doctor.OPTIONAL)},
        "notes": notes(plan),
    }


def notes(plan: Plan) -> list[str]:
    """Sentences about what may not be meant: what a single file does not say, and concepts made from a bare word."""
    bundled = concepts_.library()
    source = plan.model.source
    return [
        *(source.notes if isinstance(source, SingleFile) else ()),
        *(
            f"no concept file is named {concept.name!r}: the phrase itself is erased, with no synonyms and no anchor; "
            + nearest(concept.name, bundled)
            for concept in plan.concepts
            if bundled and concept == Concept(name=concept.name, erase=(concept.name,))
        ),
    ]
