"""What decides a stored result besides the model: erasec's code, versions of libraries, and files by name."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from erasec.checkpoint import inputs


@pytest.mark.parametrize("text", ["", "~uwu", "cats,~50", "кот" * 50, "x" * 300, "a\0b", "not there"])
def test_what_is_no_path_names_no_file(text: str) -> None:
    assert inputs.named_files(text) == [] and inputs.file_digests([text, 3, True]) == {}


def test_files_and_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in ("sub/a", "sub/deep/b", "c"):
        (tmp_path / name).write_text(name)
    digests = inputs.file_digests([str(tmp_path / "sub"), str(tmp_path / "c"), str(tmp_path / "sub" / "a")])
    assert [Path(path).name for path in digests] == ["c", "a", "b"]
    (tmp_path / "sub" / "deep" / "b").write_text("other")
    again = inputs.file_digests([str(tmp_path / "sub")])
    assert {name for name in again if again[name] != digests[name]} == {str(tmp_path / "sub" / "deep" / "b")}


@pytest.mark.parametrize("name", ["model/view.py", "passes/uce.py", "targets/onnx.py", "families/a.toml", "t/page.j2"])
def test_a_change_of_any_of_its_own_files_changes_the_digest_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also in a checkout, where passes and targets are links."""
    for folder in ("passes", "targets"):
        (tmp_path / folder).mkdir()
        (tmp_path / "erasec").mkdir(exist_ok=True)
        (tmp_path / "erasec" / folder).symlink_to(tmp_path / folder)
    file = tmp_path / "erasec" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(inputs.resources, "files", lambda _: tmp_path / "erasec")
    digests = []
    for text in ("one", "two"):
        file.write_text(text)
        inputs.code_digest.cache_clear()
        digests.append(inputs.code_digest())
    inputs.code_digest.cache_clear()
    assert digests[0] != digests[1]


def test_requirements_are_those_of_users() -> None:
    names = inputs.requirements()
    assert {"torch", "numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "nudenet"} <= {*names}
    assert not {"pytest", "ruff", "mypy"} & {*names}
    assert inputs.versions(("torch", "no-such-package")) == {"torch": metadata.version("torch"), "no-such-package": ""}
