"""Mutated files of every format are refused in words, or read as the reference library reads them."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest
from robustness import mutations

from erasec.errors import ErasecError

CASES = 20_000


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, mutations.Reader]]:
    sample = tmp_path_factory.mktemp("sample")
    return sample, mutations.make_sample(sample, single=False)


def test_some_mutations_of_every_reader(readers: tuple[Path, dict[str, mutations.Reader]]) -> None:
    sample, all_readers = readers
    for name, reader in all_readers.items():
        records = [mutations.run_case(number, sample, {name: reader}) for number in range(1, 5)]
        assert not [record for record in records if record["outcome"] in mutations.BAD]


def test_what_is_not_mutated_is_accepted(readers: tuple[Path, dict[str, mutations.Reader]]) -> None:
    sample, all_readers = readers
    for name, reader in all_readers.items():
        if name != "broken":  # recovering changes it
            assert mutations.outcome(reader, sample / name.strip()) == {"outcome": "accepted"}, name


def test_each_bad_outcome_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(read: object, wrong: str = "") -> str:
        reader = mutations.Reader(("",), read, lambda root, result: wrong)  # type: ignore[arg-type]
        return mutations.outcome(reader, tmp_path)["outcome"]

    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(mutations, "LIMIT_S", 0.1)
    assert of(lambda root: None) == "accepted"
    assert of(lambda root: None, "other tensors") == "wrong"
    assert of(lambda root: fail(KeyError("a"))) == "traceback"
    assert of(lambda root: time.sleep(5)) == "hang"
    assert of(lambda root: fail(ErasecError("no"))) == "refused"
    assert of(lambda root: fail(ErasecError("Entry.__init__() missing 1 argument"))) == "words"
    assert mutations.judged("a\x1b[31m")["outcome"] == mutations.judged("x" * 3000)["outcome"] == "words"


@pytest.mark.slow
def test_twenty_thousand_mutations(tmp_path: Path) -> None:
    """The script of the same name does this in a file of its own, and can go on where it was stopped."""
    counts: Counter[str] = mutations.sweep(CASES, tmp_path / "mutations.jsonl")
    lines = (tmp_path / "mutations.jsonl").read_text().splitlines()
    assert sum(counts.values()) == CASES
    assert not [line for line in lines if json.loads(line)["outcome"] in mutations.BAD]
