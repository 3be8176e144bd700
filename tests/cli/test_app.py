from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from erasec.checkpoint import journal
from erasec.checkpoint.safetensors import BLANK
from erasec.cli import app as cli
from erasec.cli import output as show
from erasec.commands import apply as applies
from erasec.commands import build as builds
from erasec.errors import CheckFailed, MissingTool
from erasec.keys import key_file as secret
from erasec.model import view as models
from erasec.model.edit import Secret
from erasec.recipe import concept

HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy", "huggingface_hub"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    for name in cli.QUIET:
        monkeypatch.setenv(name, "")  # so that what the program sets is taken back
        monkeypatch.delenv(name)
    return lambda *arguments: CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_command_line_loads_no_library_before_it_must() -> None:
    code = "import sys, erasec.cli.app; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "erasec.cli.app" in loaded
    assert not HEAVY & set(loaded)


def test_help_and_doctor_load_no_library_either() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from erasec.cli import app as cli\n"
        "for words in (['--help'], ['build', '--help'], ['list', 'concepts'], ['doctor']):\n"
        "    found = CliRunner().invoke(cli.app, words); assert found.exit_code == 0, found.output\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "erasec.commands.doctor" in loaded
    assert not HEAVY & set(loaded)


def test_a_build_from_flags_prints_where_and_whether(run: Any, random_folder: Path) -> None:
    found = run("build", random_folder, "--erase", "zebra", "--out", "out", "--device", "cpu", "--seed", 5)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[:2] == ["out", os.path.join("out", "report.html")]
    assert lines[2] == "passed its one check"
    assert all(Path(line).exists() for line in lines[:2])
    assert "note: no concept file is named 'zebra'" in found.stderr
    assert "seed = 5" in Path("out/recipe.toml").read_text()
    moved = run("diff", random_folder, "out")
    assert "14 tensors differ" in moved.stdout
    told = run("build", "out/recipe.toml", "--out", "again", "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout) == json.loads(Path("again/report.json").read_text())
    assert run("diff", "out", "again").stdout.splitlines()[-1] == "no tensor moved"


def test_a_plan_as_text_and_as_json(run: Any, random_folder: Path) -> None:
    arguments = ("plan", random_folder, "-e", "star", "-p", "uce:rows=last", "-t", "onnx")
    text = run(*arguments)
    assert text.exit_code == 0, text.output
    assert "rows=last" in text.stdout
    assert "down.0.attentions.0.0" in text.stdout
    assert not list(Path().iterdir())
    told = json.loads(run(*arguments, "--json").stdout)
    assert len(told["passes"][0]["sites"]) == 14
    assert [target["name"] for target in told["targets"]] == ["hf", "onnx"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bild"], "Did you mean 'build'?"),
        (["build", "glyphs", "--ersae", "star"], "--erase"),
        (["build"], "Missing argument"),
        (["build", "glyphs", "--seed", "many"], "integer"),
        (["build", "glyphs"], "nothing to erase"),
        (["build", "glyhps", "--erase", "star", "--device", "cpu"], "did you mean 'glyphs'?"),
        (["plan", "glyphs", "--erase", "star", "--pass", "ucee"], "did you mean 'uce'?"),
        (["plan", "glyphs", "--erase", "star", "--seed", "-1"], "seed is -1"),
        (["build", "no.toml"], "cannot be read"),
        (["build", "glyphs", "--key", "star.key"], "no key file star.key"),
        (["plan", "glyphs", "--erase", "star", "--absorb", "0.5"], "no key to absorb"),
        (["build", "glyphs", "--erase", "star", "--absorb", "-1"], "absorb is -1"),
        (["list", "passs"], "did you mean 'passes'?"),
        (["diff", "nothing", "here"], "there is no folder or file nothing"),
    ],
)
def test_bad_input_is_told_on_stderr_and_exits_with_2(run: Any, arguments: list[str], words: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 2, found.output
    assert words in " ".join(found.stderr.split())
    assert found.stdout == ""
    assert "Traceback" not in found.stderr


def test_verbose_adds_the_traceback(run: Any) -> None:
    found = run("build", "glyphs", "-v")
    assert found.exit_code == 2
    assert "Traceback" in found.stderr
    assert "error: nothing to erase" in found.stderr


class TestEndings:
    """How a build that does not succeed ends: exit code, words, and the signal handlers given back."""

    @pytest.fixture
    def ends(self, run: Any, random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        def ends(how: Any, *more: str) -> Any:
            monkeypatch.setattr(builds, "run", how)
            return run("build", random_folder, "--erase", "star", "--device", "cpu", "--out", "out", *more)

        return ends

    def test_a_failed_check_is_3_and_its_report_is_still_printed(self, ends: Any) -> None:
        def fails(plan: Any) -> None:
            rejected = plan.out / ".rejected"
            rejected.mkdir(parents=True)
            (rejected / "report.json").write_text('{"passed": false}')
            raise CheckFailed("1 of 2 checks failed", where=str(rejected))

        found = ends(fails, "--json")
        assert (found.exit_code, json.loads(found.stdout)) == (3, {"passed": False})
        assert "error: 1 of 2 checks failed" in found.stderr
        shutil.rmtree("out")
        assert ends(fails).stdout == ""

    def test_a_missing_tool_is_4(self, ends: Any) -> None:
        def fails(plan: Any) -> None:
            raise MissingTool("no tool", fix="pip install it")

        found = ends(fails)
        assert found.exit_code == 4
        assert "fix: pip install it" in found.stderr

    def test_anything_else_is_1(self, ends: Any) -> None:
        found = ends(lambda plan: 1 / 0)
        assert found.exit_code == 1
        assert isinstance(found.exception, ZeroDivisionError)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_is_130(self, ends: Any, number: signal.Signals) -> None:
        def stopped(plan: Any) -> None:
            os.kill(os.getpid(), number)
            time.sleep(10)

        before = signal.getsignal(number)
        found = ends(stopped)
        assert found.exit_code == 130
        assert found.stderr.splitlines()[-1] == "stopped; nothing was left behind"
        assert found.stdout == ""
        assert signal.getsignal(number) is before

    @pytest.mark.parametrize("more", [(), ("-v",)])
    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (OSError(28, "No space left on device", "out/x"), ["why: No space left on device", "in: out/x"]),
            (OSError(18, "Invalid link", "a", None, "b"), ["why: Invalid link", "in: a -> b"]),
            (TimeoutError(), ["why: TimeoutError"]),
            (OSError("no such tokenizer"), ["why: no such tokenizer"]),
        ],
    )
    def test_what_the_system_refuses_is_2_in_words(
        self, ends: Any, error: OSError, words: list[str], more: tuple[str, ...]
    ) -> None:
        def refused(plan: Any) -> None:
            raise error

        found = ends(refused, *more)
        assert found.exit_code == 2 and "error: " in found.stderr
        assert all(word in found.stderr for word in words)
        assert ("Traceback" in found.stderr) is bool(more)

    def test_a_reader_that_leaves_is_no_error(self, ends: Any) -> None:
        def left(plan: Any) -> None:
            raise BrokenPipeError(32, "Broken pipe")

        found = ends(left)
        assert found.exit_code == 1 and "error" not in found.stderr

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_an_edit_in_place_that_is_stopped_is_130_and_says_what_is_left(
        self, run: Any, random_folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
    ) -> None:
        shutil.copytree(random_folder, "copy")
        file = Path("copy/vae/diffusion_pytorch_model.safetensors")
        whole, old = journal._write_all, file.read_bytes()

        def write_all(files: list[int], heads: list[bytes]) -> None:
            whole(files, heads)
            if heads[0] == BLANK:
                os.kill(os.getpid(), number)

        def edit(*_: object) -> None:
            journal.patch_in_place(file, {"quant_conv.bias": lambda: torch.ones(8).half()})

        monkeypatch.setattr(applies, "apply", edit)
        with monkeypatch.context() as patched:
            patched.setattr(journal, "_write_all", write_all)
            found = run("apply", "any.edit.safetensors", "copy", "--in-place")
        assert found.exit_code == 130 and file.read_bytes()[:8] == BLANK
        assert "nothing was left behind" not in found.stderr and "fix: erasec recover " in found.stderr
        done = run("recover", "copy")
        assert done.exit_code == 0 and done.stdout.splitlines()[-1] == "1 files made whole"
        assert file.read_bytes() != old and file.read_bytes()[:8] == old[:8]
        assert run("recover", "cpoy").exit_code == 2


def test_the_verdict_weighs_rows_by_their_images() -> None:
    rows = [
        {"group": "name", "looked_for": "star", "images": 4, "before": 1.0, "after": 0.0},
        {"group": "keep", "looked_for": "ring", "images": 1, "before": 1.0, "after": 0.0},
        {"group": "keep", "looked_for": "heart", "images": 3, "before": 1.0, "after": 1.0},
    ]
    assert show.verdict(5, rows) == "passed all 5 checks; shown by name 100% -> 0%, everything else 100% -> 75%"
    assert show.verdict(5, []) == "passed all 5 checks"
    assert show.verdict(1, []) == "passed its one check"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("passes", ["uce", "arXiv:2308.14761", "rows=tail"]),
        ("targets", ["hf", "onnx", "ldm", "lora", "edit", "rank=0"]),
        ("concepts", ["star", "pentagram", "circle", "star.toml", "nudity", "safety", "celebrity"]),
        ("models", ["glyphs-never-star", "sd14", "CompVis/stable-diffusion-v1-4"]),
    ],
)
def test_lists(run: Any, what: str, words: list[str]) -> None:
    found = run("list", what)
    assert found.exit_code == 0
    for word in words:
        assert word in found.stdout


def test_an_edit_goes_from_build_to_file_to_model_and_back(run: Any, random_folder: Path) -> None:
    """Two builds, their edits combined and taken apart again, applied to a copy in place; every command once."""
    for phrase in ("zebra", "house"):
        asked = ("--erase", phrase, "--pass", "uce:rows=last", "--target", "edit:sums=true", "--out", phrase)
        assert run("build", random_folder, *asked).exit_code == 0
    zebra, house = Path("zebra/edit/zebra.edit.safetensors"), Path("house/edit/house.edit.safetensors")
    both = run("combine", zebra, house, "--out", "both.edit.safetensors")
    assert both.exit_code == 0, both.output
    assert both.stdout.splitlines() == ["both.edit.safetensors", "erases house, zebra"]
    back = run("combine", "both.edit.safetensors", "--without", "house", "--out", "again.edit.safetensors")
    assert back.stdout.splitlines()[1] == "erases zebra"
    done = run("apply", "again.edit.safetensors", random_folder, "--out", "applied")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1].startswith("changed 14 tensors, ")
    unet = Path("unet/diffusion_pytorch_model.safetensors")
    assert (Path("applied") / unet).read_bytes() == (Path("zebra/hf") / unet).read_bytes()
    shutil.copytree(random_folder, "copy")
    assert run("apply", zebra, "copy", "--in-place").exit_code == 0
    assert (Path("copy") / unet).read_bytes() == (Path("zebra/hf") / unet).read_bytes()
    assert run("recover", "copy").stdout == "nothing was left unfinished\n"
    again = run("apply", zebra, "copy", "--out", "twice")
    assert again.exit_code == 2 and "another model" in again.stderr and not Path("twice").exists()
    transferred = run("apply", zebra, "copy", "--out", "twice", "--transfer")
    assert transferred.exit_code == 0 and "not measured" in transferred.stderr


def test_a_key_opens_the_folder_that_it_was_made_with(run: Any, random_folder: Path) -> None:
    rows = torch.ones(2, 128)
    held = Secret("star", rows, rows, ("mid_block.attentions.0.transformer_blocks.0.attn2",))
    bound = models.load(str(random_folder)).component_digest("unet")
    secret.write(Path("star.key"), held, concept.find("star"), "kpop", "1", bound)
    told = json.loads(run("plan", random_folder, "--key", "star.key", "--json").stdout)
    assert told["keys"] == [{"path": "star.key", "concept": "star"}] and told["passes"] == []
    found = run("build", random_folder, "--key", "star.key", "--out", "opened")
    assert found.exit_code == 0, found.output
    assert "as secret as the key" in found.stderr
    assert Path("opened/bundle/erasec.safetensors").is_file() and not Path("opened/hf").exists()
    assert 'keys = [\n    "star.key",\n]' in Path("opened/recipe.toml").read_text()
    failed = run("build", random_folder, "--key", "star.key", "--absorb", "0.001", "--out", "stock")
    assert failed.exit_code == 3 and "absorbed/residual" in failed.stderr


def test_a_process_beside_the_main_one_solves_and_writes_and_says_nothing(
    run: Any, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []
    monkeypatch.setattr(builds, "is_main", lambda: False)
    monkeypatch.setattr(builds, "assist", solved.append)
    found = run("build", random_folder, "--erase", "zebra", "--out", "out", "--device", "cpu")
    assert (found.exit_code, found.stdout, found.stderr) == (0, "", "")
    assert [plan.out for plan in solved] == [Path("out")]
    assert not list(Path().iterdir())


def test_a_prior_is_built_and_used(run: Any, random_folder: Path) -> None:
    Path("captions.txt").write_text("a photo of a box\na ring\n")
    found = run("prior", random_folder, "captions.txt", "--out", "my.prior.safetensors")
    assert found.stdout.splitlines() == ["my.prior.safetensors", "2 captions"]
    asked = ("--erase", "star", "--pass", "trce.remap:prior=my.prior.safetensors", "--target", "lora:rank=2")
    built = run("build", random_folder, *asked, "--target", "ldm", "--out", "out")
    assert built.exit_code == 0, built.output
    report = json.loads(Path("out/report.json").read_text())
    assert report["applied"][0]["params"]["prior"] == "my.prior.safetensors"
    assert {"lora/loss", "ldm/layout"} <= {check["name"] for check in report["checks"]}
    assert Path("out/ldm/model.safetensors").is_file()
    assert (
        run("plan", "out/ldm/model.safetensors", "--erase", "star").exit_code == 2
    )  # glyphs' vocabulary is not CLIP's


def test_doctor_exits_with_4_only_where_erasec_cannot_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from erasec.commands import doctor

    found = run("doctor")
    assert found.exit_code == 0
    assert "torch" in found.stdout
    monkeypatch.setattr(doctor, "version", lambda package: None)
    found = run("doctor")
    assert found.exit_code == 4
    assert 'pip install "erasec[onnx]"' in found.stdout


def test_a_users_own_settings_win_over_the_quiet_ones(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    run("list", "models")
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["DIFFUSERS_VERBOSITY"] == "error"
