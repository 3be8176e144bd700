"""Many builds: what a matrix file holds, in which order builds run, what is repeated, and the page about them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from erasec.cli.app import app
from erasec.commands import matrix, workers
from erasec.commands.matrix_file import from_file
from erasec.commands.workers import End, Local, Task
from erasec.errors import CheckFailed, ErasecError
from erasec.reporting.matrix_page import first_pictures


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


def test_what_ended_well_is_not_repeated_and_what_failed_is(groups: list[matrix.Group], tmp_path: Path) -> None:
    first, second, third = (job.name for job in groups[0].jobs)
    out, scripted = tmp_path / "out", Scripted({second: 3, third: 2})
    with pytest.raises(CheckFailed, match="2 of 3 builds") as caught:
        matrix.run(groups, out, scripted)
    assert f"{third}: failed" in caught.value.why and (out / "matrix.html").is_file()
    again = Scripted({second: 3})
    with pytest.raises(CheckFailed, match="1 of 3"):
        matrix.run(groups, out, again)
    assert again.ran == [third]  # a rejected build would be rejected again
    fresh = Scripted()
    assert [row.state for row in matrix.run(groups, out, fresh, fresh=True)] == ["passed"] * 3
    assert fresh.ran == [first, second, third]
    (out / first / "report.json").unlink()
    last = Scripted()
    matrix.run(groups, out, last)
    assert last.ran == [first]


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


def test_each_build_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    alive = set[str]()

    def run_task(task: Task, environment: dict[str, str]) -> End:
        device = environment["CUDA_VISIBLE_DEVICES"]
        assert device not in alive
        alive.add(device)
        time.sleep(0.02)
        alive.discard(device)
        used.append(device)
        return End(task.name, 0, "", 0.0, 1)

    monkeypatch.setattr(workers, "run_task", run_task)
    list(Local(2, gpus=2).run([task(str(n), str(n)) for n in range(6)], lambda _: None))
    assert len(used) == 6 and set(used) == {"0", "1"}


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
