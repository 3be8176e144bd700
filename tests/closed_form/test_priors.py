"""Priors: the Gram matrix of captions, what it keeps, and the files it is read from and written to."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from concepts import STAR

from erasec.base import Context
from erasec.checkpoint.safetensors import read_header, read_tensor, save_tensors
from erasec.checkpoint.sealed import DIGEST
from erasec.closed_form import priors, solver
from erasec.documents import read_captions
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe import concept, everyday
from erasec.recipe.goals import names_phrase


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "some.csv"
    lines = [f'{row},"a photo of a {word}, big"' for row, word in enumerate(("ring", "box", "heart", "arrow") * 20)]
    path.write_text("\n".join(["case_number,prompt", *lines]), encoding="utf-8")
    return path


def test_a_prior_is_the_mean_gram_of_all_states_of_its_captions(model: Model, captions: Path, tmp_path: Path) -> None:
    out = tmp_path / "some.prior.safetensors"
    assert priors.write(out, model, captions) == read_captions(captions)
    assert len(read_captions(captions)) == 80
    states = model.encode(read_captions(captions)).states.flatten(0, 1).double()
    rows = priors.read(str(out), model, "context")
    assert torch.allclose(solver.gram(rows), states.T @ states / len(states), atol=1e-9)
    assert len(rows) <= 128


def test_a_prior_keeps_the_states_of_its_captions(model: Model, captions: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "some.prior.safetensors")
    priors.write(Path(out), model, captions)
    bare = STAR.model_copy(update={"keep": ()})
    states = model.encode(["a photo of a heart, big"]).states[0].double()
    unit = torch.eye(128, dtype=torch.float64)

    def drift(step: Uce) -> float:
        matrix = unit + next(iter(step.solve(model, bare, Context()).deltas.values())).change(unit)
        return float((states @ matrix.T - states).norm() / states.norm())

    none, some, strong = drift(Uce()), drift(Uce(prior=out)), drift(Uce(prior=out, prior_weight=100.0))
    assert none > some > strong


def test_the_weight_of_a_prior_counts_once(model: Model, captions: Path, tmp_path: Path) -> None:
    """Published codes scale the cached captions and then scale again in the solve, so that a weight is its square."""
    out = str(tmp_path / "some.prior.safetensors")
    priors.write(Path(out), model, captions)
    crowd = model.encode(read_captions(captions)).states.flatten(0, 1).double()
    weight, unit = 0.1, torch.eye(128, dtype=torch.float64)
    edit = Uce(prior=out, prior_weight=weight, keep=2.0, ridge=0.3, relative=False).solve(model, STAR, Context())
    source, shift, keep = (edit.sums["star"][f"context.{part}"] for part in ("source", "shift", "keep"))

    def expected(scale: float) -> torch.Tensor:
        kept = 2.0 * (keep.T @ keep + scale * crowd.T @ crowd / len(crowd))
        return shift.T @ source @ torch.linalg.inv(source.T @ source + kept + 0.3 * unit)

    change = next(iter(edit.deltas.values())).change(unit)
    assert float((change - expected(weight)).norm() / change.norm()) < 1e-6
    assert float((change - expected(weight**2)).norm() / change.norm()) > 1e-3


def test_one_flipped_byte_of_a_prior_is_an_error(model: Model, captions: Path, tmp_path: Path) -> None:
    out = tmp_path / "some.prior.safetensors"
    priors.write(out, model, captions)
    data = bytearray(out.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    with pytest.raises(ErasecError, match="is damaged"):
        priors.read(str(out), model, "context")


def test_a_bad_prior_is_an_error(model: Model, captions: Path, tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="there is no prior"):
        Uce(prior=str(tmp_path / "no")).solve(model, STAR, Context())
    out = tmp_path / "glyphs.prior.safetensors"
    priors.write(out, loading.load("glyphs"), captions)
    with pytest.raises(ErasecError, match="other text encoders"):
        Uce(prior=str(out)).solve(model, STAR, Context())
    weights = str(model.source.weight_files("vae")[0])
    with pytest.raises(ErasecError, match="no prior"):
        Uce(prior=weights).solve(model, STAR, Context())
    for name, text, word in (("a.csv", "x,y\n1,2\n", "no column"), ("b.txt", "\n\n", "holds no captions")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ErasecError, match=word):
            read_captions(tmp_path / name)


def test_a_prior_overwrites_no_file_and_fails_before_it_encodes(
    model: Model, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(priors, "build", lambda model, texts, stream: torch.eye(2))
    before = captions.read_bytes()
    assert priors.write(tmp_path / "new", model, captions) == read_captions(captions)
    (tmp_path / "shut").mkdir()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "shut" and may(path, mode))
    monkeypatch.delattr(priors, "build")
    for out, words in (
        (captions, "exists"),
        (tmp_path / "new", "exists"),
        (tmp_path, "exists"),
        (tmp_path / "no" / "new", "no folder"),
        (tmp_path / "shut" / "new", "may not be written"),
    ):
        with pytest.raises(ErasecError, match=words):
            priors.write(out, model, captions)
    assert captions.read_bytes() == before
    assert not (tmp_path / "no").exists()


def test_captions_with_a_byte_order_mark_and_damaged_ones(tmp_path: Path) -> None:
    marked, plain = tmp_path / "marked.csv", tmp_path / "marked.txt"
    marked.write_text("caption\na dog\n", encoding="utf-8-sig")
    plain.write_text("a dog\n", encoding="utf-8-sig")
    assert read_captions(marked) == read_captions(plain) == ["a dog"]
    long = "a" * (csv.field_size_limit() + 1)
    (tmp_path / "long.csv").write_text(f"caption\n{long}\n")
    with pytest.raises(ErasecError, match="cannot be read") as caught:
        read_captions(tmp_path / "long.csv")
    assert "field larger" in caught.value.why


def test_a_damaged_prior_is_an_error(base: Model, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a star\na circle\n")
    priors.write(tmp_path / "good", base, tmp_path / "captions.txt")
    assert priors.read(str(tmp_path / "good"), base, "context").shape[1] == 128
    entries, metadata = read_header(tmp_path / "good")
    gram = read_tensor(entries["context"])
    del metadata["format"], metadata[DIGEST]
    no_encoders = {key: value for key, value in metadata.items() if key != "encoders"}
    for tensor, stated, words in (
        (gram.index_fill(0, torch.tensor([3]), float("nan")), metadata, "the tensor context of bad is not finite"),
        (gram[:5], metadata, "the prior bad is damaged"),
        (gram, no_encoders, "was built with other text encoders"),
    ):
        save_tensors(tmp_path / "bad", {"context": tensor}, stated)
        with pytest.raises(ErasecError, match=words):
            priors.read(str(tmp_path / "bad"), base, "context")


def test_everyday_captions_are_many_short_and_free_of_concepts() -> None:
    texts = everyday.captions()
    assert len(texts) >= 2000
    assert len(set(texts)) == len(texts)
    assert max(len(text.split()) for text in texts) <= 12
    assert "an apple" in texts and "a apple" not in texts
    for path in concept.library().values():
        if "<name>" not in path.read_text(encoding="utf-8"):
            item = concept.from_file(path)
            assert not [text for text in texts for phrase in item.erase if names_phrase(text, phrase)], path.name


def test_the_everyday_prior_needs_no_file(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everyday, "captions", lambda: ("a red ring", "a box"))
    out = tmp_path / "everyday.prior.safetensors"
    assert priors.write(out, model, Path(everyday.NAME)) == ["a red ring", "a box"]
    rows = priors.read(everyday.NAME, model, "context")
    assert torch.equal(rows, priors.read(str(out), model, "context"))
    with_prior, without = (Uce(prior=name).solve(model, STAR, Context()) for name in (everyday.NAME, ""))
    site = next(iter(with_prior.deltas))
    weight = model.stored_weight(site)
    assert not torch.equal(with_prior.deltas[site].change(weight), without.deltas[site].change(weight))


def test_the_everyday_prior_is_stored_for_the_same_text_encoders(
    model: Model, random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(everyday, "captions", lambda: ("a red ring", "a box"))
    built: list[str] = []
    build = priors.build

    def counted(*arguments: Any) -> torch.Tensor:
        built.append(arguments[2])
        return build(*arguments)

    monkeypatch.setattr(priors, "build", counted)
    first, second = (priors.read(everyday.NAME, model, "context") for _ in range(2))
    assert torch.equal(first, second) and built == ["context"]
    monkeypatch.setattr(everyday, "captions", lambda: ("a red ring",))
    assert not torch.equal(priors.read(everyday.NAME, model, "context"), first) and len(built) == 2
    copied = tmp_path / "copy"
    shutil.copytree(random_folder, copied)
    key = priors._everyday_key(loading.load(str(copied)), "context")
    assert key == priors._everyday_key(loading.load(str(random_folder)), "context")
    (copied / "tokenizer" / "special.json").write_text("{}")
    assert priors._everyday_key(loading.load(str(copied)), "context") != key


@pytest.mark.parametrize("name", ["code_digest", "versions"])
def test_the_stored_prior_is_that_of_this_code_and_these_libraries(
    model: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    key = priors._everyday_key(model, "context")
    monkeypatch.setattr(priors, name, lambda *_: "another")
    assert priors._everyday_key(model, "context") != key
