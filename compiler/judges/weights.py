"""The folder of a judge's weights in transformers' layout: given by the user, or in the hub's cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasec.checkpoint.safetensors import file_digest
from erasec.errors import ErasecError, MissingTool, reason
from erasec.model import hub

FILES = ("*.json", "*.txt", "*.safetensors")  # pickled weights are not read


@dataclass(frozen=True)
class Weights:
    """Where weights are: ``where`` is a folder or the id of a hub repository, ``revision`` a commit, branch or tag of
    the latter ("" is its main branch). ``judge`` is the name of the judge, and ``download`` the size of a fetch."""

    judge: str
    where: str
    revision: str = ""
    download: str = ""

    @property
    def folder(self) -> Path | None:
        """The folder with a config and weights; None if it is not on this machine."""
        path = Path(self.where).expanduser()
        if not path.is_dir():
            path = self._cached()
        return path if (path / "config.json").is_file() and any(path.glob("*.safetensors")) else None

    def _cached(self) -> Path:
        # The layout of the hub's cache, as its documentation has it. Its client takes half a second to import.
        from huggingface_hub import constants

        repository = Path(constants.HF_HUB_CACHE) / f"models--{self.where.replace('/', '--')}"
        ref = repository / "refs" / (self.revision or "main")
        return repository / "snapshots" / (ref.read_text().strip() if ref.is_file() else self.revision or "none")

    @property
    def title(self) -> str:
        """The name of the folder or repository, with the revision."""
        name = Path(self.where).expanduser().resolve().name if Path(self.where).expanduser().is_dir() else self.where
        return f"{name} at {self.revision[:8]}" if self.revision and name == self.where else name

    @property
    def command(self) -> str:
        """The command that fetches the weights."""
        revision = f" --revision {self.revision}" if self.revision else ""
        patterns = " ".join(f"--include '{pattern}'" for pattern in FILES)
        size = f" ({self.download})" if self.download else ""
        return f"hf download {self.where}{revision} {patterns}   or add --judge {self.judge}, which fetches them{size}"

    def fetch(self) -> None:
        """Fetch the weights into the hub's cache if they are not here. Raises MissingTool without a network, or if the
        hub does not have them."""
        if self.folder is not None:
            return
        error: Exception | None = None
        why = "there is no config.json with weights as *.safetensors"
        if not Path(self.where).expanduser().is_dir():
            why = "HF_HUB_OFFLINE forbids the network" if hub.offline() else why
            try:
                if not hub.offline():
                    hub.snapshot(self.where, self.revision or None, FILES, (), local=False)
            except Exception as caught:  # the hub client raises exceptions of three libraries
                error, why = caught, reason(caught)
        if self.folder is None:
            raise MissingTool(
                f"the weights of the judge {self.judge} are not in {self.where}",
                why=why,
                fix=f"give a folder in transformers' layout: --judge {self.judge}:folder=DIR",
            ) from error

    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises ErasecError if it is no JSON object."""
        path = self.path / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ErasecError(f"{path.name} cannot be read", why=reason(error), where=str(path)) from error
        if not isinstance(content, dict):
            raise ErasecError(f"{path.name} is no JSON object", where=str(path))
        return content

    @property
    def path(self) -> Path:
        """The folder, which is on this machine."""
        folder = self.folder
        if folder is None:
            raise MissingTool(f"the weights of the judge {self.judge} are gone", fix=self.command)
        return folder

    @property
    def digest(self) -> str:
        """sha256 over the names and contents of the files with weights and vocabularies."""
        return files_digest([path for pattern in FILES for path in sorted(self.path.glob(pattern))])


def files_digest(paths: Sequence[Path]) -> str:
    """sha256 over the names and contents of files."""
    content = "\n".join(f"{path.name} {file_digest(path)}" for path in paths)
    return hashlib.sha256(content.encode()).hexdigest()
