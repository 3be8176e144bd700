"""Images from a Triton server that serves what `erasec build MODEL --erase CONCEPT --target triton` wrote.

    pip install erasec "tritonclient[http]"
    python examples/triton_client.py OUT/triton/client --prompt "a photo of a red star" --out star.png

The server runs the networks; the folder `client` holds no weights. Steps, seeds and images are those of `erasec run`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import np_to_triton_dtype

from erasec.commands.run import picture_paths, save_pictures
from erasec.runtime.backends import Function, GraphComponents, OnnxRuntime
from erasec.runtime.bundle import Bundle


class Server(GraphComponents):
    """The components of a bundle, run by a server. The tokenizer is read from the folder ``root``."""

    def __init__(self, root: Path, url: str, timeout: float = 600.0) -> None:
        super().__init__(root, OnnxRuntime)
        self.client = triton.InferenceServerClient(url, connection_timeout=timeout, network_timeout=timeout)

    def open(self, name: str) -> Function:
        return Function(lambda inputs: self.infer(name, inputs))

    def infer(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs of one model by name. The server takes a vector of one number where the graph has a scalar."""
        tensors = []
        for key, value in inputs.items():
            array = np.atleast_1d(value)
            tensor = triton.InferInput(key, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        result = self.client.infer(name, tensors)
        return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Images from a Triton server.")
    parser.add_argument("folder", type=Path, help="the folder `client` beside the model repository")
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    parser.add_argument("--negative")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, help="guidance, by default the family's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    args = parser.parse_args(arguments)
    bundle = Bundle(args.folder, "triton", Server(args.folder, args.url))
    paths, seeds = picture_paths(args.out, args.count), range(args.seed, args.seed + args.count)
    save_pictures(bundle.generate([args.prompt] * args.count, seeds, args.steps, args.cfg, args.negative), paths)
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
