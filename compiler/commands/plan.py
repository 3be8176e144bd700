"""Turns a recipe into a plan: resolves names, loads and pins the model, checks sites, tools, disk and output folder.

A plan writes nothing, except that a model of the hub is downloaded into the hub's own cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec import registry
from erasec.base import Context, EditTarget, Pass, Target
from erasec.checkpoint.staging import check_free, settle
from erasec.commands import doctor, durations, estimates, release, settings
from erasec.commands.name_notes import understood, without_file
from erasec.commands.output_paths import check_disjoint, check_replaceable, default_out
from erasec.commands.pictures import end, unjudged_notes
from erasec.commands.prompt_lengths import check_lengths, check_options
from erasec.commands.question_files import QuestionFiles, read_files
from erasec.commands.question_files import remarks as file_remarks
from erasec.commands.spelling import one_spelling
from erasec.errors import ErasecError, MissingTool
from erasec.judging.evidence import labels
from erasec.judging.jury import judge_of_build
from erasec.judging.painting import affordable, plan_painting
from erasec.keys.key_file import Key, check_bound, read_key
from erasec.ldm.single_file import SingleFile
from erasec.model import loading, sidecar
from erasec.options import configure
from erasec.recipe import concept as concept_library
from erasec.recipe.concept import Concept
from erasec.recipe.goals import resolve_goals
from erasec.recipe.recipe import NamedOptions, Recipe, parse_named_options
from erasec.reporting.earlier import erased_before
from erasec.selection import world_of
from erasec.training.base import Learned
from erasec.training.measures import choose, parse_memory

if TYPE_CHECKING:
    from erasec.base import Judge
    from erasec.family import Site
    from erasec.judging.painting import Painting
    from erasec.model.view import Model
    from erasec.training.base import Measures


@dataclass(frozen=True)
class Plan:
    """A build that is ready to run.

    ``recipe`` is resolved: it contains the concepts, every option of the passes, and the digest of the model. The goals
    of ``concepts`` are resolved as well: none of them leads to what is erased. ``earlier`` are concepts that were
    erased from the model before. The first target is the plain folder: "hf", or "bundle" if the result is more than
    weights. ``keys`` are attached to the edited model. ``judge`` is None if no judge knows the model. ``painting`` says
    which pictures are painted, and ``files`` are the prompt and caption files. ``remarks`` are sentences about how
    names, goals, files and long phrases were understood. For each pass, ``origins`` says where the value of each option
    comes from, ``reasons`` for which kinds of concepts it is the default, "" for none, and ``measures`` what it does to
    fit the memory, None where the memory has no limit. ``sign`` is the private key that signs the build.
    """

    recipe: Recipe
    model: Model
    concepts: tuple[Concept, ...]
    passes: tuple[Pass, ...]
    targets: tuple[Target | EditTarget, ...]
    out: Path
    context: Context
    painting: Painting = field(compare=False)  # what fits into memory depends on the moment
    keys: tuple[Key, ...] = ()
    judge: Judge | None = None
    earlier: tuple[Concept, ...] = ()
    files: QuestionFiles = field(default_factory=QuestionFiles)
    remarks: tuple[str, ...] = field(default=(), compare=False)
    origins: tuple[Mapping[str, settings.Origin], ...] = field(default=(), compare=False)
    reasons: tuple[str, ...] = field(default=(), compare=False)
    measures: tuple[Measures | None, ...] = ()
    sign: Path | None = None

    @property
    def looked_for(self) -> tuple[Concept, ...]:
        """The concepts that pictures are about: those of the keys in a build with keys, or those that are erased."""
        return tuple(key.concept for key in self.keys) or self.concepts

    @property
    def unjudged(self) -> tuple[str, ...]:
        """Those of them that no judge can see in pictures of the model."""
        return tuple(concept.name for concept in self.looked_for if not labels(self.judge, concept))


def make_plan(
    recipe: Recipe, out: Path | None = None, pin: bool = True, by_flag: bool = False, sign: Path | None = None
) -> Plan:
    """Resolve ``recipe``. ``out`` is by default the folder MODEL-without-CONCEPT in the working directory. With
    ``by_flag``, the passes of the recipe were given by flags. ``sign`` is the private key that signs the build.

    With ``pin``, the digest of the model is written into the recipe, for which all weights are read. A digest in
    ``recipe`` is compared with that of the model in any case. Raises ErasecError, or MissingTool if a library that a
    target needs is not installed.
    """
    if not (recipe.erase or recipe.keys):
        raise ErasecError("nothing to erase", why="the recipe names no concept", fix="add --erase star, or any phrase")
    if recipe.passes and not recipe.erase:
        raise ErasecError("there is a pass and nothing to erase", fix="add --erase star, or leave out the pass")
    if recipe.absorb and not recipe.keys:
        raise ErasecError("there is no key to absorb", why="--absorb puts a key into weights", fix="add --key FILE")
    given, recipe = recipe.model, one_spelling(recipe)
    concepts = _concepts(recipe)
    keys = tuple(read_key(Path(name).expanduser()) for name in recipe.keys)
    classes = settings.load(recipe.passes)
    out = (out or default_out(given, concepts, keys)).expanduser()
    if inside := [key.path for key in keys if key.path.resolve().is_relative_to(out.resolve())]:
        raise ErasecError(
            f"the key {inside[0]} lies in the output folder",
            why="an output folder is replaced as a whole, and the key would be lost",
            fix="give another folder with --out, or keep the key elsewhere",
        )
    settle(out)
    check_replaceable(out)
    check_free(out)
    release.check(recipe, out, sign)
    for text in recipe.targets:
        make_target(text).check()
    context = Context(find_device(recipe.device), recipe.seed, recipe.judges)

    model = loading.load(recipe.model, recipe.revision or None, recipe.variant, recipe.allow_pickle)
    model.source.prepare()
    check_disjoint(out, model)
    limits = affordable(recipe.checks, model, context.device, len(recipe.erase), bool(world_of(model)))
    recipe = recipe.model_copy(update={"checks": limits})
    if recipe.digest and model.digest != recipe.digest:
        raise ErasecError(
            f"{recipe.model} is not the model that the recipe was made for",
            why=f"its digest is {model.digest[:12]}..., the recipe says {recipe.digest[:12]}...",
            fix="use the model of the recipe, or delete the line `digest` to build from this one",
        )
    concepts, remarks = _of_model(recipe, concepts, model)
    defaults = settings.defaults_of(model)
    uses = recipe.passes or settings.default_passes(concepts, defaults)
    settled = settings.settle(uses, concepts, defaults, by_flag, classes)
    passes = tuple(item.step for item in settled)
    reasons = tuple(settings.reason(step.name, concepts, defaults) for step in passes)
    for step in passes:
        if not step.sites(model) and not step.extras:
            why = f"its family is {model.family.name}"
            raise ErasecError(f"pass {step.name} finds no site to edit in {model.name}", why)
    if not passes:  # with passes, the weights that the keys must fit are only known after solving
        for key in keys:
            check_bound(key, model.component_digest(model.family.denoiser))
    if rest := [
        concept.name for concept in concepts if keys and concept.name not in {key.concept.name for key in keys}
    ]:
        raise ErasecError(
            f"{rest[0]} cannot be erased in a build with a key of another concept",
            why="such a build is compared with the same build without the key, which shows nothing of other concepts",
            fix="erase it first, then add the key to the result: erasec build OUT/hf --key FILE",
        )
    opened = {key.concept.name for key in keys}
    earlier = tuple(concept for concept in erased_before(model) if concept.name not in opened)
    if passes:
        concepts, goals = resolve_goals(concepts, earlier)
        remarks += (*goals, *check_lengths(concepts, model), *check_options(passes, model))
        remarks += tuple(_again(concepts, earlier, model))
    texts, targets = _targets(recipe, passes, model)
    resolved = _resolved(recipe, model, concepts, uses, passes, texts, pin)
    judge, missing = judge_of_build(model, (*(key.concept for key in keys), *concepts, *earlier), recipe.judges)
    files = read_files(recipe, judge, context.device)
    disks = estimates.disks(targets, model, out)
    remarks += (*missing, *file_remarks(files, recipe.seed), *estimates.check_disks(disks))
    looked_for = [key.concept for key in keys] or concepts
    painting = plan_painting(model, judge, looked_for, recipe.checks, context.device)
    if files.pictures and painting.obstacle:
        raise ErasecError(
            "prompt and caption files cannot be measured with this model",
            why=painting.obstacle,
            fix="leave out --prompts and --captions",
        )
    limit = parse_memory(recipe.memory) or estimates.free_memory(context.device)
    measures = tuple(
        choose(step, model, concepts, context.device, limit) if limit and isinstance(step, Learned) else None
        for step in passes
    )
    return Plan(
        resolved,
        model,
        concepts,
        passes,
        targets,
        out,
        context,
        painting,
        keys,
        judge,
        earlier,
        files,
        remarks,
        origins=tuple(item.origins for item in settled),
        reasons=reasons,
        measures=measures,
        sign=sign,
    )


def _concepts(recipe: Recipe) -> tuple[Concept, ...]:
    own = {concept.name: concept for concept in recipe.concepts}
    concepts = tuple(own[name] if name in own else concept_library.find(name) for name in recipe.erase)
    _check_once(concepts)
    return concepts


def _check_once(concepts: Sequence[Concept]) -> None:
    names = [concept.name for concept in concepts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ErasecError(f"the concept {twice[0]!r} is named twice", fix="name it once")


def _of_model(recipe: Recipe, concepts: Sequence[Concept], model: Model) -> tuple[tuple[Concept, ...], tuple[str, ...]]:
    """The concepts as they apply to the model, and sentences about names that are a bundled concept and a phrase.

    In a model of a reference world, the concepts of that world go first. Elsewhere their names are phrases.
    """
    own, world = {concept.name for concept in recipe.concepts}, world_of(model)
    result = []
    for name, concept in zip(recipe.erase, concepts, strict=True):
        path = None if name in own else concept_library.bundled_file(name, world)
        result.append(concept if path is None else concept_library.find(name, world))
    _check_once(result)
    return tuple(result), understood(recipe.erase, result, own, world)


def _again(concepts: Sequence[Concept], earlier: Sequence[Concept], model: Model) -> list[str]:
    """A sentence for each concept that was erased from the model before."""
    erased = {phrase.casefold(): concept.name for concept in earlier for phrase in concept.phrases}
    return [
        f"{concept.name}: it was erased from {model.name} before, so there may be nothing left to erase."
        for concept in concepts
        if any(phrase.casefold() in erased for phrase in concept.erase)
    ]


def _targets(
    recipe: Recipe, passes: Sequence[Pass], model: Model
) -> tuple[tuple[str, ...], tuple[Target | EditTarget, ...]]:
    """The targets as text and as objects, the plain folder first. Raises ErasecError if a target cannot hold all of the
    result."""
    sources = {kind: f"pass {step.name} adds" for step in passes for kind in sorted(step.extras)}
    sources |= dict.fromkeys(sidecar.read_extras(model.source.root).kinds, f"{model.name} carries")
    if recipe.keys and not recipe.absorb:
        sources["memory"] = "a key is"
    by_name = {parse_named_options(text, "--target").name: text for text in recipe.targets}
    plain = "bundle" if sources else "hf"
    texts = tuple(dict.fromkeys((by_name.get(plain, plain), *recipe.targets)))
    targets = tuple(make_target(text) for text in texts)
    names = [target.name for target in targets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ErasecError(
            f"the target {twice[0]!r} is named twice", why="each target has one folder", fix="name it once"
        )
    sites = [site for step in passes for site in step.sites(model)]
    for target in targets:
        target.accept(sites)
        if lost := [kind for kind in sources if kind not in target.extras]:
            raise ErasecError(
                f"the target {target.name} cannot hold the result of this build",
                why=f"{sources[lost[0]]} {sidecar.describe(lost[:1])}, and {target.summary} has no place for it",
                fix=f"leave out --target {target.name}: the folder bundle, which is always written, holds it",
            )
        if recipe.keys and isinstance(target, EditTarget):
            raise ErasecError(
                f"the target {target.name} cannot hold a key",
                why="it is written from the edit, which contains no key",
                fix=f"leave out --target {target.name}, or --key",
            )
    return texts, targets


def make_target(text: str) -> Target | EditTarget:
    """The target that ``text``, NAME or NAME:key=value,..., names. Raises ErasecError."""
    use = parse_named_options(text, "--target")
    target = configure(registry.load_target(use.name), use.options, f"target {use.name}")
    assert isinstance(target, Target | EditTarget)  # the only subclasses of Output
    return target


def find_device(name: str) -> str:
    """The device of a build. Imports torch only where it may have another device than the CPU."""
    if name == "cpu" or (name == "auto" and not doctor.accelerator_build()):
        return "cpu"
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = counts[kind]
    if int(index or 0) >= count:
        raise MissingTool(
            f"there is no device {name!r} on this machine",
            why=f"torch {torch.__version__} finds {count} devices of kind {kind}",
            fix="use --device cpu; erasec doctor shows what this machine can run",
        )
    return name


def _resolved(
    recipe: Recipe,
    model: Model,
    concepts: tuple[Concept, ...],
    uses: Sequence[NamedOptions],
    passes: tuple[Pass, ...],
    targets: tuple[str, ...],
    pin: bool,
) -> Recipe:
    full_uses = (
        NamedOptions(name=use.name, options=settings.options(step)) for use, step in zip(uses, passes, strict=True)
    )
    return recipe.model_copy(
        update={
            "revision": model.revision or recipe.revision,
            "digest": model.digest if pin else recipe.digest,
            "erase": tuple(concept.name for concept in concepts),
            "passes": tuple(full_uses),
            "concepts": concepts,
            "targets": targets,
        }
    )


def describe(plan: Plan) -> dict[str, Any]:
    """Everything that ``erasec plan`` prints, as plain data. ``disk``, ``memory`` and ``time`` are estimates, each with
    the key ``how``."""
    model = plan.model
    sizes = {target.name: target.size(model) for target in plan.targets}
    disks = estimates.disks(plan.targets, model, plan.out)
    return {
        "model": {"name": model.name, "revision": model.revision, "family": model.family.name},
        "concepts": [
            concept.model_dump(
                mode="json", include={"name", "erase", "synonyms", "anchor", "counterparts", "keep", "implicit"}
            )
            for concept in plan.concepts
        ],
        "passes": [
            {
                "name": step.name,
                "version": step.version,
                "paper": step.paper,
                "options": settings.options(step),
                "origins": dict(origins),
                "reason": reason,
                "sites": [{**asdict(site), "shape": list(site.shape)} for site in step.sites(model)],
                "groups": _groups(step.sites(model)),
            }
            for step, origins, reason in zip(plan.passes, plan.origins, plan.reasons, strict=True)
        ],
        "keys": [{"path": str(key.path), "concept": key.concept.name} for key in plan.keys],
        "targets": [
            {"name": target.name, "summary": target.summary, "bytes": sizes[target.name]} for target in plan.targets
        ],
        "disk": {
            "out": str(plan.out),
            "needed": disks[0]["needed"],
            "free": disks[0]["free"],
            "disks": disks,
            "how": "estimate of each target, by default all weights in float32; with graphs in the cache and in TMPDIR",
        },
        "memory": estimates.memory(plan),
        "time": durations.estimate(plan),
        "judge": plan.judge.title if plan.judge else "",
        "unjudged": list(plan.unjudged),
        "end": end(plan),
        "pictures": {**asdict(plan.painting), "how": plan.painting.text},
        "files": plan.files.described(),
        "device": plan.context.device,
        "seed": plan.context.seed,
        "tools": {name: doctor.version(name) or "missing" for name in (*doctor.CORE, *doctor.OPTIONAL)},
        "notes": notes(plan),
    }


def describe_pairs(plan: Plan) -> dict[str, Any]:
    """The key ``apart`` of ``erasec plan --apart``: for each erased phrase the kept phrase nearest to it, the smallest
    angles first. Loads torch and the text encoder."""
    from erasec.closed_form.apart import closest_pairs

    return {"apart": [asdict(pair) for pair in closest_pairs(plan.model, plan.concepts)]}


def _groups(sites: Sequence[Site]) -> list[dict[str, Any]]:
    """Sites grouped by part of the model, attention and projection, with the tensors and parameters of each group."""
    groups: dict[tuple[str, str, str], list[Site]] = {}
    for site in sites:
        # The first part of a block, such as "down" of "down.0.attentions.1", or a text encoder's component.
        part = site.component if site.attn == "text" else site.block.split(".")[0].removesuffix("_block")
        groups.setdefault((part, site.attn, site.proj), []).append(site)
    parts = [part for part, _, _ in groups]
    return [
        {
            "part": part,
            "attn": attn,
            "proj": proj,
            "tensors": len(members),
            "parameters": sum(prod(site.shape) for site in members),
        }
        for (part, attn, proj), members in sorted(groups.items(), key=lambda group: parts.index(group[0][0]))
    ]


def notes(plan: Plan) -> list[str]:
    """Sentences about likely mistakes: settings that a single file does not contain, what targets leave out,
    how names and goals were understood, and phrases that are no bundled concept."""
    source = plan.model.source
    return [
        *(source.notes if isinstance(source, SingleFile) else ()),
        *(note for target in plan.targets for note in target.notes(plan.model)),
        *(note for step in plan.passes for note in step.notes(plan.model, plan.concepts)),
        *plan.remarks,
        *unjudged_notes(plan),
        *without_file(plan.concepts, world_of(plan.model)),
    ]
