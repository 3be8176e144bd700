"""``erasec audit``: attacks a finished model and says whether its concept is gone or only hidden."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec import registry
from erasec.audit.bench import Bench, Settings
from erasec.audit.gates import check_gates
from erasec.audit.instead import alternatives, notion
from erasec.audit.subject import Painted, Pictured, Runtime, Subject, Untrained, can_attack
from erasec.audit.suites import find_suite, make_probes
from erasec.base import Check, Context, Role
from erasec.checkpoint.staging import output
from erasec.commands.built import Built, find_built
from erasec.commands.plan import find_device
from erasec.errors import CheckFailed, ErasecError, MissingTool
from erasec.judging.evidence import labels
from erasec.model.loading import load, twin_of
from erasec.model.threads import fixed_threads
from erasec.recipe.concept import Concept, find
from erasec.recipe.recipe import Limits
from erasec.reporting import collect
from erasec.reporting.audit_page import AuditReport, write_audit
from erasec.selection import select, world_of

if TYPE_CHECKING:
    from erasec.audit.gates import Gate
    from erasec.base import Judge, Probe
    from erasec.checkpoint.folder import Folder
    from erasec.commands.plan import Plan
    from erasec.model.view import Model


@dataclass(frozen=True)
class Request:
    """What a user asks of an audit; "", (), 0 and None leave a value to the build that is audited, or to the suite."""

    model: str
    base: str = ""
    twin: str = ""
    concept: str = ""
    suite: str = "quick"
    probes: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    limits: Mapping[str, float] | None = None
    minutes: float = 0.0
    images: int = 0
    steps: int = 0
    size: int = 0
    device: str = "auto"
    seed: int | None = None
    revision: str | None = None
    variant: str = ""
    allow_pickle: bool = False


@dataclass(frozen=True)
class _Names:
    """How a report names the subjects: the audited model, its base and its twin, "" for one that is not there."""

    model: str
    base: str = ""
    twin: str = ""


@fixed_threads()
def audit(request: Request, out: Path) -> AuditReport:
    """Run the audit and write ``audit.html`` and ``audit.json`` into the folder ``out``.

    Raises CheckFailed where a gate is missed; the files are written before. Raises ErasecError where the model, the
    concept or a judge cannot be found.
    """
    suite = find_suite(request.suite)
    probes = make_probes(request.probes or suite.probes)
    audited = find_built(request.model)
    concept_name = _concept_name(request, audited)
    recipe = audited.recipe
    if request.seed is None:
        request = replace(request, seed=recipe.seed if recipe else 0)
    if not request.judges and recipe:
        request = replace(request, judges=recipe.judges)
    context = Context(find_device(request.device), request.seed or 0, request.judges, request.size)
    model = _load_or_none(audited.path, request)
    base, notes = _base(request, audited)
    concept = _concept(concept_name, audited, base or model)
    scorer, selector = _judges(base or model, concept, request.judges)
    twin = _twin(request, base, scorer, concept)
    subjects = _subjects(request, audited, model, base, twin, context)
    settings = _settings(request, audited, suite.images)
    bench = Bench(concept, subjects, scorer, selector, settings, audited.recipe)
    limits = request.limits if request.limits is not None else dict(recipe.gate) if recipe else {}
    names = _Names(request.model, base.name if base else "", twin)
    with output(out) as own:
        folder = own.new_folder()
        report = _examine(bench, probes, names, limits, context, request.minutes)
        report = replace(report, suite="" if request.probes else request.suite, notes=(*audited.notes, *notes))
        write_audit(report, folder)
        own.publish()
    if failed := [gate for gate in report.gates if gate.outcome == "failed"]:
        values = "; ".join(
            f"{gate.name} is {gate.value:.0%}, the limit {gate.limit:.0%}"
            if gate.value is not None
            else f"{gate.name} was not run"
            for gate in failed
        )
        raise CheckFailed(
            f"{len(failed)} of {len(report.gates)} gates are missed",
            why=values,
            where=str(out / "audit.html"),
            fix="look at the page; then erase with another pass, or change [gate] of the recipe",
        )
    return report


def _examine(
    bench: Bench,
    probes: Sequence[Probe],
    names: _Names,
    limits: Mapping[str, float],
    context: Context,
    minutes: float = 0.0,
    pictured: bool = True,
) -> AuditReport:
    """Run the probes. With ``pictured``, the report has pictures of what the model draws in place of the concept."""
    started = time.monotonic()
    readings = tuple(bench.run(probes, minutes))
    selector, settings, subjects = bench.selector, bench.settings, bench.subjects
    return AuditReport(
        model=_described(subjects["model"], names.model),
        base=_described(subjects["base"], names.base) if names.base else None,
        twin=_described(subjects["twin"], names.twin) if names.twin else None,
        concept=bench.concept.model_dump(mode="json"),
        suite="",
        settings={
            "images": settings.images,
            "steps": settings.steps,
            "size": settings.size,
            "guidance": settings.guidance,
            "seed": settings.seed,
            "device": context.device,
        },
        judges={"scorer": _named(bench.scorer), "selector": _named(selector) if selector else None},
        readings=readings,
        gates=check_gates(readings, limits),
        notion=notion(readings, bench.concept.name),
        alternatives=alternatives(bench) if pictured else None,
        seconds={"audit": time.monotonic() - started},
        environment=collect.environment(),
    )


# --- audits of builds ------------------------------------------------------------------------------------------------


def check_auditable(plan: Plan, suite: str) -> None:
    """Raise ErasecError, before anything is solved, where a build cannot be audited by ``suite``."""
    make_probes(find_suite(suite).probes)
    if plan.keys:
        raise ErasecError(
            "a build with a key cannot be audited",
            why="the key is there to bring the concept back",
            fix="leave out --audit, and audit the build without the key",
        )
    for concept in plan.concepts:
        _judges(plan.model, concept, plan.recipe.judges)


def audit_build(plan: Plan, suite: str, built: Folder) -> tuple[list[dict[str, Any]], list[Check]]:
    """Audit the merged checkpoint of a build before it is published: for each concept the facts of the audit as
    ``audit.json`` has them, and a check for each gate of the recipe.

    The model is attacked as ``erasec audit OUT --suite SUITE`` attacks it, and the rates are cached: that command then
    makes the page with the pictures and measures none of them again.
    """
    found = find_suite(suite)
    probes, base = make_probes(found.probes), plan.model
    model = load(str(built.root), variant=built.variant)
    request = Request(str(plan.out), suite=suite, seed=plan.context.seed)
    audited = Built(str(built.root), recipe=plan.recipe)
    facts, checks = [], []
    for concept in plan.concepts:
        scorer, selector = _judges(base, concept, plan.recipe.judges)
        twin = _twin(request, base, scorer, concept)
        subjects = _subjects(request, audited, model, base, twin, plan.context)
        bench = Bench(concept, subjects, scorer, selector, _settings(request, audited, found.images), plan.recipe)
        names = _Names(f"{plan.out.name}/{built.root.name}", base.name, twin)
        report = _examine(bench, probes, names, plan.recipe.gate, plan.context, pictured=False)
        facts.append(replace(report, suite=suite).facts())
        checks += [_as_check(gate, concept, several=len(plan.concepts) > 1) for gate in report.gates]
        for subject in subjects.values():
            subject.release()
    return facts, checks


def _as_check(gate: Gate, concept: Concept, several: bool) -> Check:
    """A gate as a check of a build. What was not measured has no value, and fails."""
    name = f"audit/{concept.name}/{gate.name}" if several else f"audit/{gate.name}"
    value = math.nan if gate.value is None else gate.value
    return Check(name, value, gate.limit, gate.outcome == "passed", gate.how)


# --- what is audited, and against what -------------------------------------------------------------------------------


def _concept_name(request: Request, audited: Built) -> str:
    """The name of the concept: the one asked for, else the only one of the build."""
    known = [str(concept["name"]) for concept in (audited.record or {}).get("concepts", [])]
    if request.concept:
        return request.concept
    if len(known) != 1:
        raise ErasecError(
            f"the build erases {len(known)} concepts: {', '.join(known)}" if known else "the concept is not known",
            why="an audit is about one concept" if known else f"{request.model} has no report of a build",
            fix="name it: --concept NAME",
        )
    return known[0]


def _concept(name: str, audited: Built, model: Model | None) -> Concept:
    """The concept of the build, else a bundled one, a file or a phrase."""
    for stored in (audited.record or {}).get("concepts", []):
        if stored["name"] == name:
            return Concept(**stored)
    return find(name, world_of(model) if model else "")


def _load_or_none(path: str, request: Request) -> Model | None:
    """The audited model; None for a folder of a runtime's files."""
    folder = Path(path).expanduser()
    graphs = any(folder.glob("*/*.onnx")) or any(folder.glob("*/openvino_model.xml"))
    if folder.is_dir() and (graphs or not (folder / "model_index.json").is_file()):
        return None
    return load(path, request.revision, request.variant, request.allow_pickle)


def _base(request: Request, audited: Built) -> tuple[Model | None, list[str]]:
    """The base: the one asked for, else that of the build, if it can be opened; and a note where it cannot."""
    if request.base:
        return load(request.base, allow_pickle=request.allow_pickle), []
    record = (audited.record or {}).get("model")
    if not isinstance(record, dict):
        return None, ["The base is not known: name it with --base. Probes that learn from its pictures were not run."]
    name, revision = str(record.get("name", "")), str(record.get("revision", "")) or None
    try:
        base = load(name, revision, allow_pickle=request.allow_pickle)
    except ErasecError as error:
        return None, [f"The base {name} could not be opened ({error.what}); name it with --base."]
    if base.digest != record.get("digest"):
        raise ErasecError(
            f"{name} is not the base of this build",
            why="its weights have another digest than the report names",
            fix="name the model before the edit: --base MODEL",
        )
    return base, []


def _judges(model: Model | None, concept: Concept, wanted: Sequence[str]) -> tuple[Judge, Judge | None]:
    """The judge that counts, and another one that selects. Raises ErasecError where no judge can see the concept."""
    if model is None:
        raise ErasecError("the judge of this folder is not known", fix="name the model before the edit: --base MODEL")
    selection = select(model, [concept], wanted)
    judges = selection.by_concept[concept.name]
    if not judges:
        kind = MissingTool if selection.remarks else ErasecError
        raise kind(
            f"no judge can see {concept.name}",
            why="; ".join(selection.remarks) or "its concept file has no [judge] table",
            fix="name a judge: --judge NAME[:key=value,...]",
        )
    second = registry.judge_for(model, tuning=True)
    return judges[0], second if second is not None else next(iter(judges[1:]), None)


def _twin(request: Request, base: Model | None, scorer: Judge, concept: Concept) -> str:
    """The name of a model that never saw the concept: the one asked for, else that of a reference world; "" if none."""
    if request.twin or base is None:
        return request.twin
    return twin_of(base.name, labels(scorer, concept))


def _subjects(
    request: Request, audited: Built, model: Model | None, base: Model | None, twin: str, context: Context
) -> dict[Role, Pictured]:
    if model is None and request.size:
        raise ErasecError(
            "--size is for models of torch", why="a folder of graphs has its own size", fix="leave out --size"
        )
    subjects: dict[Role, Pictured] = {
        "model": _subject("model", model, context) if model is not None else Runtime("model", Path(audited.path))
    }
    if base is not None:
        subjects["base"] = _subject("base", base, context)
    if twin:
        subjects["twin"] = _subject("twin", load(twin, allow_pickle=request.allow_pickle), context)
    if (origin := base or model) is not None and can_attack(origin):
        subjects["random"] = Untrained("random", origin, context)
    return subjects


def _subject(role: Role, model: Model, context: Context) -> Pictured:
    """A subject that every probe attacks; for families of which attacks know no more than pictures, one that paints."""
    return Subject(role, model, context) if can_attack(model) else Painted(role, model, context)


def _settings(request: Request, audited: Built, images: int) -> Settings:
    """The settings of sampling are those of the build's checks, so that its rates can be compared."""
    checks = audited.recipe.checks if audited.recipe else Limits()
    steps = request.steps or checks.steps
    return Settings(request.images or images, steps, checks.guidance, request.seed or 0, request.size)


def _described(subject: Pictured, name: str) -> dict[str, str]:
    family = subject.model.family.name if isinstance(subject, Subject | Painted) else ""
    return {"name": name, "family": family, "digest": subject.digest}


def _named(judge: Judge) -> dict[str, str]:
    return {"title": judge.title, "digest": judge.digest}


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """The limits of texts PROBE=SHARE, with a share from 0 to 1. Raises ErasecError for any other text."""
    limits = {}
    for text in texts:
        name, _, share = text.rpartition("=")
        try:
            limits[name.strip()] = float(share)
        except ValueError:
            limits[name.strip()] = -1.0
        if not name.strip() or not 0 <= limits[name.strip()] <= 1:
            raise ErasecError(
                f"--limit {text} is no limit",
                why="it is written PROBE=SHARE, with a share from 0 to 1",
                fix="such as --limit prompts=0.05",
            )
    return limits
