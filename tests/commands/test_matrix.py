"""Many builds: what a matrix file holds, in which order builds run, what is repeated, and the page about them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from erasec.cli.app import app
from erasec.commands import matrix, workers
from erasec.commands.matrix_file import from_file
from erasec.commands.workers import End, Local, Task
from erasec.errors import CheckFailed, ErasecError
from erasec.reporting.matrix_page import first_pictures, write_page
from erasec.tensorrt import devices


def write(folder: Path, text: str) -> Path:
    (folder / "matrix.toml").write_text(text)
    return folder / "matrix.toml"


FILE = """
models = ["{model}", "glyphs"]
concepts = ["star", ["heart", "ring"]]
[build]
targets = ["ldm"]
[build.checks]
pictures = 0
steps = 5
[[variant]]
name = "soft"
[[variant.pass]]
name = "uce"
options = {{keep = 2.0}}
[[variant]]
name = "plain"
[variant.checks]
steps = 7
"""


def test_every_model_gets_every_concept_in_every_variant(tmp_path: Path, random_folder: Path) -> None:
    jobs = from_file(write(tmp_path, FILE.format(model=random_folder)))
    name = random_folder.name
    assert [job.name for job in jobs[:4]] == [
        f"{name}-without-star-soft",
        f"{name}-without-star-plain",
        f"{name}-without-heart-ring-soft",
        f"{name}-without-heart-ring-plain",
    ]
    assert len(jobs) == 8 and jobs[2].concepts == jobs[2].recipe.erase == ("heart", "ring")
    assert [job.recipe.checks.steps for job in jobs[:2]] == [5, 7]
    assert all(job.recipe.checks.pictures == 0 and job.recipe.targets == ("ldm",) for job in jobs)
    assert jobs[0].recipe.passes[0].options == {"keep": 2.0} and not jobs[1].recipe.passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('models = ["a"]\nconcepts = []', "concepts"),
        ('models = ["a"]\nconcepts = ["b"]\nout = "c"', "out"),
        ('models = ["a", "x/a"]\nconcepts = ["b"]', "two builds would have the folder a-without-b"),
        ('models = ["a"]\nconcepts = ["b"]\n[build]\nerase = ["c"]', "'erase' is not one of a variant"),
        ('models = ["a"]\nconcepts = ["b"]\n[build]\ntarget = ["c"]', "target"),
        ('models = ["a"]\nconcepts = ["b"]\n[[variant]]\nname = "../c"', "name"),
        ('models = ["a"]\nconcepts = ["b"]\n[build]\ntargets = ["own.py:Own"]', "Python code"),
        ('models = ["a"]\nconcepts = ["b"]\n[build]\ndevice = "cuda:1"', "cannot have the device 'cuda:1'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ErasecError) as caught:
        from_file(write(tmp_path, text))
    assert message in str(caught.value)


@dataclass
class Scripted:
    """Workers whose builds end as ``codes`` say."""

    codes: dict[str, int] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)

    def run(self, tasks: Sequence[Task], started: Callable[[str], None]) -> Iterator[End]:
        for task in tasks:
            started(task.name)
            self.ran.append(task.name)
            code = self.codes.get(task.name, 0)
            if code in (0, 3):
                folder = task.out / (".rejected" if code else "")
                folder.mkdir(parents=True, exist_ok=True)
                facts = {
                    "outcome": "rejected" if code else "passed",
                    "summary": {"name": {"before": 1.0, "after": 0.0}},
                }
                (folder / "report.json").write_text(json.dumps(facts))
            yield End(task.name, code, "error: broken\n  why: <b>never</b>\n", 1.5, 1)


@pytest.fixture
def groups(tmp_path: Path, random_folder: Path) -> list[matrix.Group]:
    text = f'models = ["{random_folder}"]\nconcepts = ["star", "heart", "ring"]\n[build.checks]\npictures = 0\n'
    return matrix.make_groups(from_file(write(tmp_path, text)), tmp_path / "out")


def test_the_first_build_of_each_group_is_planned(groups: list[matrix.Group], tmp_path: Path) -> None:
    (group,) = groups
    assert len(group.jobs) == 3 and group.memory > 0 and 0 < group.seconds[0] <= group.seconds[1] and not group.why
    assert not (tmp_path / "out").exists()
    assert matrix.at_once(groups, gpus=4) == 4


def test_what_was_rejected_is_not_repeated_and_all_others_are_started(
    groups: list[matrix.Group], tmp_path: Path
) -> None:
    """A build that ended well compares its inputs and its files itself."""
    first, second, third = (job.name for job in groups[0].jobs)
    out, scripted = tmp_path / "out", Scripted({second: 3, third: 2})
    with pytest.raises(CheckFailed, match="2 of 3 builds") as caught:
        matrix.run(groups, out, scripted)
    assert f"{third}: failed" in caught.value.why and (out / "matrix.html").is_file()
    again = Scripted({second: 3})
    with pytest.raises(CheckFailed, match="1 of 3"):
        matrix.run(groups, out, again)
    assert again.ran == [first, third]
    fresh = Scripted()
    assert [row.state for row in matrix.run(groups, out, fresh, fresh=True)] == ["passed"] * 3
    assert fresh.ran == [first, second, third]


def test_a_build_with_nothing_to_do_keeps_the_time_of_the_one_that_made_it(
    groups: list[matrix.Group], tmp_path: Path
) -> None:
    job = groups[0].jobs[0]
    folder = tmp_path / job.name
    (folder).mkdir()
    (tmp_path / matrix.WORK).mkdir()
    (folder / "report.json").write_text(json.dumps({"outcome": "passed"}))
    for seconds, expected in ((600.0, 600.0), (2.0, 600.0)):
        row = matrix._record(tmp_path, job, End(job.name, 0, "", seconds, 1, "host"), "")
        assert (row.state, row.seconds, row.where, row.folder) == ("passed", expected, "host", job.name)
    (folder / "report.json").write_text(json.dumps({"outcome": "passed", "notes": []}))
    assert matrix._record(tmp_path, job, End(job.name, 0, "", 700.0, 1), "").seconds == 700


def test_a_rejected_build_is_repeated_where_an_input_changed(tmp_path: Path, random_folder: Path) -> None:
    model, concept, out = tmp_path / "model", tmp_path / "own.toml", tmp_path / "out"
    shutil.copytree(random_folder, model)
    concept.write_text('name = "own"\nerase = ["star"]\n')
    file = write(tmp_path, f'models = ["{model}"]\nconcepts = ["{concept}"]\n[build.checks]\npictures = 0\n')

    def ran() -> bool:
        groups = matrix.make_groups(from_file(file), out)
        scripted = Scripted({groups[0].jobs[0].name: 3})
        with pytest.raises(CheckFailed, match="1 of 1"):
            matrix.run(groups, out, scripted, shown=False)
        return bool(scripted.ran)

    assert [ran(), ran()] == [True, False]
    concept.write_text('name = "own"\nerase = ["star", "stars"]\n')
    assert [ran(), ran()] == [True, False]
    (model / "unet" / "config.json").touch()
    assert [ran(), ran()] == [True, False]
    (out / "model-without-own" / ".rejected" / "report.json").write_text('{"outcome": "rejected"}')
    assert ran()


def test_a_release_that_was_rejected_is_on_the_page(tmp_path: Path, random_folder: Path) -> None:
    text = f'models = ["{random_folder}"]\nconcepts = ["star"]\n[build.publish]\n[build.checks]\npictures = 0\n'
    (job,) = from_file(write(tmp_path, text))
    folder = tmp_path / f"{job.name}.private" / ".rejected"
    folder.mkdir(parents=True)
    (tmp_path / matrix.WORK).mkdir()
    (folder / "report.json").write_text(json.dumps({"outcome": "rejected", "verdict": "no"}))
    (folder / "report.html").write_text("<p>none</p>")
    row = matrix._record(tmp_path, job, End(job.name, 3, "", 1.0, 1), "")
    write_page([row], tmp_path)
    (facts,) = json.loads((tmp_path / "matrix.json").read_text())["builds"]
    assert facts["verdict"] == "no" and facts["report"] == f"{job.name}.private/.rejected/report.html"


def test_the_page_shows_every_build(groups: list[matrix.Group], tmp_path: Path) -> None:
    _, second, third = (job.name for job in groups[0].jobs)
    out = tmp_path / "out"
    with pytest.raises(CheckFailed):
        matrix.run(groups, out, Scripted({second: -9, third: 2}))
    facts = json.loads((out / "matrix.json").read_text())
    assert facts["counts"] == {"passed": 1, "killed": 1, "failed": 1}
    assert [build["state"] for build in facts["builds"]] == ["passed", "killed", "failed"]
    page = (out / "matrix.html").read_text()
    assert "100&nbsp;%" in page or "100 %" in page or "100%" in page
    assert "&lt;b&gt;never&lt;/b&gt;" in page and "<b>never</b>" not in page


def test_the_first_pictures_of_a_report() -> None:
    before, after = "data:image/png;base64,AA", "data:image/png;base64,BB"
    pair = f'<img src="{before}" alt="before: a &lt;star&gt;"><img src="{after}" alt="after">'
    page = f'<img src="https://elsewhere/x.png" alt="">{pair}{pair}'
    assert first_pictures(page) == [(before, "before: a <star>"), (after, "after")]
    assert first_pictures("<p>none</p>") == []


# -- workers --


def task(name: str, model: str = "m", folder: Path = Path()) -> Task:
    return Task(name, model, folder / f"{name}.toml", folder / name)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_first_build_of_a_model_ends_before_its_others_begin(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    log: list[tuple[str, str]] = []
    alive, most = set[str](), [0]

    def run_task(task: Task, environment: Any) -> End:
        alive.add(task.name)
        most[0] = max(most[0], len(alive))
        log.append(("begin", task.name))
        time.sleep(0.02)
        alive.discard(task.name)
        log.append(("end", task.name))
        return End(task.name, 0, "", 0.02, 1)

    monkeypatch.setattr(workers, "run_task", run_task)
    tasks = [task(f"{model}{number}", model) for model in "ab" for number in range(4)]
    ends = list(Local(count).run(tasks, lambda _: None))
    assert sorted(end.name for end in ends) == sorted(each.name for each in tasks)
    for model in "ab":
        assert all(log.index(("begin", f"{model}{n}")) > log.index(("end", f"{model}0")) for n in (1, 2, 3))
    assert most[0] <= count


@pytest.mark.parametrize(("count", "sharing"), [(2, 1), (1, 1), (4, 2)])
def test_each_build_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, count: int, sharing: int) -> None:
    """Of those that the matrix may use; more builds than GPUs share them evenly."""
    used: list[str | None] = []
    alive: list[str | None] = []

    def run_task(task: Task, environment: dict[str, str]) -> End:
        device = environment.get("CUDA_VISIBLE_DEVICES")
        alive.append(device)
        assert device is None or alive.count(device) <= sharing
        time.sleep(0.02)
        alive.remove(device)
        used.append(device)
        return End(task.name, 0, "", 0.0, 1)

    monkeypatch.setattr(workers, "run_task", run_task)
    tasks = [replace(task(str(n), str(n)), gpus=1) for n in range(6)]
    list(Local(count, gpus=("2", "GPU-3")).run(tasks, lambda _: None))
    assert len(used) == 6 and set(used) <= {"2", "GPU-3"}
    used.clear()
    list(Local(count, gpus=("2",)).run([task("cpu")], lambda _: None))
    assert used == [None]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (None, ["0", "1", "2"]),
        ("2,1", ["2", "1"]),
        ("", []),
        ("-1", []),
        ("1,-1,2", ["1"]),
        ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]),
    ],
)
def test_the_gpus_that_may_be_used(monkeypatch: pytest.MonkeyPatch, listed: str | None, expected: list[str]) -> None:
    rows = [("NVIDIA L4", "8.9"), ("NVIDIA L4", "8.9"), ("NVIDIA H200", "9.0")]
    monkeypatch.setattr(devices, "query", lambda field: rows)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert devices.visible() == expected
    models = {None: 2, "2,1": 2, "": 0, "-1": 0, "1,-1,2": 1, "GPU-a, GPU-b": 2}
    assert len(devices.visible_models()) == models[listed]


def test_the_command_uses_the_gpus_that_it_may(
    tmp_path: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, tuple[str, ...]]] = []
    (group,) = matrix.make_groups(
        from_file(write(tmp_path, f'models = ["{random_folder}"]\nconcepts = ["star"]\n')), tmp_path / "out"
    )
    monkeypatch.setattr(matrix, "make_groups", lambda *_: [replace(group, device="cuda")])
    monkeypatch.setattr(workers, "Local", lambda *given: made.append(given))
    monkeypatch.setattr(matrix, "run", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    done = CliRunner().invoke(app, ["matrix", str(tmp_path / "matrix.toml"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert made == [(2, ("2", "3"))]


def child(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Replace what a build's process does."""
    monkeypatch.setattr(workers, "CHILD", "import os, signal, sys, time\nfrom pathlib import Path\n" + body)


def test_a_killed_build_is_run_again_and_a_failed_one_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count = (
        "runs = Path(sys.argv[3]).with_suffix('.runs')\n"
        "runs.write_text(runs.read_text() + 'x' if runs.exists() else 'x')\n"
    )
    child(monkeypatch, count + "if len(runs.read_text()) < 3: os.kill(os.getpid(), signal.SIGKILL)\n")
    end = workers.run_task(task("a", folder=tmp_path))
    assert (end.exit, end.attempts) == (0, 3)
    child(monkeypatch, count + "os.kill(os.getpid(), signal.SIGKILL)\n")
    end = workers.run_task(task("b", folder=tmp_path))
    assert (end.exit, end.attempts) == (-9, workers.ATTEMPTS)
    child(monkeypatch, count + "print('error: no', file=sys.stderr); sys.exit(3)\n")
    end = workers.run_task(task("c", folder=tmp_path))
    assert (end.exit, end.attempts, end.error) == (3, 1, "error: no\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children with their parents on Linux alone")
def test_a_build_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    sleeper = workers.CHILD.partition("from erasec")[0]
    sleeper += f"import time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import os, subprocess, sys\nsubprocess.run([sys.executable, '-c', {sleeper!r}, str(os.getpid())])"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        for _ in range(600):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.1)
        pid = int((tmp_path / "pid").read_text())
        parent.kill()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the build outlived its parent")


# -- the command --


def test_the_command_plans_builds_and_does_nothing_the_second_time(tmp_path: Path, random_folder: Path) -> None:
    text = f'models = ["{random_folder}"]\nconcepts = ["star", "heart"]\n[build.checks]\npictures = 0\n'
    file, out = write(tmp_path, text), tmp_path / "out"
    words = ["matrix", str(file), "--out", str(out), "--jobs", "1"]
    planned = CliRunner().invoke(app, [*words, "--plan"])
    assert planned.exit_code == 0 and "2 builds, 1 at a time" in planned.output and not out.exists()
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    name = f"{random_folder.name}-without-star"
    built = (out / name / "report.json").stat().st_mtime_ns
    assert {path.name for path in out.iterdir()} >= {name, "matrix.html", "matrix.json"}
    second = CliRunner().invoke(app, [*words, "--json"])
    assert second.exit_code == 0 and (out / name / "report.json").stat().st_mtime_ns == built
    assert json.loads((out / "matrix.json").read_text())["counts"] == {"not judged": 2}
    lost = out / name / "hf" / "unet" / "config.json"
    lost.unlink()
    assert CliRunner().invoke(app, words).exit_code == 0 and lost.is_file()
    other = out / f"{random_folder.name}-without-heart" / "report.json"
    assert other.stat().st_mtime_ns < (out / name / "report.json").stat().st_mtime_ns


def test_paths_are_relative_to_where_the_matrix_was_started(
    groups: list[matrix.Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of Ray has another working directory."""
    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    (tmp_path / "out" / matrix.WORK).mkdir(parents=True)
    made = matrix._task(tmp_path / "out", groups[0].jobs[0], groups[0], fresh=False)
    monkeypatch.chdir(tmp_path)
    child(monkeypatch, "print(os.getcwd(), file=sys.stderr)")
    assert workers.run_task(made).error.strip() == str(tmp_path / "start")
    (tmp_path / "start").rmdir()
    end = workers.run_task(made)
    assert end.exit == 2 and f"there is no folder {tmp_path / 'start'}" in end.error


GB = 10**9
NODES = [{"CPU": 4.0, "memory": 64.0 * GB}, {"CPU": 2.0, "memory": 16.0 * GB, "GPU": 1.0}]


def test_builds_ask_ray_for_what_a_node_has() -> None:
    small = replace(task("a"), threads=4, memory=8 * GB)
    assert workers.demand(small, NODES) == {"num_cpus": 4, "num_gpus": 0, "memory": 8 * GB}
    # The node with the GPU has two cores: a build that asked for four would wait forever.
    assert workers.demand(replace(small, gpus=1), NODES)["num_cpus"] == 2


@pytest.mark.parametrize(
    ("needs", "nodes", "why"),
    [
        ({"memory": 100 * GB}, NODES, "it needs 100 GB of memory; the largest node offers 64 GB"),
        (
            {"memory": 20 * GB, "gpus": 1},
            NODES,
            "it needs 20 GB of memory and a GPU; the largest node with a GPU offers 16 GB",
        ),
        ({"gpus": 1}, NODES[:1], "it needs 0 B of memory and a GPU; no node has a GPU"),
    ],
)
def test_a_build_that_no_node_can_run_is_an_error(needs: dict[str, int], nodes: Any, why: str) -> None:
    with pytest.raises(ErasecError, match="no node of the Ray cluster can run the build big") as caught:
        workers.demand(replace(task("big"), **needs), nodes)
    assert caught.value.why == why and caught.value.fix


def test_nothing_starts_where_a_build_could_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    ray = SimpleNamespace(
        init=lambda **_: None,
        shutdown=lambda: started.append("shutdown"),
        nodes=lambda: [{"Alive": True, "Resources": NODES[0]}, {"Alive": False, "Resources": NODES[1]}],
        remote=lambda **_: lambda function: SimpleNamespace(options=lambda **given: started.append(given["name"])),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ErasecError, match="the build gpu"):
        list(workers.Ray("auto").run([task("cpu"), replace(task("gpu"), gpus=1)], started.append))
    assert started == ["shutdown"]


@pytest.mark.network
def test_a_killed_ray_worker_costs_no_build(tmp_path: Path, random_folder: Path) -> None:
    """A real Ray with several workers, one of which is killed while it builds. Needs the extra "ray"."""
    ray = pytest.importorskip("ray")
    text = f'models = ["{random_folder}"]\nconcepts = ["star", "heart", "ring", "box"]\n[build.checks]\npictures = 0\n'
    groups = matrix.make_groups(from_file(write(tmp_path, text)), tmp_path / "out")
    killed: list[int] = []

    def kill() -> None:
        """Kill the parent of the first process that builds: the worker."""
        for _ in range(1200):
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    if f"{tmp_path}/out/.matrix".encode() in (process / "cmdline").read_bytes():
                        killed.append(int((process / "stat").read_text().rpartition(")")[2].split()[1]))
                        os.kill(killed[0], signal.SIGKILL)
                        return
            time.sleep(0.05)

    ray.init(num_cpus=12, include_dashboard=False, log_to_driver=False)
    killer = Thread(target=kill)
    killer.start()
    rows = matrix.run(groups, tmp_path / "out", workers.Ray("local"))
    killer.join()
    assert killed and [row.state for row in rows] == ["not judged"] * 4
    assert sorted(path.name for path in (tmp_path / "out").glob("*/hf")) == ["hf"] * 4
