"""The tensors of a network that a pass trains, as a whole or by low-rank changes; the teacher is the same network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from erasec.errors import ErasecError
from erasec.ldm.tensor_names import canonical
from erasec.model.edit import Delta, Dense, LowRank

if TYPE_CHECKING:
    from erasec.family import Site


class _Factors(nn.Module):
    """The parametrization W + up @ down of a matrix W. ``enabled`` is False while the network acts as the teacher."""

    def __init__(self, shape: torch.Size, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(shape[0], rank))
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype) if self.enabled else weight


class Student:
    """The tensors of ``sites`` as trainable parameters, inside the networks that hold them.

    ``modules`` are the networks by component. With ``rank`` 0 each tensor is trained as a whole, in float32, and its
    original is kept for the teacher. With a ``rank`` above 0 only matrices are trained, by low-rank changes; other
    tensors are left out, and ``seed`` draws the first factors. Raises ErasecError where nothing is left to train, or a
    network lacks a tensor.
    """

    def __init__(self, modules: Mapping[str, nn.Module], sites: Sequence[Site], rank: int = 0, seed: int = 0) -> None:
        if rank:
            sites = [site for site in sites if len(site.shape) == 2]
        if not sites:
            raise ErasecError("there is nothing to train", why="the pass has no sites, or none of them is a matrix")
        self.sites, self.rank = tuple(sites), rank
        network_keys = {
            component: {canonical(component, key): key for key, _ in module.named_parameters()}
            for component, module in modules.items()
        }
        self._owners: dict[Site, tuple[nn.Module, str]] = {}
        self._originals: dict[Site, nn.Parameter] = {}
        self._factors: dict[Site, _Factors] = {}
        for number, site in enumerate(self.sites):
            module = modules[site.component]
            owner, name = _owner(module, canonical(site.component, site.key), network_keys[site.component])
            self._owners[site] = owner, name
            stored = getattr(owner, name)
            if rank:
                factors = _Factors(stored.shape, min(rank, *stored.shape), seed + number).to(stored.device)
                nn.utils.parametrize.register_parametrization(owner, name, factors)
                self._factors[site] = factors
            else:
                self._originals[site] = stored
                setattr(owner, name, nn.Parameter(stored.detach().float().clone()))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters for an optimizer, by name."""
        if self.rank:
            return {
                f"{site.component}/{site.key}/{part}": getattr(factors, part)
                for site, factors in self._factors.items()
                for part in ("up", "down")
            }
        return {f"{site.component}/{site.key}": getattr(*owner) for site, owner in self._owners.items()}

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside the block the networks have their original tensors, and no gradients are recorded."""
        with torch.no_grad():
            trained = {site: getattr(*owner) for site, owner in self._owners.items()} if not self.rank else {}
            self._replace(self._originals)
            for factors in self._factors.values():
                factors.enabled = False
            try:
                yield
            finally:
                self._replace(trained)
                for factors in self._factors.values():
                    factors.enabled = True

    def _replace(self, tensors: Mapping[Site, nn.Parameter]) -> None:
        # The parameter object is replaced and not its data, which the backward pass of a recorded graph still needs.
        for site, tensor in tensors.items():
            owner, name = self._owners[site]
            owner._parameters[name] = tensor

    def deltas(self) -> dict[Site, Delta]:
        """The change of every site: Dense with rank 0, LowRank otherwise."""
        if self.rank:
            return {
                site: LowRank(factors.up.detach().double().cpu(), factors.down.detach().double().cpu())
                for site, factors in self._factors.items()
            }
        return {site: Dense(self._change(site).cpu()) for site in self.sites}

    def _change(self, site: Site) -> Tensor:
        if self.rank:
            factors = self._factors[site]
            product: Tensor = factors.up @ factors.down
            return product.detach()
        trained: Tensor = getattr(*self._owners[site])
        return (trained - self._originals[site].float()).detach()

    @torch.no_grad()
    def drift(self) -> float:
        """Frobenius norm of the changes of all sites, relative to that of their original tensors."""
        change = sum(float(self._change(site).square().sum()) for site in self.sites)
        return float((change / max(self._squared_norm, 1e-30)) ** 0.5)

    @cached_property
    def _squared_norm(self) -> float:
        """The squared Frobenius norm of the original tensors of all sites."""
        originals = (
            [getattr(owner.parametrizations, name).original for owner, name in self._owners.values()]
            if self.rank
            else self._originals.values()
        )
        return sum(float(tensor.float().square().sum()) for tensor in originals)


def _owner(module: nn.Module, key: str, keys: Mapping[str, str]) -> tuple[nn.Module, str]:
    """The module that owns a tensor, and the name there. ``keys`` maps canonical names to the network's own."""
    if key not in keys:
        raise ErasecError(f"the network has no tensor {key}", why=f"it is a {type(module).__name__}")
    path, _, name = keys[key].rpartition(".")
    return module.get_submodule(path), name
