"""Networks from a checkpoint's tensors: older names, missing tensors, and edits that are merged in."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from erasec.checkpoint.safetensors import read_header, read_tensor, save_tensors
from erasec.errors import ErasecError
from erasec.ldm.tensor_names import OLD_VAE
from erasec.model import loading
from erasec.model.edit import Dense, Edit
from erasec.model.networks import fill, load_network
from erasec.model.view import Model

BIAS = "decoder.mid_block.attentions.0.to_q.bias"


def with_vae_keys(folder: Path, out: Path, rename: Callable[[str], str]) -> Model:
    """The model of a copy of ``folder`` with the VAE's tensors under other keys; one renamed to "" is left out."""
    shutil.copytree(folder, out)
    file = out / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {rename(key): read_tensor(entry) for key, entry in read_header(file)[0].items()}
    save_tensors(file, {key: tensor for key, tensor in tensors.items() if key})
    return loading.load(str(out))


def older(key: str) -> str:
    """The key in a VAE that an early version of diffusers saved."""
    for old, new in OLD_VAE.items():
        key = key.replace(f".{new}.", f".{old}.") if ".attentions." in key else key
    return key


def test_a_network_has_the_stored_tensors_in_float32_and_no_gradients(base: Model) -> None:
    vae = load_network(base, "vae", "AutoencoderKL")
    entries = base.entries("vae")
    assert vae.state_dict().keys() == entries.keys()
    for key, tensor in vae.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, read_tensor(entries[key]).float())
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_older_names_of_the_vae_load(base: Model, random_folder: Path, tmp_path: Path) -> None:
    copy = with_vae_keys(random_folder, tmp_path / "copy", older)
    assert older(BIAS) == "decoder.mid_block.attentions.0.query.bias"
    assert older(BIAS) in copy.entries("vae") and BIAS not in copy.entries("vae")
    present, loaded = (load_network(model, "vae", "AutoencoderKL").state_dict() for model in (base, copy))
    assert present.keys() == loaded.keys()
    assert all(torch.equal(present[key], loaded[key]) for key in present)


@pytest.mark.parametrize("rename", [lambda key: "" if key == BIAS else key, lambda key: key.replace(".to_q.", ".q.")])
def test_a_missing_tensor_is_an_error(random_folder: Path, tmp_path: Path, rename: Callable[[str], str]) -> None:
    model = with_vae_keys(random_folder, tmp_path / "copy", rename)
    with pytest.raises(ErasecError, match=f"vae has no tensor {re.escape(BIAS)}") as caught:
        load_network(model, "vae", "AutoencoderKL")
    assert caught.value.where == str(tmp_path / "copy")


def test_edits_are_merged(base: Model) -> None:
    site = base.select("cross", "v")[0]
    edited = base.with_edit(Edit({site: Dense(torch.full(site.shape, 0.125))}, "by hand", ("star",), ""))
    before, after = (
        load_network(model, base.family.denoiser, base.family.denoiser_class).state_dict() for model in (base, edited)
    )
    assert torch.equal(after[site.key], edited.merged_weight(site).float())
    assert [key for key in before if not torch.equal(before[key], after[key])] == [site.key]


def test_edited_tensors_may_have_older_names_and_further_tensors_are_ignored(tmp_path: Path) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attentions = torch.nn.ModuleList([torch.nn.ModuleDict({"to_q": torch.nn.Linear(2, 3)})])

    stored = {f"attentions.0.query.{part}": torch.zeros(shape) for part, shape in (("weight", (3, 2)), ("bias", (3,)))}
    save_tensors(tmp_path / "file", {**stored, "further": torch.ones(1)})
    edit: dict[str, Callable[[], Tensor]] = {"attentions.0.query.bias": lambda: torch.full((3,), 2.0)}
    with torch.device("meta"):
        network = Attention()
    fill(network, "vae", read_header(tmp_path / "file")[0], edit, tmp_path)
    assert torch.equal(network.state_dict()["attentions.0.to_q.weight"], torch.zeros(3, 2))
    assert torch.equal(network.state_dict()["attentions.0.to_q.bias"], torch.full((3,), 2.0))
