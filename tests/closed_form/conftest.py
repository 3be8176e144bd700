"""The model of tests of closed-form edits."""

from __future__ import annotations

import pytest

from erasec.model.view import Model


@pytest.fixture
def model(base: Model) -> Model:
    return base
