"""Runs builds of a matrix as processes of their own: some at a time on this machine, or on a Ray cluster.

Each build is the command ``erasec build RECIPE --out FOLDER``, so one that dies takes nothing with it. Where it was
killed (out of memory, a lost node, a dead worker), it is run again, and goes on where its training was. An end that a
second run would only repeat (a failed check, a bad input, a missing tool) is final.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

from erasec.checkpoint.disk import size
from erasec.errors import BAD_INPUT, ErasecError, MissingTool

ATTEMPTS = 3  # runs of a build that is killed each time
# The child ends with its parent, also where the parent is killed: a build that goes on alone would hold its folder.
CHILD = """
import ctypes, os, signal, sys
parent = int(sys.argv.pop(1))
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != parent:
    os._exit(1)
from erasec.cli.start import main
main()
"""


@dataclass(frozen=True)
class Task:
    """One build: its recipe file, its folder, what it needs (threads, bytes of memory, GPUs), and the working directory
    (``folder``), to which paths in its recipe are relative."""

    name: str
    model: str
    recipe: Path
    out: Path
    flags: tuple[str, ...] = ()
    threads: int = 1
    memory: int = 0
    gpus: int = 0
    folder: Path = Path()


@dataclass(frozen=True)
class End:
    """How a build ended: its exit code (negative where it was killed each time), what it wrote to stderr, its wall time
    in seconds, and how often it was run. ``where`` is the host."""

    name: str
    exit: int
    error: str
    seconds: float
    attempts: int
    where: str = ""


class Workers(Protocol):
    """Where builds run."""

    def run(self, tasks: Sequence[Task], started: Callable[[str], None]) -> Iterator[End]:
        """The ends of all tasks, as they come. ``started`` is called with the name of each that begins. The first task
        of each model ends before its others begin, so that what they share is computed once."""


def run_task(task: Task, environment: Mapping[str, str] | None = None) -> End:
    """Run one build to its end, again where it was killed."""
    start, code, error, attempts = time.monotonic(), 0, "", 0
    if not task.folder.is_dir():
        error = f"error: there is no folder {task.folder} on {socket.gethostname()}, to which paths are relative"
        return End(task.name, BAD_INPUT, error, 0.0, 1, socket.gethostname())
    while attempts < ATTEMPTS and (code < 0 or not attempts):
        attempts += 1
        words = ["build", str(task.recipe), "--out", str(task.out), *task.flags]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(os.getpid()), *words],
            env={**os.environ, **(environment or {})},
            cwd=task.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        code, error = done.returncode, done.stderr
    return End(task.name, code, error[-4000:], time.monotonic() - start, attempts, socket.gethostname())


@dataclass(frozen=True)
class Local:
    """``count`` builds at a time on this machine. ``gpus`` are entries of CUDA_VISIBLE_DEVICES: each build that needs a
    GPU sees one of them, and has it for itself where there are no more builds than GPUs."""

    count: int
    gpus: tuple[str, ...] = ()

    def run(self, tasks: Sequence[Task], started: Callable[[str], None]) -> Iterator[End]:
        free = deque(islice(cycle(self.gpus), self.count))

        def work(task: Task) -> End:
            started(task.name)
            device = free.popleft() if free and task.gpus else None
            try:
                return run_task(task, {} if device is None else {"CUDA_VISIBLE_DEVICES": device})
            finally:
                if device is not None:
                    free.append(device)

        with ThreadPoolExecutor(self.count) as pool:
            ends = schedule(
                tasks,
                lambda task: pool.submit(work, task),
                lambda futures: wait(futures, return_when=FIRST_COMPLETED).done,
                self.count,
            )
            for _, future in ends:
                yield future.result()


@dataclass(frozen=True)
class Ray:
    """Builds on a Ray cluster at ``address`` ("local" starts one here). Its nodes must have erasec, and see the folders
    of recipes, models and outputs at the same paths. Ray runs a task again whose worker or node has died."""

    address: str

    def run(self, tasks: Sequence[Task], started: Callable[[str], None]) -> Iterator[End]:
        try:
            import ray
        except ImportError as error:
            raise MissingTool("ray is not installed", fix='pip install "erasec[ray]"') from error

        address = None if self.address == "local" else self.address
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
        try:
            # Each build runs in a new worker process, which ends with it.
            remote = ray.remote(max_calls=1, max_retries=ATTEMPTS, retry_exceptions=False)(run_task)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            demands = {task.name: demand(task, nodes) for task in tasks}

            def start(task: Task) -> Any:
                started(task.name)
                return remote.options(name=task.name, **demands[task.name]).remote(task)

            for task, reference in schedule(tasks, start, lambda references: ray.wait(references)[0]):
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield End(task.name, -9, f"its workers died {ATTEMPTS + 1} times: {error}", 0.0, ATTEMPTS + 1)
        finally:
            ray.shutdown()


def demand(task: Task, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What ``task`` asks Ray for, of a cluster whose nodes have these resources. It runs with fewer cores than it has
    threads, where no node has more. Raises ErasecError where no node has its memory and its GPU: Ray would wait for one
    forever."""
    fitting = [node for node in nodes if node.get("memory", 0) >= task.memory and node.get("GPU", 0) >= task.gpus]
    if not fitting:
        offered = [node.get("memory", 0) for node in nodes if node.get("GPU", 0) >= task.gpus]
        gpu = " and a GPU" if task.gpus else ""
        largest = f"the largest node{' with a GPU' if task.gpus else ''} offers {size(max(offered, default=0))}"
        raise ErasecError(
            f"no node of the Ray cluster can run the build {task.name}",
            why=f"it needs {size(task.memory)} of memory{gpu}; {largest if offered else 'no node has a GPU'}",
            fix="add a larger node to the cluster, or state what a node has when it starts: ray start --memory, "
            "--num-gpus; or build smaller: memory in [build]",
        )
    needs: dict[str, float] = {
        "num_cpus": min(task.threads, max(int(node.get("CPU", 0)) for node in fitting)),
        "num_gpus": task.gpus,
    }
    return needs | ({"memory": task.memory} if task.memory else {})


def schedule(
    tasks: Sequence[Task],
    start: Callable[[Task], Any],
    wait_for_one: Callable[[list[Any]], Iterable[Any]],
    most: int = 0,
) -> Iterator[tuple[Task, Any]]:
    """Each task with what ``start`` returned for it, once ``wait_for_one`` returns that. ``most`` tasks run at a time,
    with 0 all that may. The first task of each model begins before all others, which wait until it has ended."""
    ready, blocked, running = deque[Task](), dict[str, list[Task]](), dict[Any, Task]()
    for task in tasks:
        if task.model in blocked:
            blocked[task.model].append(task)
        else:
            blocked[task.model] = []
            ready.append(task)
    while ready or running:
        while ready and (not most or len(running) < most):
            task = ready.popleft()
            running[start(task)] = task
        for handle in wait_for_one(list(running)):
            task = running.pop(handle)
            ready.extend(blocked.pop(task.model, ()))
            yield task, handle
