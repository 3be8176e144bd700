"""Reads the prompt and caption files of a recipe while it is planned, and says how much of them a build will use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.errors import ErasecError, MissingTool
from erasec.judging import captions, prompt_files
from erasec.judging.captions import LEAST, CaptionFile
from erasec.judging.prompt_files import PromptFile

if TYPE_CHECKING:
    from erasec.base import Judge
    from erasec.recipe.recipe import Recipe

DEFAULT, NONE = "default", "none"  # values of --captions that are no files


@dataclass(frozen=True)
class QuestionFiles:
    """The prompt files of a build, and its caption file or None."""

    prompts: tuple[PromptFile, ...] = ()
    captions: CaptionFile | None = None

    @property
    def pictures(self) -> int:
        """The number of pictures that a build paints for them, before the edit and after it."""
        return 2 * (sum(len(file.rows) for file in self.prompts) + len(self.captions.captions if self.captions else ()))

    def described(self) -> list[dict[str, Any]]:
        """Each file for ``erasec plan``: its name, what it holds, how many rows it has and how many are used."""
        rows = [(file.name, "prompts", file.total, len(file.rows)) for file in self.prompts]
        if self.captions is not None:
            rows.append((self.captions.name, "captions", self.captions.total, len(self.captions.captions)))
        return [dict(zip(("name", "holds", "total", "used"), row, strict=True)) for row in rows]


def read_files(recipe: Recipe, judge: Judge | None, device: str) -> QuestionFiles:
    """The prompt files and the caption file of a recipe.

    The captions that come with erasec are used by default where a judge of everyday pictures looks at them and an
    accelerator paints them: a CPU would need hours. Raises ErasecError for a file that cannot be used, for prompt files
    in a build with a key, for two prompt files of one name, and for a limit that needs more captions; MissingTool where
    a limit needs LPIPS.
    """
    if recipe.prompts and recipe.keys:
        raise ErasecError(
            "a build with a key has no use for prompt files",
            why="they measure what is erased, and the key brings its concept back",
            fix="leave out --prompts, or build without --key",
        )
    if recipe.checks.lpips is not None:
        _require_lpips()
    files = tuple(
        prompt_files.load(Path(name).expanduser(), recipe.prompt_limit, recipe.seed) for name in recipe.prompts
    )
    names = [file.name for file in files]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ErasecError(
            f"two prompt files are called {twice[0]}", why="checks have the names of files", fix="rename one of them"
        )
    path: Path | None = None
    if recipe.captions not in ("", DEFAULT, NONE):
        path = Path(recipe.captions).expanduser()
    elif recipe.captions == DEFAULT or (not recipe.captions and judge and judge.everyday and device != "cpu"):
        path = captions.DEFAULT
    shown = captions.load(path, recipe.prompt_limit, recipe.seed) if path else None
    _check_distances(recipe, len(shown.captions) if shown else 0)
    return QuestionFiles(files, shown)


def remarks(files: QuestionFiles, seed: int) -> Iterator[str]:
    """A sentence for each file of which only a sample is used."""
    for row in files.described():
        if row["used"] < row["total"]:
            yield (
                f"{row['name']}: {row['used']} of {row['total']} {row['holds']} are used, chosen at random by the seed "
                f"{seed}; --prompt-limit sets their number."
            )


def _check_distances(recipe: Recipe, count: int) -> None:
    """Raise ErasecError where the limits cmmd and kid have fewer captions than they need."""
    limited = [name for name in ("cmmd", "kid") if getattr(recipe.checks, name) is not None]
    if limited and count < LEAST:
        raise ErasecError(
            f"the limit {limited[0]} needs at least {LEAST} captions",
            why=f"it compares the pictures of captions, and {count} are used",
            fix="give captions: --captions FILE, or --captions default; and raise --prompt-limit if it is below that",
        )


def _require_lpips() -> None:
    from erasec.judging import perceptual

    if why := perceptual.unavailable():
        raise MissingTool("the limit lpips cannot be checked", why=why, fix="install it, or leave out the limit")
