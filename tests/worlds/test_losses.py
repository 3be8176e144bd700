"""Losses of the trainer."""

from __future__ import annotations

import torch

from erasec.worlds.losses import spread_loss


def test_states_in_few_dimensions_cost_more_than_states_in_all() -> None:
    draw = torch.Generator().manual_seed(0)
    everywhere = torch.randn(256, 48, generator=draw)
    few = torch.randn(256, 4, generator=draw) @ torch.randn(4, 48, generator=draw)
    small = 0.1 * everywhere  # spread out, but hardly different from each other
    assert spread_loss(everywhere) < 0.3
    assert spread_loss(few) > 5 * spread_loss(everywhere)
    assert spread_loss(small) > spread_loss(everywhere) + 0.5
