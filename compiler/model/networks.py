"""Networks of diffusers and transformers in float32, from the configs and tensors of a checkpoint, edits merged in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.configs import described_by
from erasec.checkpoint.safetensors import read_tensor
from erasec.errors import ErasecError
from erasec.ldm.tensor_names import canonical
from erasec.progress import disable_library_bars

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from erasec.checkpoint.safetensors import Entry
    from erasec.model.view import Model


def load_network(model: Model, component: str, class_name: str) -> Any:
    """A component as diffusers' class ``class_name``, in float32, without gradients, with the model's edits merged in.

    Raises ErasecError where the checkpoint lacks a tensor of that class.
    """

    import diffusers
    import torch

    disable_library_bars()
    with described_by(component, model.source.root), torch.device("meta"):
        network = getattr(diffusers, class_name).from_config(dict(model.source.config(component)))
    changed = model.merged().get(component, {})
    fill(network, component, model.entries(component), changed, model.source.root)
    return network.eval().requires_grad_(False)


def fill(
    network: nn.Module,
    component: str,
    entries: Mapping[str, Entry],
    changed: Mapping[str, Callable[[], Tensor]],
    root: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Load tensors into a network that was built on the meta device, in float32 or ``dtype``.

    Each tensor is taken from ``changed``, the edited ones by key, else from the file ``entries``. Keys may be those of
    older library versions. Tensors that the network does not have are ignored. Raises ErasecError where the files lack
    a tensor; ``root``, the folder of the checkpoint, is named in the error.
    """
    import torch

    parameters = network.state_dict()
    wanted = {canonical(component, key): key for key in parameters}
    stored = {canonical(component, key): entry for key, entry in entries.items()}
    edited = {canonical(component, key): make for key, make in changed.items()}
    if missing := sorted(wanted.keys() - stored.keys()):
        raise ErasecError(
            f"{component} has no tensor {missing[0]}",
            why=f"{len(missing)} of {len(wanted)} tensors that its config requires are missing",
            where=str(root),
        )
    for name, key in wanted.items():
        if stored[name].shape != (shape := tuple(parameters[key].shape)):
            raise ErasecError(
                f"{component} and its config do not fit together",
                why=f"{name} is {stored[name].shape}, and with this config it is {shape}",
                where=str(root / component),
                fix="fetch the model again; one of the two files belongs to another model",
            )
    state = {
        key: (edited[name]() if name in edited else read_tensor(stored[name])).to(dtype or torch.float32)
        for name, key in wanted.items()
    }
    network.load_state_dict(state, assign=True)
