from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich import markup
from sample_report import star_report
from typer.testing import CliRunner

from erasec import options
from erasec.base import Check
from erasec.checkpoint import journal
from erasec.checkpoint.safetensors import BLANK, save_tensors
from erasec.cli import output
from erasec.cli.app import QUIET, app
from erasec.commands import apply, build
from erasec.errors import CheckFailed, MissingTool
from erasec.keys.key_file import write_key
from erasec.model import loading
from erasec.model.memory import Secret
from erasec.recipe import concept
from erasec.reporting.facts import facts_of
from erasec.runtime import bundle
from erasec.training import processes

HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy", "huggingface_hub"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    for name in QUIET:
        monkeypatch.setenv(name, "")  # so that what the program sets is taken back
        monkeypatch.delenv(name)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_importing_the_command_line_loads_no_heavy_library() -> None:
    code = "import sys, erasec.cli.app; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "erasec.cli.app" in loaded
    assert not HEAVY & set(loaded)


def test_help_and_doctor_load_no_library_either() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from erasec.cli.app import app\n"
        "for words in (['--help'], ['build', '--help'], ['list', 'concepts'], ['doctor']):\n"
        "    result = CliRunner().invoke(app, words); assert result.exit_code == 0, result.output\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "erasec.commands.doctor" in loaded
    assert not HEAVY & set(loaded)


def test_no_word_of_a_help_text_is_markup() -> None:
    """Typer reads help texts as Rich's markup, so that a word in brackets would vanish."""
    group: Any = typer.main.get_command(app)
    texts = {name: command.help or "" for name, command in group.commands.items()}
    for name, command in group.commands.items():
        # Typer adds "[default: ...]" to some texts, and prints it itself.
        texts |= {f"{name} {option.name}": (option.help or "").partition("[default:")[0] for option in command.params}
    assert len(texts) > 100
    assert {name: text for name, text in texts.items() if markup.render(text).plain != text} == {}


def test_a_plan_loads_neither_torch_nor_diffusers(tmp_path: Path) -> None:
    """A plan reads headers and configs, and never a tensor, whatever the pass."""
    code = (
        "import sys; from typer.testing import CliRunner; from erasec.cli.app import app; from erasec import registry\n"
        "for name in registry.PASSES:\n"
        "    words = ['plan', 'glyphs', '--erase', 'star', '--pass', name, '--target', 'edit', '--target', 'onnx']\n"
        "    result = CliRunner().invoke(app, words); assert result.exit_code == 0, result.output\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert {"erasec.commands.plan", "erasec.passes.kpop", "erasec.targets.ort"} <= set(loaded)
    assert not {"torch", "diffusers", "transformers", "onnx", "onnxruntime"} & set(loaded)
    assert not any(tmp_path.iterdir())


def test_a_build_from_flags_prints_where_and_whether(run: Any, random_folder: Path) -> None:
    result = run("build", random_folder, "--erase", "zebra", "--out", "out", "--device", "cpu", "--seed", 5)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == ["out", os.path.join("out", "report.html")]
    assert lines[2].startswith("not judged: no judge can see zebra in these pictures; ")
    assert all(Path(line).exists() for line in lines[:2])
    assert "note: no concept file is named 'zebra'" in result.stderr
    assert "seed = 5" in Path("out/recipe.toml").read_text()
    moved = run("diff", random_folder, "out")
    assert "14 tensors differ" in moved.stdout
    rebuilt = run("build", "out/recipe.toml", "--out", "again", "--json")
    assert rebuilt.exit_code == 0, rebuilt.output
    assert json.loads(rebuilt.stdout) == json.loads(Path("again/report.json").read_text())
    assert run("diff", "out", "again").stdout.splitlines()[-1] == "no tensor differs"


def test_a_plan_names_kept_phrases_that_lie_near_to_erased_ones(run: Any) -> None:
    plain = run("plan", "glyphs", "-e", "star", "--json")
    near = run("plan", "glyphs", "-e", "star", "--apart", "--json")
    assert near.exit_code == 0, near.output
    pairs = json.loads(near.stdout)["apart"]
    assert {pair["erased"] for pair in pairs} >= {"star"} and all(0 < pair["angle"] < 120 for pair in pairs)
    assert "apart" not in json.loads(plain.stdout)
    text = run("plan", "glyphs", "-e", "star", "--apart").stdout
    assert f"{pairs[0]['erased']}" in text and f"{pairs[0]['angle']:.0f} degrees" in text
    Path("bare.toml").write_text('name = "bare"\nerase = ["star"]\n')
    assert "no phrase is kept" in run("plan", "glyphs", "-e", "bare.toml", "--apart").stdout
    assert "apart" not in run("plan", "glyphs", "-e", "star").stdout


def test_a_plan_as_text_and_as_json(run: Any, random_folder: Path) -> None:
    arguments = ("plan", random_folder, "-e", "star", "-p", "uce:rows=last", "-t", "onnx")
    text = run(*arguments)
    assert text.exit_code == 0, text.output
    assert "rows=last" in text.stdout
    assert " judge  no judge knows this model: pictures are not checked\n" in text.stdout
    assert "uce edits 14 tensors" in text.stdout
    rows = [line.split() for line in text.stdout.splitlines()]
    groups = rows[rows.index(["part", "attention", "projection", "tensors", "parameters"]) + 1 :]
    assert {tuple(row[:3]) for row in groups} == {
        (part, "cross", projection) for part in ("down", "mid", "up") for projection in "kv"
    }
    assert sum(int(row[3]) for row in groups) == 14
    assert "down.0.attentions.0.0" not in text.stdout
    every_site = run(*arguments, "--sites")
    assert every_site.exit_code == 0, every_site.output
    assert every_site.stdout.count(" cross ") == 14 and "down.0.attentions.0.0" in every_site.stdout
    assert not list(Path().iterdir())
    described = json.loads(run(*arguments, "--json").stdout)
    assert len(described["passes"][0]["sites"]) == 14
    assert [target["name"] for target in described["targets"]] == ["hf", "onnx"]


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
        (["plan", "glyphs", "--erase", "star", "--robust", "--pass", "uce"], "--robust and --pass are both given"),
        (["build", "no.toml"], "cannot be read"),
        (["build", "glyphs", "--key", "star.key"], "no key file star.key"),
        (["plan", "glyphs", "--erase", "star", "--absorb", "0.5"], "no key to absorb"),
        (["build", "glyphs", "--erase", "star", "--absorb", "-1"], "absorb is -1"),
        (["list", "passs"], "did you mean 'passes'?"),
        (["diff", "nothing", "here"], "there is no folder or file nothing"),
    ],
)
def test_bad_input_is_reported_on_stderr_and_exits_with_2(run: Any, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_robust_is_the_projector_and_then_the_training(run: Any) -> None:
    robust = run("plan", "glyphs", "--erase", "star", "--robust", "--json")
    assert robust.exit_code == 0, robust.output
    passes = [item["name"] for item in json.loads(robust.stdout)["passes"]]
    assert passes == ["project", "harden"]
    spelt = run("plan", "glyphs", "--erase", "star", "--pass", "project", "--pass", "harden", "--json")
    assert json.loads(spelt.stdout)["passes"] == json.loads(robust.stdout)["passes"]


@pytest.mark.parametrize("command", ["plan", "build"])
def test_code_that_a_recipe_names_runs_only_with_permission(run: Any, random_folder: Path, command: str) -> None:
    Path("evil.py").write_text("open('ran', 'w')")
    Path("recipe.toml").write_text(f'model = "{random_folder}"\nerase = ["star"]\n[[pass]]\nname = "evil.py:X"\n')
    refused = run(command, "recipe.toml")
    assert refused.exit_code == 2 and "--allow-code" in refused.stderr
    assert not Path("ran").exists()
    for words in (["recipe.toml", "--allow-code"], ["recipe.toml", "--pass", "evil.py:X"]):
        allowed = run(command, *words)
        assert "'X' is no Pass" in allowed.stderr
        Path("ran").unlink()


def test_names_from_files_do_not_control_the_terminal(run: Any) -> None:
    evil = {"\x1b[31ma\x07": torch.ones(2), "b": torch.zeros(2)}
    save_tensors(Path("a.safetensors"), evil)
    save_tensors(Path("b.safetensors"), {key: value + 1 for key, value in evil.items()})
    shown = run("diff", "a.safetensors", "b.safetensors")
    assert shown.exit_code == 0 and "\\x1b[31ma\\x07" in shown.stdout
    Path("c.toml").write_text('model = "glyphs"\n"\\u001b]0;x\\u0007" = 1\n')
    refused = run("plan", "c.toml", "-v")
    assert refused.exit_code == 2 and "Traceback" in refused.stderr
    for text in (shown.stdout, refused.stderr):
        assert not set(text) & set("\x1b\x07\r")


def test_verbose_adds_the_traceback(run: Any) -> None:
    result = run("build", "glyphs", "-v")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error: nothing to erase" in result.stderr


class TestEndings:
    """How a build that does not succeed ends: its exit code and message, with the signal handlers restored."""

    @pytest.fixture
    def ends(self, run: Any, random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        def ends(how: Any, *more: str) -> Any:
            monkeypatch.setattr(build, "run", lambda plan, fresh: how(plan))
            return run("build", random_folder, "--erase", "star", "--device", "cpu", "--out", "out", *more)

        return ends

    def test_a_failed_check_is_3_and_its_report_is_still_printed(self, ends: Any) -> None:
        def fails(plan: Any) -> None:
            rejected = plan.out / ".rejected"
            rejected.mkdir(parents=True)
            (rejected / "report.json").write_text('{"passed": false}')
            raise CheckFailed("1 of 2 checks failed", where=str(rejected))

        result = ends(fails, "--json")
        assert (result.exit_code, json.loads(result.stdout)) == (3, {"passed": False})
        assert "error: 1 of 2 checks failed" in result.stderr
        shutil.rmtree("out")
        assert ends(fails).stdout == ""

    def test_a_missing_tool_is_4(self, ends: Any) -> None:
        def fails(plan: Any) -> None:
            raise MissingTool("no tool", fix="pip install it")

        result = ends(fails)
        assert result.exit_code == 4
        assert "fix: pip install it" in result.stderr

    def test_anything_else_is_1(self, ends: Any) -> None:
        result = ends(lambda plan: 1 / 0)
        assert result.exit_code == 1
        assert isinstance(result.exception, ZeroDivisionError)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_is_130(self, ends: Any, number: signal.Signals) -> None:
        def stopped(plan: Any) -> None:
            os.kill(os.getpid(), number)
            time.sleep(10)

        before = signal.getsignal(number)
        result = ends(stopped)
        assert result.exit_code == 130
        assert result.stderr.splitlines()[-1] == "stopped; nothing was left behind"
        assert result.stdout == ""
        assert signal.getsignal(number) is before

    def test_a_second_signal_does_not_interrupt_the_clean_up(self, ends: Any) -> None:
        cleaned: list[str] = []

        def stopped(plan: Any) -> None:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
            finally:
                try:
                    raise OSError("clean-up has errors of its own")
                except OSError:
                    os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGHUP)
                cleaned.append("yes")

        result = ends(stopped)
        assert result.exit_code == 130 and cleaned == ["yes"]

    def test_a_signal_that_a_library_swallows_does_not_disarm_the_next(self, ends: Any) -> None:
        def stopped(plan: Any) -> None:
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

        assert ends(stopped).exit_code == 130

    def test_under_nohup_the_end_of_the_terminal_is_ignored(self, ends: Any) -> None:
        def goes_on(plan: Any) -> None:
            os.kill(os.getpid(), signal.SIGHUP)
            raise MissingTool("went on")

        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            assert "went on" in ends(goes_on).stderr
        finally:
            signal.signal(signal.SIGHUP, before)

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
    def test_an_error_of_the_system_is_a_message_and_exits_with_2(
        self, ends: Any, error: OSError, words: list[str], more: tuple[str, ...]
    ) -> None:
        def refused(plan: Any) -> None:
            raise error

        result = ends(refused, *more)
        assert result.exit_code == 2 and "error: " in result.stderr
        assert all(word in result.stderr for word in words)
        assert ("Traceback" in result.stderr) is bool(more)

    def test_a_closed_pipe_is_no_error(self, ends: Any) -> None:
        def left(plan: Any) -> None:
            raise BrokenPipeError(32, "Broken pipe")

        result = ends(left)
        assert result.exit_code == 1 and "error" not in result.stderr

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_an_interrupted_edit_in_place_exits_with_130_and_names_the_fix(
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
            journal.patch_in_place({file: {"quant_conv.bias": lambda: torch.ones(8).half()}})

        monkeypatch.setattr(apply, "apply", edit)
        with monkeypatch.context() as patched:
            patched.setattr(journal, "_write_all", write_all)
            result = run("apply", "any.edit.safetensors", "copy", "--in-place")
        assert result.exit_code == 130 and file.read_bytes()[:8] == BLANK
        assert "nothing was left behind" not in result.stderr and "fix: erasec recover " in result.stderr
        done = run("recover", "copy")
        assert done.exit_code == 0 and done.stdout.splitlines()[-1] == "1 files recovered"
        assert file.read_bytes() != old and file.read_bytes()[:8] == old[:8]
        assert run("recover", "cpoy").exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_libraries_load_prints_no_traceback(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import time; print('loading', flush=True); time.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    code = "from erasec.cli.start import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "loading\n"
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert (process.returncode, message) == (130, "stopped; nothing was left behind\n")


@pytest.mark.parametrize(
    "words", [["check", "out"], ["run", "out", "--prompt", "", "--out", "x.png"], ["diff", "out/hf", "x"]]
)
def test_every_command_first_cleans_up_what_killed_ones_left(run: Any, tmp_path: Path, words: list[str]) -> None:
    script = (
        "import os; from pathlib import Path; from erasec.checkpoint.staging import output\n"
        "with output(Path('out')) as own: os.rename('out', own.work / 'old'); own.new_folder(); os.kill(os.getpid(), 9)"
    )
    (tmp_path / "out").mkdir()
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.erasec" / "stage").exists()
    assert run(*words).exit_code == 2
    assert os.listdir(tmp_path) == ["out"]


def test_the_verdict_weighs_rows_by_their_images() -> None:
    rows = [
        {"group": "name", "looked_for": "star", "images": 4, "before": 1.0, "after": 0.0},
        {"group": "keep", "looked_for": "ring", "images": 1, "before": 1.0, "after": 0.0},
        {"group": "keep", "looked_for": "heart", "images": 3, "before": 1.0, "after": 1.0},
    ]
    report = star_report(rates=tuple(rows))
    assert (
        output.verdict(facts_of(report)) == "passed all 5 checks; shown by name 100% -> 0%, everything else 100% -> 75%"
    )
    one = replace(report, checks=report.checks[1:2], rates=tuple(rows[:1]))
    assert output.verdict(facts_of(one)) == "passed its one check; shown by name 100% -> 0%"


def test_the_verdict_of_a_build_that_nothing_could_see_does_not_say_passed() -> None:
    unseen = output.verdict(facts_of(star_report(judged=())))
    assert unseen.startswith("not judged: no judge can see star in these pictures; ") and "passed" not in unseen
    failed = star_report(checks=(Check("erased/name", 0.5, 0.1, False, ""),), judged=())
    assert output.verdict(facts_of(failed)).startswith("rejected: erased/name failed")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("passes", ["uce", "arXiv:2308.14761", "rows=tail"]),
        ("targets", ["hf", "onnx", "ldm", "lora", "edit", "rank=0"]),
        ("judges", ["judge", "glyphs", "classifier"]),
        ("runtimes", ["runtime", "ort", "openvino", "trt-rtx", "torch", "ONNX Runtime", "onnx"]),
        ("concepts", ["star", "pentagram", "circle", "star.toml", "nudity", "safety", "celebrity"]),
        ("models", ["glyphs-never-star", "sd14", "CompVis/stable-diffusion-v1-4"]),
    ],
)
def test_lists(run: Any, what: str, words: list[str]) -> None:
    result = run("list", what)
    assert result.exit_code == 0
    for word in words:
        assert word in result.stdout


def test_an_edit_goes_from_build_to_file_to_model_and_back(run: Any, random_folder: Path) -> None:
    """Two builds, their edits combined and separated again, and applied to a copy in place."""
    for phrase in ("zebra", "house"):
        flags = ("--erase", phrase, "--pass", "uce:rows=last", "--target", "edit:sums=true", "--out", phrase)
        assert run("build", random_folder, *flags).exit_code == 0
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
    assert run("recover", "copy").stdout == "no interrupted edit\n"
    again = run("apply", zebra, "copy", "--out", "twice")
    assert again.exit_code == 2 and "another model" in again.stderr and not Path("twice").exists()
    transferred = run("apply", zebra, "copy", "--out", "twice", "--transfer")
    assert transferred.exit_code == 0 and "not measured" in transferred.stderr


def test_a_key_opens_the_folder_that_it_was_made_with(run: Any, random_folder: Path) -> None:
    rows = torch.ones(2, 128)
    hidden = Secret("star", rows, rows, ("mid_block.attentions.0.transformer_blocks.0.attn2",))
    bound = loading.load(str(random_folder)).component_digest("unet")
    write_key(Path("star.key"), hidden, concept.find("star", "glyphs"), "kpop", "1", bound)
    described = json.loads(run("plan", random_folder, "--key", "star.key", "--json").stdout)
    assert described["keys"] == [{"path": "star.key", "concept": "star"}] and described["passes"] == []
    result = run("build", random_folder, "--key", "star.key", "--out", "opened")
    assert result.exit_code == 0, result.output
    assert "as secret as the key" in result.stderr
    assert Path("opened/bundle/erasec.safetensors").is_file() and not Path("opened/hf").exists()
    assert 'keys = [\n    "star.key",\n]' in Path("opened/recipe.toml").read_text()
    failed = run("build", random_folder, "--key", "star.key", "--absorb", "0.001", "--out", "stock")
    assert failed.exit_code == 3 and "absorbed/residual" in failed.stderr


def test_a_process_other_than_the_main_one_solves_but_writes_and_prints_nothing(
    run: Any, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []
    monkeypatch.setattr(processes, "is_main", lambda: False)
    monkeypatch.setattr(build, "train_in_worker", solved.append)
    result = run("build", random_folder, "--erase", "zebra", "--out", "out", "--device", "cpu")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert [plan.out for plan in solved] == [Path("out")]
    assert not list(Path().iterdir())


def test_a_prior_is_built_and_used(run: Any, random_folder: Path) -> None:
    Path("captions.txt").write_text("a photo of a box\na ring\n")
    result = run("prior", random_folder, "captions.txt", "--out", "my.prior.safetensors")
    assert result.stdout.splitlines() == ["my.prior.safetensors", "2 captions"]
    assert "cut" not in result.stderr
    flags = ("--erase", "star", "--pass", "trce.remap:prior=my.prior.safetensors", "--target", "lora:rank=2")
    built = run("build", random_folder, *flags, "--target", "ldm", "--out", "out")
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

    result = run("doctor")
    assert result.exit_code == 0
    assert "torch" in result.stdout
    monkeypatch.setattr(doctor, "version", lambda package: None)
    result = run("doctor")
    assert result.exit_code == 4
    assert 'pip install "erasec[onnx]"' in result.stdout


def test_a_users_own_settings_win_over_the_quiet_ones(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    run("list", "models")
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["DIFFUSERS_VERBOSITY"] == "error"


def test_cfg_still_sets_the_guidance_with_one_line_on_stderr(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guidances = []

    class Bundle:
        def text_read(self, text: str) -> dict[str, str]:
            return {"the text encoder": text}

        root = Path("any")

        def generate(self, prompts: list[str], seeds: range, steps: int, guidance: float | None, *more: object) -> Any:
            guidances.append(guidance)
            return np.zeros((len(prompts), 8, 8, 3), np.uint8)

        def close(self) -> None:
            pass

    monkeypatch.setattr(bundle, "open_bundle", lambda folder, backend: Bundle())
    options.say_renamed.cache_clear()
    arguments = ("run", "any", "--prompt", "a star", "--out", "star.png")
    old = run(*arguments, "--cfg", "3")
    assert (old.exit_code, old.stdout) == (0, "star.png\n"), old.output
    (line,) = old.stderr.splitlines()
    assert "--cfg is now called --guidance" in line
    new = run(*arguments, "--guidance", "3")
    assert (new.exit_code, new.stderr) == (0, ""), new.output
    assert run(*arguments).exit_code == 0
    assert guidances == [3.0, 3.0, None]  # None is the default of the model's family
    assert "--cfg" not in run("run", "--help").stdout
