"""Output paths: a build replaces an earlier build and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from erasec.commands.plan import make_plan
from erasec.errors import ErasecError
from erasec.recipe.recipe import Recipe, from_flags

EARLIER = {"schema": "erasec.report/1", "written": [{"path": "hf", "files": {"unet/x": {}}}]}


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
        with pytest.raises(ErasecError, match="holds the working directory"):
            make_plan(recipe(random_folder), Path(out))

    def test_a_folder_in_or_around_the_model_is_refused(self, here: Path, random_folder: Path) -> None:
        build = here / "build"
        shutil.copytree(random_folder, build / "hf")
        (build / "report.json").write_text(json.dumps(EARLIER))
        for out in (build, build / "hf" / "new"):
            with pytest.raises(ErasecError, match="lie in each other"):
                make_plan(recipe(build / "hf"), out)
        assert make_plan(recipe(build / "hf"), here / "beside", pin=False).out == here / "beside"
