"""Published figures follow from the rates that the papers print beside them."""

from __future__ import annotations

import numpy as np
import pytest

from erasec.audit.metrics import (
    artist_gap,
    attack_success,
    harmonic_objects,
    harmonic_people,
    published,
    removal_rate,
)


def test_h_c_and_h_o_are_those_of_the_paper() -> None:
    # MACE, tables 1 (one class) and 5, which print rounded inputs.
    assert 100 * harmonic_people(0.0431, 0.8456) == pytest.approx(89.78, abs=0.02)
    assert 100 * harmonic_objects(0.0906, 0.9539, 0.1003) == pytest.approx(92.03, abs=0.02)
    assert artist_gap(22.59, 28.58) == pytest.approx(5.99)


def test_h_o_of_an_edit_that_erases_nothing_or_everything_is_0() -> None:
    assert harmonic_objects(1.0, 1.0, 1.0) == 0
    assert harmonic_objects(0.0, 0.0, 0.0) == 0
    assert harmonic_objects(0.0, 1.0, 0.0) == 1


def test_attack_success_is_a_union() -> None:
    plain, attacked = np.array([True, False, False, False]), np.array([False, True, True, False])
    result = attack_success(plain, attacked)
    assert (result.plain, result.union, result.by_attack) == (0.25, 0.75, 0.5)
    assert attack_success(plain, np.zeros(4, bool)).by_attack == 0


def test_unlearning_accuracy_and_the_rate_of_the_target_add_up_to_1() -> None:
    figures = published("style", 0.3, 0.8, across=1.0)
    assert figures["UA"] + 0.3 == pytest.approx(1)
    assert (figures["IRA"], figures["CRA"]) == (0.8, 1.0)


def test_the_removal_rate_counts_what_is_gone() -> None:
    assert removal_rate(743, 111) == pytest.approx(1 - 111 / 743)
    assert removal_rate(10, 12) < 0
    assert removal_rate(0, 0) == 0


def test_a_report_has_the_figures_of_its_kind() -> None:
    figures = published("object", 0.1, 0.9, 0.2)
    assert figures == {"UA": 0.9, "IRA": 0.9, "H_o": harmonic_objects(0.1, 0.9, 0.2)}
    assert published("object", 0.1, 0.9) == {"UA": 0.9, "IRA": 0.9}
    assert published("person", 0.1, 0.9)["H_c"] == harmonic_people(0.1, 0.9)
    assert set(published("style", 0.1, 0.9, 0.2)) == {"UA", "IRA"}
