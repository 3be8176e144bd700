"""CLIP as a judge: zero-shot classification (Radford et al., 2021) and CLIP score (Hessel et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from erasec.errors import ErasecError, reason
from erasec.judges.weights import Weights
from erasec.judging.pictures import PictureJudge, Remembered
from erasec.options import options

if TYPE_CHECKING:
    from erasec.base import Images
    from erasec.recipe.concept import Concept

DEFAULT = "openai/clip-vit-large-patch14"
REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"
BATCH = 16


@options
class Settings:
    """Options of ``--judge clip:...``. ``folder`` is a CLIPModel in transformers' layout, a folder or the id of a hub
    repository; "" is OpenAI's ViT-L/14. ``revision`` is one of the repository's. ``device`` is torch's name."""

    folder: str = ""
    revision: str = ""
    device: str = "cpu"


@options
class Row:
    """Options in a concept's [judge] table; what is left out is the concept's own. ``phrases`` (its names and
    synonyms) stand against ``against`` (its anchor and kept phrases), each in all ``templates``."""

    phrases: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()


class Clip(PictureJudge):
    """A picture shows a concept if the text that is nearest to it, of those for the concept and those against it, is
    one for the concept: the top-1 class of CLIP's zero-shot classification (Radford et al., 2021, section 3.1), with
    one class for each phrase. The embedding of a phrase is the mean over its templates (section 3.1.4).
    """

    name: ClassVar[str] = "clip"
    summary: ClassVar[str] = "any concept with phrases: zero-shot classification by CLIP, and CLIP score"
    settings: ClassVar[type] = Settings
    row: ClassVar[type] = Row

    @classmethod
    def look_for(cls, concept: Concept, row: Any) -> Row:
        if wrong := [template for template in row.templates if template.count("{}") != 1]:
            raise ErasecError(
                f"[judge] clip of {concept.name}: the template {wrong[0]!r} is no template",
                why="it needs one {} for the phrase",
            )
        phrases = row.phrases or concept.phrases
        own = {phrase.casefold() for phrase in phrases}
        against = row.against or tuple(dict.fromkeys(filter(None, (concept.anchor, *concept.keep))))
        against = tuple(phrase for phrase in against if phrase.casefold() not in own)
        if not against:
            raise ErasecError(
                f"the judge clip cannot see {concept.name}",
                why="it compares the concept with other phrases, and the concept has no anchor and keeps no phrase",
                fix="write a concept file with an anchor or keep: erasec list concepts   shows where examples are",
            )
        return Row(tuple(phrases), against, row.templates or concept.templates)

    @cached_property
    def _source(self) -> Weights:
        own = not self.options.folder or self.options.folder == DEFAULT
        revision = self.options.revision or (REVISION if own else "")
        return Weights(self.name, self.options.folder or DEFAULT, revision, "1.7 GB" if own else "")

    def missing(self) -> str:
        return "" if self._source.folder is not None else self._source.command

    def fetch(self) -> None:
        self._source.fetch()

    def check(self) -> None:
        kind = self._source.config().get("model_type")
        if kind != "clip":
            raise ErasecError(
                f"{self._source.where} is no CLIP",
                why=f"its config.json says model_type = {kind!r}, and the judge clip reads 'clip'",
                where=str(self._source.path),
                fix="give a folder that transformers' CLIPModel wrote",
            )

    @property
    def title(self) -> str:
        texts = {f"{len(row.phrases)} of {len(row.phrases) + len(row.against)}" for row in self.rows.values()}
        return f"clip {self._source.title}, zero-shot top-1 is one of the concept's {', '.join(sorted(texts))} phrases"

    @cached_property
    def weights(self) -> str:
        return self._source.digest

    @property
    def _network(self) -> _Network:
        return _network(self._source.path, self.options.device)

    def shows(self, images: Images, row: Row) -> NDArray[np.bool_]:
        cosines = self._network.images(images) @ self._network.classes(row).T
        seen: NDArray[np.bool_] = cosines.argmax(1) < len(row.phrases)
        return seen

    def embed(self, images: Images) -> NDArray[np.float64]:
        return self._network.images(images)

    def agreement(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Cosine similarities; a prompt of more tokens than CLIP reads is cut."""
        cosines: NDArray[np.float64] = (self._network.images(images) * self._network.texts(prompts)).sum(1)
        return cosines


class _Network:
    """A CLIPModel with its tokenizer and image processor. Embeddings have unit length."""

    def __init__(self, folder: Path, device: str) -> None:
        from safetensors import SafetensorError
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        try:
            # The image processor on PIL: without torchvision it is the only one, and with it, the results are the same.
            self._prepare = CLIPImageProcessorPil.from_pretrained(folder)
            self._tokens = CLIPTokenizer.from_pretrained(folder)
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
            raise ErasecError("the CLIP of the judge cannot be read", why=reason(error), where=str(folder)) from error
        self._model, self._device = model.eval().to(device), device
        self._embeddings = Remembered(self._embed_images, BATCH)
        self._classes: dict[Row, NDArray[np.float64]] = {}

    def _embed_images(self, images: Images) -> NDArray[np.float64]:
        import torch

        with torch.no_grad():
            pixels = self._prepare(list(images), return_tensors="pt")["pixel_values"].to(self._device)
            pooled = self._model.vision_model(pixel_values=pixels).pooler_output
            return _unit(self._model.visual_projection(pooled).double().cpu().numpy())

    def images(self, images: Images) -> NDArray[np.float64]:
        """Embeddings of images, (n, d)."""
        return np.stack(self._embeddings(images))

    def texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Embeddings of texts, (n, d)."""
        import torch

        length = self._model.config.text_config.max_position_embeddings
        parts = []
        with torch.no_grad():
            for start in range(0, len(texts), 4 * BATCH):
                inputs = self._tokens(
                    list(texts[start : start + 4 * BATCH]),
                    padding="max_length",
                    max_length=length,
                    truncation=True,
                    return_tensors="pt",
                ).to(self._device)
                pooled = self._model.text_model(**inputs).pooler_output
                parts.append(self._model.text_projection(pooled).double().cpu().numpy())
        return _unit(np.concatenate(parts))

    def classes(self, row: Row) -> NDArray[np.float64]:
        """The embeddings of the phrases for a concept, then of those against it: means over templates, (phrases, d)."""
        from erasec.recipe.concept import Concept

        if row not in self._classes:
            wording = Concept(name="clip", erase=row.phrases, templates=row.templates)
            phrases = (*row.phrases, *row.against)
            texts = self.texts([prompt.text for prompt in wording.prompts(phrases)])
            self._classes[row] = _unit(texts.reshape(len(phrases), len(row.templates), -1).mean(1))
        return self._classes[row]


@cache
def _network(folder: Path, device: str) -> _Network:
    return _Network(folder, device)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.maximum(lengths, 1e-12)
    return unit
