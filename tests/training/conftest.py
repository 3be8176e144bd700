"""A denoiser for tests of training."""

from __future__ import annotations

import pytest

from erasec.base import Context
from erasec.model.view import Model
from erasec.training.denoiser import Denoiser


@pytest.fixture
def denoiser(base: Model) -> Denoiser:
    return Denoiser(base, Context())
