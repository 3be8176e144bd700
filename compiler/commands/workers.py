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
from pathlib import Path
from typing import Any, Protocol

from erasec.errors import MissingTool

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
    """One build: its recipe file, its folder, and what it needs: threads, bytes of memory, GPUs."""

    name: str
    model: str
    recipe: Path
    out: Path
    flags: tuple[str, ...] = ()
    threads: int = 1
    memory: int = 0
    gpus: int = 0


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
    while attempts < ATTEMPTS and (code < 0 or not attempts):
        attempts += 1
        words = ["build", str(task.recipe), "--out", str(task.out), *task.flags]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(os.getpid()), *words],
            env={**os.environ, **(environment or {})},
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
    """``count`` builds at a time on this machine. With ``gpus``, each gets one of them for itself."""

    count: int
    gpus: int = 0

    def run(self, tasks: Sequence[Task], started: Callable[[str], None]) -> Iterator[End]:
        free = list(range(self.gpus))

        def work(task: Task) -> End:
            started(task.name)
            device = free.pop() if free else None
            try:
                return run_task(task, {} if device is None else {"CUDA_VISIBLE_DEVICES": str(device)})
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
            # One process for each build: what a library leaves in a worker is none of the next one's.
            remote = ray.remote(max_calls=1, max_retries=ATTEMPTS, retry_exceptions=False)(run_task)
            most = max((int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]), default=1)

            def start(task: Task) -> Any:
                needs = {"num_cpus": min(task.threads, most), "num_gpus": task.gpus}
                if task.memory:
                    needs["memory"] = task.memory
                started(task.name)
                return remote.options(name=task.name, **needs).remote(task)

            for task, reference in schedule(tasks, start, lambda references: ray.wait(references)[0]):
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield End(task.name, -9, f"its workers died {ATTEMPTS + 1} times: {error}", 0.0, ATTEMPTS + 1)
        finally:
            ray.shutdown()


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
