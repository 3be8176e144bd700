"""Open a checkpoint by name: bundled, alias, diffusers folder, single file or hub id."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

from erasec.checkpoint import pickles
from erasec.checkpoint.disk import named_errors
from erasec.checkpoint.folder import EXTRAS_FILE, Folder, check_links
from erasec.checkpoint.owned import process_scratch
from erasec.checkpoint.quantised import GGUF, quantised, refuse_gguf
from erasec.checkpoint.staging import settle
from erasec.checkpoint.tokenizer_files import SAVED, SENTENCEPIECE, VOCABULARY, read_tokenizer
from erasec.errors import ErasecError, reason, suggestion
from erasec.family import FAMILIES, HUB, Family, detect
from erasec.model import hub
from erasec.model.view import Model
from erasec.recipe.presets import FILE as PRESETS_FILE

# Suffixes of files with pickled weights.
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
# The models that are part of the package, each with the reference world that it belongs to.
BUNDLED = {"glyphs": "glyphs", "glyphs-never-star": "glyphs", "emoji": "emoji", "emoji-never-owl-noto": "emoji"}
# What copies of a bundled model must say of the pictures that it was trained on.
NOTICE = "NOTICE.md"
# By world, a model that was trained like the world's own without some labels, and these labels.
TWINS = {
    "glyphs": ("glyphs-never-star", frozenset(("star",))),
    "emoji": ("emoji-never-owl-noto", frozenset(("owl", "Noto"))),
}
# The classes of tokenizers that erasec reads. The folder of a tokenizer must have one of the files of its class.
TOKENIZERS = {
    "CLIPTokenizer": (VOCABULARY, SAVED),
    "T5Tokenizer": (SENTENCEPIECE, SAVED),
}


def world_weights(world: str) -> Path:
    """The folder of everything that is bundled with a reference world: its models, judges and figures."""
    return Path(str(resources.files("erasec"))) / world / "weights"


def twin_of(name: str, labels: Collection[str]) -> str:
    """The bundled model that never saw what ``labels`` say, of the world of the bundled model ``name``; "" if none."""
    twin, left_out = TWINS.get(BUNDLED.get(name, ""), ("", frozenset()))
    return twin if twin and labels and left_out.issuperset(labels) and is_bundled(twin) else ""


def is_bundled(name: str) -> bool:
    """Whether the weights of a model in ``BUNDLED`` are in this installation."""
    return (world_weights(BUNDLED[name]) / name).is_dir()


def bundled_folder(name: str) -> Path:
    """The folder of a model in ``BUNDLED``."""
    return world_folder(world_weights(BUNDLED[name]), BUNDLED[name], name)


@cache
def world_folder(weights: Path, world: str, name: str) -> Path:
    """The folder of a model of a world, among the ``weights`` of that world.

    The twin of a world's model has a UNet of its own. The rest is stored once, with the model, so the twin's folder is
    put together in the temporary folder of this process.
    """
    if name == world:
        return weights / name
    folder = Path(tempfile.mkdtemp(dir=process_scratch())) / name
    with named_errors(folder):
        shutil.copytree(weights / world, folder, ignore=shutil.ignore_patterns("unet"))
        shutil.copytree(weights / name, folder, dirs_exist_ok=True)
    return folder


def load(name: str, revision: str | None = None, variant: str = "", allow_pickle: bool = False) -> Model:
    """Open a model by bundled name, alias, diffusers folder, single file or hub id.

    ``revision`` is a hub commit, tag or branch; a tag or branch is resolved to its commit. ``variant`` chooses one of a
    folder's precisions, such as "fp16". Pickled weights are read only with ``allow_pickle``, and then nothing except
    tensors. Raises ErasecError where the model cannot be opened.
    """
    path = Path(name).expanduser()
    settle(path)
    if revision and (name in BUNDLED or path.exists()):
        raise ErasecError(
            f"{name} has no revision {revision!r}",
            why="only models on the hub have revisions",
            fix="leave out --revision, or give the hub id",
        )
    if variant and (name in BUNDLED or path.is_file()):
        raise ErasecError(
            f"{name} has no variant {variant!r}",
            why="only diffusers folders have variants",
            fix="leave out --variant",
        )
    if name in BUNDLED:
        return _load_folder(bundled_folder(name), name, "")
    if path.is_dir():
        return replace(_load_folder(path, name, "", variant, allow_pickle), local=True)
    if path.is_file():
        return replace(_load_single_file(path, name, allow_pickle), local=True)
    if name.endswith((".safetensors", *PICKLES)):
        raise ErasecError(f"there is no file {name}")
    if name not in HUB and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ErasecError(
            f"there is no model {name!r}",
            why=suggestion(name, (*BUNDLED, *HUB)),
            fix="give a bundled name, an alias, a diffusers folder that exists, a .safetensors file, or a hub id",
        )
    return _load_from_hub(name, HUB.get(name, name), revision, variant, allow_pickle)


def _load_single_file(path: Path, name: str, allow_pickle: bool) -> Model:
    from erasec.ldm.single_file import SingleFile

    with path.open("rb") as file:
        refuse_gguf(path, file.read(len(GGUF)))
    if path.suffix in PICKLES:
        if not allow_pickle:
            raise ErasecError(
                f"{name} is pickled",
                why="a pickle can run code when it is opened, so it is refused",
                fix="get the .safetensors file; or give --allow-pickle, which reads only tensors and runs no code",
            )
        path = pickles.as_safetensors(path)
    elif path.suffix != ".safetensors":
        raise ErasecError(f"{name} is no checkpoint", why=f"its suffix is {path.suffix or 'missing'}, not .safetensors")
    source = SingleFile(path)
    source.watch()
    denoiser = source.entries(FAMILIES[source.family].denoiser)
    family = detect({key: entry.shape for key, entry in denoiser.items()})
    return Model(family.only([part for part in family.components if part in source.components]), source, name)


def _load_folder(root: Path, name: str, revision: str, variant: str = "", allow_pickle: bool = False) -> Model:
    if not (root / "model_index.json").is_file():
        raise ErasecError(
            f"{name} is no diffusers folder",
            why="it has no model_index.json",
            where=str(root),
            fix="give the folder that holds model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/",
        )
    check_links(root)
    if allow_pickle:
        root = pickles.folder_as_safetensors(root, variant)
    folder = Folder(root, variant)
    folder.watch()
    for file in sorted(root.glob("*/config.json")):
        if folder.config(file.parent.name).get("quantization_config"):
            raise quantised(f"{file.parent.name} of {name}", file)
    family = family_of(folder)
    for component in family.components:
        folder.weight_files(component)
        _require(root, name, component, ("config.json",))
        folder.config(component)
    for component, classes in folder.index.items():
        if not (isinstance(classes, list) and classes[0]):
            continue
        required = _required_files(component, str(classes[1]), root)
        if not required:
            continue
        present = _require(root, name, component, required)
        if component.startswith("scheduler"):
            folder.config(component, present)
        else:
            read_tokenizer(root / component)
    return Model(family, folder, name, revision)


def family_of(folder: Folder) -> Family:
    """The family of a folder, by the tensors of its denoiser, without the optional components that the folder lacks.
    Raises ErasecError."""
    denoiser = "transformer" if (folder.root / "transformer").is_dir() else "unet"
    family = detect({key: entry.shape for key, entry in folder.entries(denoiser).items()})
    for component in family.optional:
        if not folder.index.get(component, [None])[0]:
            family = family.without(component)
    return family


def _required_files(component: str, class_name: str, root: Path) -> tuple[str, ...]:
    """The files of which the folder of a scheduler or tokenizer must have one; () for other components.

    Raises ErasecError for a tokenizer of another class than those that erasec reads.
    """
    kind = component.rstrip("_0123456789")
    if kind == "scheduler":
        return ("scheduler_config.json",)
    if kind != "tokenizer":
        return ()
    if class_name.removesuffix("Fast") not in TOKENIZERS:
        raise ErasecError(
            f"{component} is a {class_name}",
            why=f"erasec reads {' and '.join(TOKENIZERS)}, and the text encoders that belong to them",
            where=str(root),
            fix="use a model whose text encoders are CLIP's or T5's",
        )
    return TOKENIZERS[class_name.removesuffix("Fast")]


def _require(root: Path, name: str, component: str, files: Sequence[str]) -> str:
    """The first of ``files`` that a component has. Raises ErasecError where it has none."""
    for file in files:
        if (root / component / file).is_file():
            return file
    raise ErasecError(
        f"{name} is incomplete",
        why=f"{component}/{files[0]} is missing",
        where=str(root),
        fix="fetch the missing files of the model",
    )


def _load_from_hub(name: str, repository: str, revision: str | None, variant: str, allow_pickle: bool) -> Model:
    # Files without a variant are always fetched: a component that does not have the variant has only those.
    names = [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"] if variant else []
    patterns = [
        "*.json",
        "*.txt",
        "*.model",
        EXTRAS_FILE,
        PRESETS_FILE,
        "*/diffusion_pytorch_model*.safetensors",
        "*/model*.safetensors",
    ]
    patterns += ["*/diffusion_pytorch_model*.bin", "*/pytorch_model*.bin"] if allow_pickle else []
    unwanted = [
        name for name in ("*.fp16.*", "*.bf16.*", "*.fp16-*", "*non_ema*") if not variant or variant not in name
    ]
    # The cache is tried first: a pinned revision that is there already needs no network.
    error: Exception | None = None
    for local in (True,) if hub.offline() else (True, False):
        last = hub.offline() or not local
        try:
            root = hub.snapshot(repository, revision, patterns + names, [*unwanted, "safety_checker/*"], local)
            model = _load_folder(root, name, root.name, variant, allow_pickle)
            _check_precision(model, variant, strict=not last)
            return model
        except ErasecError:
            if last:
                raise
        except Exception as caught:  # the hub client raises exceptions of three libraries, without a common base class
            error = caught
    raise ErasecError(
        f"the model {repository} is not on this machine and could not be fetched",
        why="HF_HUB_OFFLINE forbids the network" if hub.offline() else reason(error) if error else "no network",
        fix=f"give a diffusers folder (erasec build ./{name.split('/')[-1]} ...), "
        f"or fetch the model on a machine with a network: hf download {repository}",
    ) from error


def _check_precision(model: Model, variant: str, strict: bool) -> None:
    """Raise ErasecError where a component has weights of another precision than ``variant``: the content of the hub's
    cache must not choose the precision.

    If ``strict``, every component must have the variant; otherwise it may have weights without a variant instead.
    """
    allowed = (variant,) if strict else ("", variant)
    for component in model.family.components:
        if (present := model.source.variant_of(component)) not in allowed:
            raise ErasecError(
                f"{model.name} has no {f'{variant} ' if variant else 'plain '}weights of {component} here",
                why=f"it has those of the variant {present!r}" if present else "it has the plain ones",
                fix=f"choose them: --variant {present}" if present else "leave out --variant",
                where=str(model.source.root),
            )
