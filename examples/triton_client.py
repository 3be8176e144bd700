"""Pictures from a Triton server that serves what `erasec build MODEL --erase CONCEPT --target triton` wrote.

    pip install erasec "tritonclient[http]"
    python examples/triton_client.py OUT/triton/client --prompt "a photo of a red star" --out star.png

The folder client has no weights. Steps, seeds and pictures are those of `erasec run`; the server runs the networks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import np_to_triton_dtype

from erasec.runtime.backends import Function, Graphs
from erasec.runtime.bundle import Bundle, files, save


class Server(Graphs):
    """The components of a bundle, run by a server; the tokenizer is read from the folder ``root``."""

    def __init__(self, root: Path, url: str, timeout: float = 600.0) -> None:
        super().__init__(root, "ort", None)
        self.client = triton.InferenceServerClient(url, connection_timeout=timeout, network_timeout=timeout)

    def open(self, name: str) -> Function:
        return Function(lambda inputs: self.ask(name, inputs))

    def ask(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs of one model by name; the server has a vector of one number where the graph has a scalar."""
        given = []
        for key, value in inputs.items():
            array = np.atleast_1d(value)
            given.append(triton.InferInput(key, list(array.shape), np_to_triton_dtype(array.dtype)))
            given[-1].set_data_from_numpy(array)
        answer = self.client.infer(name, given)
        return {output["name"]: answer.as_numpy(output["name"]) for output in answer.get_response()["outputs"]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pictures from a Triton server.")
    parser.add_argument("folder", type=Path, help="the folder client beside the repository")
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    parser.add_argument("--negative")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    given = parser.parse_args(arguments)
    bundle = Bundle(given.folder, "triton", Server(given.folder, given.url))
    paths, seeds = files(given.out, given.count), range(given.seed, given.seed + given.count)
    save(bundle.generate([given.prompt] * given.count, seeds, given.steps, given.cfg, given.negative), paths)
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
