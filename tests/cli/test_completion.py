"""Completion by the protocols of the shells: what bash, zsh and fish send, and what they get."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from erasec import registry
from erasec.audit.suites import SUITES
from erasec.cli.output import LISTS
from erasec.family import HUB

# What a completion may need, in seconds of CPU: without torch it is about half of that, with it several times.
LIMIT = 1.0


def ask(environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "erasec"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout


def bash(line: str) -> list[str]:
    """What bash is given for a line: one word on each line."""
    words = line.split(" ")
    place = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return ask({**place, "_ERASEC_COMPLETE": "complete_bash"}).split()


def zsh(line: str) -> list[str]:
    """What zsh is given: code for its function _arguments, with the words in quotes."""
    code = ask({"_TYPER_COMPLETE_ARGS": line, "_ERASEC_COMPLETE": "complete_zsh"})
    assert not code.strip() or code.startswith(("_arguments '*: :((", "_files"))
    return [part.split('"')[1] for part in code.replace("_arguments '*: :((", "").splitlines() if '"' in part]


def fish(line: str) -> list[str]:
    """What fish is given: a word on each line, and after a tab its explanation."""
    place = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    return [row.split("\t")[0] for row in ask({**place, "_ERASEC_COMPLETE": "complete_fish"}).splitlines()]


# Lines, and what is among their completions.
LINES: dict[str, Iterable[str]] = {
    "erasec build ": ["glyphs", "emoji", *HUB],
    "erasec build glyphs --pass ": registry.PASSES,
    "erasec build glyphs --target ": registry.TARGETS,
    "erasec plan sd14 --judge ": registry.JUDGES,
    "erasec audit glyphs --probe ": registry.PROBES,
    "erasec audit glyphs --suite ": SUITES,
    "erasec build glyphs --erase st": ["star"],
    "erasec build sd14 --erase nu": ["nudity"],
    "erasec run out --backend ": ["auto", *registry.RUNTIMES],
    "erasec list ": LISTS,
    "erasec pu": ["push"],
    "erasec push out --with-u": ["--with-undoing"],
}


@pytest.mark.parametrize(
    ("shell", "line"),
    [*((bash, line) for line in LINES), *((shell, line) for shell in (zsh, fish) for line in [*LINES][:2])],
)
def test_values_are_completed(shell: Callable[[str], list[str]], line: str) -> None:
    completed = shell(line)
    assert set(LINES[line]) <= set(completed)
    # The control: what does not begin as the word does is not among them.
    assert all(name.startswith(line.rpartition(" ")[2]) for name in completed)


def test_the_words_of_a_reference_world_are_completed_for_its_models_alone() -> None:
    assert bash("erasec build emoji --erase straw") == ["strawberry"]
    assert bash("erasec build emoji --erase owl --erase straw") == ["strawberry"]
    assert bash("erasec build sd14 --erase straw") == []


def test_a_file_is_left_to_the_shell() -> None:
    assert bash("erasec build ./our/recipe") == [] and bash("erasec build glyphs --erase ./our") == []


def test_two_packages_with_one_name_do_not_break_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from erasec.cli import completion
    from erasec.errors import ErasecError

    def conflict(*_: object) -> dict[str, str]:
        raise ErasecError("two passes are named 'uce'", fix="uninstall one")

    monkeypatch.setattr(registry, "_registered", conflict)
    assert completion.passes() == list(registry.PASSES)


@pytest.mark.parametrize("line", ["erasec build ", "erasec build glyphs --pass u", "erasec build glyphs --erase s"])
def test_a_completion_is_fast_and_loads_nothing_that_computes(line: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert bash(line)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < LIMIT
    words = line.split(" ")
    code = (
        "import os, sys\n"
        f"os.environ |= {{'COMP_WORDS': {line!r}, 'COMP_CWORD': {str(len(words) - 1)!r}}}\n"
        "os.environ['_ERASEC_COMPLETE'] = 'complete_bash'\n"
        "from erasec.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('modules:', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.partition("modules:")[2].split()
    assert "erasec.cli.completion" in loaded
    assert not {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy", "huggingface_hub"} & set(loaded)


# Each script is read by its own shell, and completes a line as Tab does there.
SHELLS = {
    "bash": 'eval "$(erasec --show-completion bash)"; COMP_WORDS=(erasec build glyphs --pass tr); COMP_CWORD=4; '
    '_erasec_completion erasec; printf "%s\\n" "${COMPREPLY[@]}"',
    "zsh": 'autoload -Uz compinit; compinit -u -d $PWD/dump; eval "$(erasec --show-completion zsh)"; words=(erasec '
    'build glyphs --pass tr); CURRENT=5; _arguments() { print -r -- "$*" }; _erasec_completion',
    "fish": "erasec --show-completion fish | source; complete --do-complete 'erasec build glyphs --pass tr'",
}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_each_shell_completes_in_it(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "bin" / "erasec"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m erasec "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    # A script is printed for the shell that runs, unless one is named to typer's own test hook.
    environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    command = [shell, "-c", SHELLS[shell]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    for name in ("trce", "trce.remap", "trce.steer"):
        assert name in done.stdout, done.stderr
    assert "uce\n" not in done.stdout.replace("trce", "")
