"""Target ldm of sd3 and flux: what readers load is the folder, and the checks find what is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from joint_models import save_original
from safetensors.torch import load_file, save_file

from erasec.base import Artifact, Context
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import patch_file, read_header, read_tensor
from erasec.errors import ErasecError
from erasec.ldm.tensor_names import LAYOUTS, stored_names
from erasec.model.loading import bundled_folder, load
from erasec.targets.ldm import DENOISER_FILE, FILE, Ldm, same_tensors

NAMES = {"sd3": "sd3", "sd35": "sd3", "flux": "flux"}
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each model a folder, and what the target makes of it, whole and of the transformer alone."""
    root = tmp_path_factory.mktemp("joint")
    for name in NAMES:
        save_original(name, root / name)
    return root


@pytest.fixture(scope="module")
def artifacts(root: Path) -> dict[str, Artifact]:
    made = {}
    for name in NAMES:
        for parts in ("all", "denoiser"):
            (root / f"{name}-{parts}").mkdir()
            made[f"{name}-{parts}"] = Ldm(parts=parts).export(Folder(root / name), root / f"{name}-{parts}", Context())
    return made


def entries(root: Path, name: str) -> dict[str, Any]:
    return {part: Folder(root / name).entries(part) for part in load(str(root / name)).family.components}


def equal(read: Any, wanted: Any) -> bool:
    """Whether two networks have the same tensors."""
    own, others = read.state_dict(), wanted.state_dict()
    return own.keys() == others.keys() and all(torch.equal(own[key], others[key]) for key in own)


def tie(pipe: Any) -> None:
    """Tie the token embedding of T5 to its other name: diffusers 0.42 leaves that empty with transformers 5."""
    for part in (pipe.components.get("text_encoder_3"), pipe.text_encoder_2):
        if isinstance(part, transformers.T5EncoderModel):
            part.tie_weights()


@pytest.mark.parametrize("name", ["sd3", "sd35"])
def test_the_pipeline_that_diffusers_reads_is_the_folder(root: Path, artifacts: dict[str, Artifact], name: str) -> None:
    none: dict[str, Any] = {} if name == "sd3" else {"text_encoder_3": None, "tokenizer_3": None}
    wanted = diffusers.StableDiffusion3Pipeline.from_pretrained(root / name, **none)
    read = diffusers.StableDiffusion3Pipeline.from_single_file(
        artifacts[f"{name}-all"].path / FILE, config=str(root / name), local_files_only=True, **none
    )
    tie(read)
    components = [part for part in LAYOUTS["sd3"].prefixes if getattr(wanted, part) is not None]
    assert ("text_encoder_3" in components) == (name == "sd3")
    for part in components:
        assert equal(getattr(read, part), getattr(wanted, part)), part


def test_what_diffusers_reads_of_flux_is_the_folder(root: Path, artifacts: dict[str, Artifact]) -> None:
    """The transformer apart, which diffusers reads at FLUX's own width alone: see test_joint_names."""
    wanted = diffusers.FluxPipeline.from_pretrained(root / "flux")
    read = diffusers.FluxPipeline.from_single_file(
        artifacts["flux-all"].path / FILE,
        config=str(root / "flux"),
        transformer=wanted.transformer,
        local_files_only=True,
    )
    tie(read)
    for part in ("text_encoder", "text_encoder_2", "vae"):
        assert equal(getattr(read, part), getattr(wanted, part)), part


@pytest.mark.parametrize("name", ["sd3", "sd35"])
def test_the_transformer_alone_has_the_original_names(root: Path, artifacts: dict[str, Artifact], name: str) -> None:
    file = artifacts[f"{name}-denoiser"].path / DENOISER_FILE
    whole = load_file(artifacts[f"{name}-all"].path / FILE)
    alone = load_file(file)
    assert alone.keys() == {key.removeprefix(PREFIX) for key in whole if key.startswith(PREFIX)}
    assert all(torch.equal(tensor, whole[PREFIX + key]) for key, tensor in alone.items())
    kind = diffusers.SD3Transformer2DModel
    read = kind.from_single_file(str(file), config=str(root / name), subfolder="transformer", local_files_only=True)
    assert equal(read, kind.from_pretrained(root / name / "transformer"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", ["all", "denoiser"])
def test_checks_read_every_tensor_back(root: Path, artifacts: dict[str, Artifact], name: str, parts: str) -> None:
    artifact = artifacts[f"{name}-{parts}"]
    names = ["ldm/finite", "ldm/layout", *(["ldm/reader"] if name != "flux" else [])]
    assert [(check.name, check.value, check.passed) for check in artifact.checks] == [(own, 0, True) for own in names]
    own = entries(root, name)
    parts_of = own if parts == "all" else {"transformer": own["transformer"]}
    kept = {part: stored_names(NAMES[name], part, stored) for part, stored in parts_of.items()}
    count = sum(map(len, kept.values()))
    assert f"{count} of the checkpoint, {count} of the file" in artifact.checks[1].how
    stored = [entry for part in kept for key, entry in own[part].items() if key in kept[part]]
    file = artifact.path / (FILE if parts == "all" else DENOISER_FILE)
    assert [path.name for path in artifact.path.iterdir()] == [file.name]
    written = read_header(file)[0].values()
    assert sum(e.stop - e.start for e in stored) == sum(e.stop - e.start for e in written)
    assert Ldm(parts=parts).size(load(str(root / name))) == sum(e.stop - e.start for e in written)
    assert read_header(file)[1] == {"format": "pt"}


@pytest.mark.parametrize(
    ("name", "key", "count"),
    [
        ("sd35", "joint_blocks.1.x_block.attn2.qkv.weight", 3),
        ("sd3", "joint_blocks.2.context_block.adaLN_modulation.1.bias", 1),
        ("flux", "single_blocks.1.linear1.weight", 4),
        ("flux", "final_layer.adaLN_modulation.1.weight", 1),
    ],
)
def test_halves_that_have_changed_places_fail_the_check(
    root: Path, artifacts: dict[str, Artifact], tmp_path: Path, name: str, key: str, count: int
) -> None:
    file = artifacts[f"{name}-all"].path / FILE
    tensor = read_tensor(read_header(file)[0][PREFIX + key])
    half = len(tensor) // 2
    patch_file(file, tmp_path / FILE, {PREFIX + key: lambda: torch.cat([tensor[half:], tensor[:half]])})
    own = entries(root, name)
    assert same_tensors(NAMES[name], own, file).passed
    check = same_tensors(NAMES[name], own, tmp_path / FILE)
    assert not check.passed
    assert check.value == count


def with_config(folder: Path, out: Path, file: str, **settings: object) -> Path:
    """A copy of a folder with other values in one of its JSON files; all else are hard links."""
    shutil.copytree(folder, out, copy_function=os.link)
    (out / file).unlink()  # which is a link too
    (out / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **settings}))
    return out


@pytest.mark.parametrize(
    ("name", "file", "settings", "words"),
    [
        ("sd35", "vae/config.json", {"shift_factor": 0.1}, "vae shift_factor is 0.1 and readers take 0.0609"),
        ("sd35", "scheduler/scheduler_config.json", {"shift": 1.0}, "scheduler shift is 1.0 and readers take 3.0"),
        ("sd35", "text_encoder/config.json", {"hidden_act": "gelu"}, "text_encoder hidden_act is gelu"),
        ("sd3", "text_encoder_3/config.json", {"feed_forward_proj": "gated-silu"}, "readers take gated-gelu"),
        ("flux", "transformer/config.json", {"axes_dims_rope": [8, 60, 60]}, "transformer axes_dims_rope is"),
    ],
)
def test_settings_that_readers_do_not_get_are_refused(
    root: Path, tmp_path: Path, name: str, file: str, settings: dict[str, Any], words: str
) -> None:
    assert "has not the sizes" in Ldm().notes(load(str(root / name)))[0]
    model = load(str(with_config(root / name, tmp_path / "model", file, **settings)))
    with pytest.raises(ErasecError) as caught:
        Ldm().size(model)  # by which the plan refuses it
    assert words in str(caught.value)
    if file.startswith(("vae", "text")):  # which the transformer alone does not need
        assert Ldm(parts="denoiser").size(model) > 0


def test_a_projection_that_readers_would_lose_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "sd35", tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "text_projection.weight": 2 * tensors["text_projection.weight"]}, file)
    with pytest.raises(ErasecError, match=r"text_projection\.weight that is not the identity"):
        Ldm().export(Folder(tmp_path / "model"), tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()


def test_the_transformer_alone_is_noted_and_unets_are_refused(root: Path, tmp_path: Path) -> None:
    assert "transformer of FLUX alone" in Ldm(parts="denoiser").notes(load(str(root / "flux")))[-1]
    with pytest.raises(ErasecError, match="parts=denoiser writes a transformer"):
        Ldm(parts="denoiser").export(Folder(bundled_folder("glyphs")), tmp_path, Context())


@pytest.mark.parametrize("parts", ["all", "denoiser"])
def test_the_file_of_either_kind_is_compared_with_the_checkpoint(
    root: Path, artifacts: dict[str, Artifact], parts: Any, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(artifacts[f"sd3-{parts}"].path, tmp_path / "out"))
    target = Ldm(parts=parts)
    checks = target.compare(Folder(root / "sd3"), out)
    assert [check.name for check in checks] == ["ldm/files", "ldm/names", "ldm/layout"]
    assert all(check.passed for check in checks)
    (file,) = out.iterdir()
    tensors = load_file(file)
    save_file({**tensors, "old.weight": torch.zeros(2)}, file)
    assert [check.passed for check in target.compare(Folder(root / "sd3"), out)] == [True, False]
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] + 1}, file)
    assert [check.passed for check in target.compare(Folder(root / "sd3"), out)] == [True, True, False]
    (out / "more.safetensors").touch()
    assert [check.passed for check in target.compare(Folder(root / "sd3"), out)] == [False]
