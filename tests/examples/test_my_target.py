"""examples/my_target.py, found by the registry and run by a build."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from erasec import registry
from erasec.base import Context, Target
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_tensor
from erasec.commands import build
from erasec.commands.plan import make_plan
from erasec.errors import ErasecError
from erasec.options import configure
from erasec.recipe.recipe import from_flags

COMPONENTS = ("text_encoder", "unet", "vae")


@pytest.fixture(scope="module")
def name(root: Path) -> str:
    """What a user types after --target."""
    return f"{root / 'examples' / 'my_target.py'}:Npz"


@pytest.fixture(scope="module")
def npz(name: str) -> Callable[..., Target]:
    kind = registry.load_target(name)
    assert issubclass(kind, Target)
    return kind


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def test_a_build_writes_the_merged_tensors(name: str, random_folder: Path, tmp_path: Path) -> None:
    plan = make_plan(from_flags(str(random_folder), ["star"], targets=[name]), tmp_path / "out")
    report = build.run(plan)
    assert {check.name: check.value for check in report.checks}["npz/tensors"] == 0
    merged, base = Folder(tmp_path / "out/hf"), Folder(random_folder)
    moved = 0
    for component in COMPONENTS:
        written = arrays(tmp_path / f"out/npz/{component}.npz")
        entries, originals = merged.entries(component), base.entries(component)
        assert written.keys() == entries.keys()
        for key, value in written.items():
            assert np.array_equal(value, read_tensor(entries[key]).float().numpy())
            moved += not np.array_equal(value, read_tensor(originals[key]).float().numpy())
    assert moved == len(plan.passes[0].sites(plan.model)) > 0


def test_in_half_precision_the_tensors_are_rounded(
    npz: Callable[..., Target], random_folder: Path, tmp_path: Path
) -> None:
    artifact = npz(precision="fp16").export(Folder(random_folder), tmp_path, Context())
    assert artifact.precision == "fp16"
    assert all(check.passed for check in artifact.checks)
    assert {value.dtype for value in arrays(tmp_path / "unet.npz").values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize("damage", ["another value", "an overflow"])
def test_its_check_fails_for_tensors_that_differ(
    npz: Callable[..., Target], random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """What is written is changed on the way to the file, for one tensor."""
    write, count = np.lib.format.write_array, []

    def write_damaged(file: object, array: np.ndarray) -> None:
        count.append(array)
        if len(count) == 3:
            array = array + (1 if damage == "another value" else np.inf)
        write(file, array)

    monkeypatch.setattr(np.lib.format, "write_array", write_damaged)
    artifact = npz(precision="fp16").export(Folder(random_folder), tmp_path, Context())
    (check,) = artifact.checks
    assert not check.passed
    assert check.value == 1
    assert f"the first is {COMPONENTS[0]} " in check.how


def test_the_same_checkpoint_gives_the_same_bytes(
    npz: Callable[..., Target], random_folder: Path, tmp_path: Path
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        npz().export(Folder(random_folder), tmp_path / folder, Context())
    names = [f"{component}.npz" for component in COMPONENTS]
    assert [(tmp_path / "a" / name).read_bytes() for name in names] == [
        (tmp_path / "b" / name).read_bytes() for name in names
    ]


def test_its_option_is_checked(npz: Callable[..., Target]) -> None:
    assert [field.name for field in dataclasses.fields(npz)] == ["precision"]  # type: ignore[arg-type]
    with pytest.raises(ErasecError, match="option precision is 'fp8'"):
        configure(npz, {"precision": "fp8"}, "npz")  # type: ignore[arg-type]


def test_the_whole_target_is_forty_lines(root: Path) -> None:
    assert len((root / "examples/my_target.py").read_text().splitlines()) <= 40
