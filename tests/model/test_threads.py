"""The same inputs give the same bytes, whatever number of threads torch has and however a path is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from concepts import STAR
from glyph_passes import tuned

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.threads import THREADS, fixed_threads
from erasec.model.view import Model
from erasec.passes.rece import Rece
from erasec.targets.edit_file import EditFile
from erasec.targets.lora import FILE, Lora


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ERASEC_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def written(model: Model, out: Path) -> list[bytes]:
    """The edit file and the LoRA of the model with star erased."""
    edited = model.with_edit(tuned(Rece).solve(model, STAR, Context()))
    for target in (EditFile(), Lora()):
        (out / target.name).mkdir(parents=True)
        target.export(edited, out / target.name, Context())
    return [next((out / "edit").iterdir()).read_bytes(), (out / "lora" / FILE).read_bytes()]


def test_edits_and_loras_do_not_depend_on_the_number_of_threads(random_folder: Path, tmp_path: Path) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(written(loading.load(str(random_folder)), tmp_path / str(threads)))
        assert torch.get_num_threads() == threads
    assert results[0] == results[1] == results[2]


def test_edits_do_not_depend_on_the_spelling_of_the_path(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(random_folder.parent)
    (tmp_path / "link").symlink_to(random_folder)
    names = (str(random_folder), f"./{random_folder.name}/", str(tmp_path / "link"))
    results = [written(loading.load(name), tmp_path / f"out-{number}") for number, name in enumerate(names)]
    assert results[0] == results[1] == results[2]
    assert str(random_folder.parent).encode() not in results[0][0]
    assert loading.load("glyphs").base_record()["model"] == "glyphs"  # which is the same for everyone


def test_the_number_of_threads_is_restored() -> None:
    torch.set_num_threads(2)
    with fixed_threads():
        assert torch.get_num_threads() == THREADS

    @fixed_threads(1)
    def fail() -> None:
        raise ZeroDivisionError(torch.get_num_threads())

    with pytest.raises(ZeroDivisionError, match="1"):
        fail()
    assert torch.get_num_threads() == 2


def test_a_variable_sets_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERASEC_THREADS", "3")
    with fixed_threads():
        assert torch.get_num_threads() == 3
    for wrong in ("0", "many", "-1", "²"):
        monkeypatch.setenv("ERASEC_THREADS", wrong)
        with pytest.raises(ErasecError, match="ERASEC_THREADS"), fixed_threads():
            pass
