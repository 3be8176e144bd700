"""Output paths: a build replaces an earlier build and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from erasec.checkpoint.staging import output
from erasec.commands.plan import make_plan
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.recipe.recipe import Recipe, from_flags

EARLIER = {"schema": "erasec.report/1", "written": [{"path": "hf", "files": {"unet/x": {"sha256": ""}}}]}


def recipe(model: Path, **changed: Any) -> Recipe:
    return from_flags(str(model), erase=["star"], device="cpu").model_copy(update=changed)


class TestOutputFolder:
    """A build replaces its output folder, so it must not hold anything else."""

    @pytest.mark.parametrize("earlier", ["nothing", "empty", "report.json", ".rejected"])
    def test_an_empty_folder_and_an_earlier_build_are_replaced(
        self, here: Path, random_folder: Path, earlier: str
    ) -> None:
        out = here / "out"
        if earlier != "nothing":
            out.mkdir()
        if earlier == "report.json":
            (out / earlier).write_text(json.dumps(EARLIER))
            (out / "hf").mkdir()
            (out / "hf" / "unet").mkdir()
            (out / "hf" / "unet" / "x").write_text("")
            (out / "hf" / ".cache").write_text("of another program")
        if earlier == ".rejected":
            (out / earlier).mkdir()
            (out / earlier / "report.json").write_text(json.dumps(EARLIER))
        assert make_plan(recipe(random_folder), out, pin=False).out == out

    def test_a_folder_with_other_files_is_refused(self, here: Path, random_folder: Path) -> None:
        (here / "photos").mkdir()
        (here / "photos" / "me.jpg").write_text("")
        with pytest.raises(ErasecError, match="photos is not empty") as caught:
            make_plan(recipe(random_folder), Path("photos"))
        assert "me.jpg" in caught.value.why
        with pytest.raises(ErasecError, match=r"me\.jpg is a file"):
            make_plan(recipe(random_folder), Path("photos/me.jpg"))

    @pytest.mark.parametrize(
        ("report", "beside"),
        [({}, "hf"), ({"schema": "other"}, "hf"), (None, "thesis.tex"), (None, "hf/notes"), (None, ".rejected/notes")],
    )
    def test_a_folder_that_only_looks_like_a_build_is_refused(
        self, here: Path, random_folder: Path, report: dict[str, str] | None, beside: str
    ) -> None:
        out = here / "out"
        (out / beside).mkdir(parents=True)
        (out / beside / "mine").write_text("")
        (out / "report.json").write_text(json.dumps(EARLIER if report is None else report))
        with pytest.raises(ErasecError, match="out is not empty"):
            make_plan(recipe(random_folder), out, pin=False)
        assert (out / beside / "mine").is_file()

    @pytest.mark.parametrize("out", [".", "..", "/"])
    def test_a_folder_around_the_working_directory_is_refused(self, here: Path, random_folder: Path, out: str) -> None:
        with pytest.raises(ErasecError, match=r"holds the working directory|a disk is mounted at /"):
            make_plan(recipe(random_folder), Path(out))

    def test_a_link_is_followed_and_a_link_to_nothing_or_to_something_else_refused(
        self, here: Path, random_folder: Path
    ) -> None:
        link = here / "link"
        for target, words in (("nowhere", "is a link to nowhere"), ("link", "is a link to link"), ("other", "mine")):
            (here / "other").mkdir(exist_ok=True)
            (here / "other" / "mine").touch()
            link.symlink_to(target)
            with pytest.raises(ErasecError) as caught:
                make_plan(recipe(random_folder), link, pin=False)
            assert words in str(caught.value)
            link.unlink()
        (here / "empty").mkdir()
        link.symlink_to("empty")
        assert make_plan(recipe(random_folder), link, pin=False).out == link

    def test_an_output_that_another_command_writes_is_refused_before_anything_is_read(
        self, here: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was read"))
        with output(here / "out"), pytest.raises(ErasecError, match="another command is writing there"):
            make_plan(recipe(random_folder), here / "out")

    def test_a_folder_in_or_around_the_model_is_refused(self, here: Path, random_folder: Path) -> None:
        build = here / "build"
        shutil.copytree(random_folder, build / "hf")
        files = {
            path.relative_to(build / "hf").as_posix(): {"sha256": ""} for path in build.rglob("*") if path.is_file()
        }
        (build / "report.json").write_text(json.dumps({**EARLIER, "written": [{"path": "hf", "files": files}]}))
        for out in (build, build / "hf" / "new"):
            with pytest.raises(ErasecError, match="lie in each other"):
                make_plan(recipe(build / "hf"), out)
        assert make_plan(recipe(build / "hf"), here / "beside", pin=False).out == here / "beside"
