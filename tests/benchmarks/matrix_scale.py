"""How long a thousand concepts on ten models take on 1 to 10,000 nodes: a simulation with measured costs.

    python tests/benchmarks/matrix_scale.py        writes tests/benchmarks/results/matrix_scale.json

The costs are those of rehearsal.json, a build at Stable Diffusion 1.4's size on two cores with two steps of training.
What later builds of a model take from the cache is left out of them: tracing its graphs (link_scale.json) and the half
of the pictures that the base paints. The order is that of ``erasec matrix`` itself, ``workers.schedule``; a node runs
one build at a time, and starting one costs ``START`` seconds.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
from pathlib import Path

from erasec.commands.workers import Task, schedule

RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "matrix_scale.json"
MODELS, CONCEPTS = 10, 1000
NODES = (1, 10, 100, 1000, 10000)
START = 5.0  # assumed: a process and its libraries


def costs() -> tuple[float, float]:
    """Seconds of the first build of a model, and of each later one."""
    phases = json.loads((RESULTS / "rehearsal.json").read_text())["phases"]
    first = sum(phase["seconds"] for phase in phases.values())
    links = json.loads((RESULTS / "link_scale.json").read_text())["rows"]
    saved = links["cold"]["seconds"] - links["warm"]["seconds"] + phases["pictures and judge"]["seconds"] / 2
    return START + first, START + first - saved


def simulate(nodes: int, first: float, later: float, models: int = MODELS, concepts: int = CONCEPTS) -> float:
    """Seconds until the last of ``models`` x ``concepts`` builds ends on ``nodes`` nodes."""
    tasks = [
        Task(f"{model}/{concept}", str(model), Path(), Path()) for model in range(models) for concept in range(concepts)
    ]
    now, begun, queue = 0.0, set[str](), list[tuple[float, int]]()
    numbers = itertools.count()

    def start(task: Task) -> int:
        number = next(numbers)
        heapq.heappush(queue, (now + (later if task.model in begun else first), number))
        begun.add(task.model)
        return number

    def wait_for_one(_: list[int]) -> list[int]:
        nonlocal now
        now, number = heapq.heappop(queue)
        return [number]

    for _ in schedule(tasks, start, wait_for_one, nodes):
        pass
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    first, later = costs()
    rows = {}
    alone = simulate(1, first, later)
    for nodes in NODES:
        seconds = simulate(nodes, first, later)
        rows[str(nodes)] = {"hours": seconds / 3600, "efficiency": alone / seconds / nodes}
    result = {"models": MODELS, "concepts": CONCEPTS, "first": first, "later": later, "rows": rows}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
