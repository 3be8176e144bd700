"""Target ldm: single-file readers load the tensors of the folder, and its check finds every difference."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_folder as write_random
from safetensors.torch import load_file, save_file

from erasec import registry
from erasec.base import Artifact, Check, Context
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import finite_check, patch_file, read_header, read_tensor
from erasec.errors import ErasecError
from erasec.family import FAMILIES
from erasec.graphs.parity import TOLERANCES
from erasec.ldm.tensor_names import LAYOUTS
from erasec.model.loading import bundled_folder, load
from erasec.targets.ldm import FILE, Ldm, metadata, read_back, same_tensors

UNETS = ("sd1", "sd2", "sdxl")  # test_ldm_joint has the transformers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Artifact]]:
    """A random folder of every family, in half precision, and glyphs; and what the target makes of each."""
    root = tmp_path_factory.mktemp("families")
    for number, family in enumerate(UNETS):
        write_random(root / family, family, seed=number, dtype="float16")
    shutil.copytree(bundled_folder("glyphs"), root / "glyphs")
    artifacts = {
        name: Ldm().export(Folder(root / name), root / f"{name}-ldm", Context()) for name in (*UNETS, "glyphs")
    }
    return {path.name: path for path in root.iterdir()}, artifacts


@pytest.fixture(scope="module")
def folders(models: tuple[dict[str, Path], dict[str, Artifact]]) -> dict[str, Path]:
    """Each folder by its name, and the one of its single file by its name and "-ldm"."""
    return models[0]


def entries(folder: Path, family: str) -> dict[str, Any]:
    return {component: Folder(folder).entries(component) for component in LAYOUTS[family].prefixes}


def link(path: Path, out: Path) -> None:
    """A hard link of a file, or of every file of a folder."""
    if path.is_dir():
        shutil.copytree(path, out, copy_function=os.link)
    else:
        os.link(path, out)


def with_scheduler(folder: Path, out: Path, **settings: object) -> Path:
    """A copy of a folder with other scheduler settings; all else are hard links."""
    (out / "scheduler").mkdir(parents=True)
    for path in folder.iterdir():
        if path.name != "scheduler":
            link(path, out / path.name)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, **settings}))
    return out


def with_config(folder: Path, out: Path, component: str, **settings: object) -> Path:
    """A copy of a folder with other values in a component's config; all else are hard links."""
    (out / component).mkdir(parents=True)
    for path in folder.iterdir():
        if path.name != component:
            link(path, out / path.name)
    for path in (folder / component).iterdir():
        if path.name == "config.json":
            (out / component / path.name).write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        else:
            link(path, out / component / path.name)
    return out


def failed(check: Check) -> float:
    assert not check.passed
    return check.value


def test_the_registry_names_it() -> None:
    assert registry.load_target("ldm") is Ldm


def test_the_size_is_estimated(folders: dict[str, Path]) -> None:
    estimate, written = Ldm().size(load("glyphs")), (folders["glyphs-ldm"] / FILE).stat().st_size
    assert estimate < written < 1.02 * estimate


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "glyphs"])
def test_what_single_file_readers_load_is_the_folder(folders: dict[str, Path], name: str) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    wanted = kind.from_pretrained(folders[name], torch_dtype=torch.float32)
    loaded = kind.from_single_file(
        folders[f"{name}-ldm"] / FILE, config=str(folders[name]), local_files_only=True, torch_dtype=torch.float32
    )
    for component in LAYOUTS["sd1" if name == "glyphs" else name].prefixes:
        tensors, others = getattr(wanted, component).state_dict(), getattr(loaded, component).state_dict()
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, others[key]), f"{component} {key}"


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "glyphs"])
def test_checks_read_every_tensor_back(models: tuple[dict[str, Path], dict[str, Artifact]], name: str) -> None:
    folders, artifacts = models
    artifact = artifacts[name]
    assert (artifact.target, artifact.path) == ("ldm", folders[f"{name}-ldm"])
    assert [path.name for path in artifact.path.iterdir()] == [FILE]
    limit = TOLERANCES["fp16"]
    assert [(check.name, check.value, check.limit, check.passed) for check in artifact.checks] == [
        ("ldm/finite", 0, 0, True),
        ("ldm/layout", 0, 0, True),
        ("ldm/configs", 0, 0, True),
        ("ldm/unet", pytest.approx(0, abs=limit / 100), limit, True),
    ]
    reader = "the checkpoint" if name == "glyphs" else "the family's published model"
    assert all(f"with the configs of {reader}" in check.how for check in artifact.checks[2:])
    own = entries(folders[name], "sd1" if name == "glyphs" else name)
    count = sum("position_ids" not in key for component in own.values() for key in component)
    assert f"{count} of the checkpoint, {count} of the file" in artifact.checks[1].how


def test_a_second_export_is_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    Ldm().export(Folder(folders["sdxl"]), tmp_path, Context())
    assert (tmp_path / FILE).read_bytes() == (folders["sdxl-ldm"] / FILE).read_bytes()


def test_the_library_reads_the_same_tensors_in_their_dtypes(folders: dict[str, Path]) -> None:
    file = folders["sdxl-ldm"] / FILE
    tensors = load_file(file)
    text = load_file(folders["sdxl"] / "text_encoder_2" / "model.safetensors")
    layer = "text_model.encoder.layers.1.self_attn"
    joint = torch.cat([text[f"{layer}.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(tensors["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"], joint)
    assert torch.equal(tensors["conditioner.embedders.1.model.text_projection"], text["text_projection.weight"].T)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    keys = list(read_header(file)[0])
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("family", "prediction", "architecture"),
    [
        ("sd1", "epsilon", "stable-diffusion-v1"),
        ("sd2", "epsilon", "stable-diffusion-v2-512"),
        ("sd2", "v_prediction", "stable-diffusion-v2-768-v"),
        ("sdxl", "epsilon", "stable-diffusion-xl-v1-base"),
    ],
)
def test_metadata_say_what_it_is(
    folders: dict[str, Path], tmp_path: Path, family: str, prediction: str, architecture: str
) -> None:
    folder = with_scheduler(folders[family], tmp_path, prediction_type=prediction)
    wanted = {
        "format": "pt",
        "modelspec.architecture": architecture,
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[prediction],
    }
    assert metadata(Folder(folder), family) == (wanted, ())


def test_metadata_are_in_the_file(folders: dict[str, Path]) -> None:
    for name in UNETS:
        assert read_header(folders[f"{name}-ldm"] / FILE)[1] == metadata(Folder(folders[name]), name)[0]


def test_an_sdxl_that_predicts_v_is_marked(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_scheduler(folders["sdxl"], tmp_path / "model", prediction_type="v_prediction")
    assert metadata(Folder(folder), "sdxl")[1] == ("v_pred",)
    folder = with_scheduler(folder, tmp_path / "rescaled", rescale_betas_zero_snr=True)
    artifact = Ldm().export(Folder(folder), tmp_path / "out", Context())
    assert all(check.passed for check in artifact.checks)
    marks = {key: tensor.numel() for key, tensor in load_file(tmp_path / "out" / FILE).items() if "." not in key}
    assert marks == {"v_pred": 0, "ztsnr": 0}


def test_unknown_predictions_and_missing_settings_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_scheduler(folders["sd1"], tmp_path / "model", prediction_type="sample")
    with pytest.raises(ErasecError, match="the UNet predicts 'sample'"):
        metadata(Folder(folder), "sd1")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ErasecError, match="no scheduler/scheduler_config"):
        Ldm().export(Folder(folder), tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.1.1.proj_in.weight",
        "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias",
        "first_stage_model.decoder.mid.attn_1.k.weight",
    ],
)
def test_one_changed_number_fails_the_check(folders: dict[str, Path], tmp_path: Path, key: str) -> None:
    file = folders["sd2-ldm"] / FILE
    tensor = read_tensor(read_header(file)[0][key])
    tensor.view(-1)[tensor.numel() // 2] += 1
    patch_file(file, tmp_path / FILE, {key: lambda: tensor})
    check = same_tensors("sd2", entries(folders["sd2"], "sd2"), tmp_path / FILE)
    assert failed(check) == 1
    assert check.limit == 0


def test_another_dtype_shape_or_set_of_tensors_fails_the_check(folders: dict[str, Path], tmp_path: Path) -> None:
    own = entries(folders["sdxl"], "sdxl")
    tensors = load_file(folders["sdxl-ldm"] / FILE)
    conv, head = "model.diffusion_model.out.2.bias", "conditioner.embedders.1.model.text_projection"
    damaged = {
        "dtype": {**tensors, conv: tensors[conv].bfloat16()},
        "shape": {**tensors, conv: tensors[conv].reshape(1, -1)},
        "turned": {**tensors, head: tensors[head].T.contiguous()},
        "missing": {key: tensor for key, tensor in tensors.items() if key != conv},
    }
    for name, content in damaged.items():
        save_file(content, tmp_path / name)
        assert failed(same_tensors("sdxl", own, tmp_path / name)) == 1, name
    save_file({**tensors, conv.replace("bias", "bais"): tensors[conv].clone()}, tmp_path / "renamed")
    with pytest.raises(ErasecError, match=r"out\.2\.bais is no tensor"):
        same_tensors("sdxl", own, tmp_path / "renamed")


@pytest.mark.parametrize(
    ("component", "settings", "failures"),
    [
        ("vae", {"scaling_factor": 0.13025}, {"ldm/configs": 1}),
        ("text_encoder", {"hidden_act": "gelu", "num_attention_heads": 2}, {"ldm/configs": 2}),
        ("unet", {"attention_head_dim": 4}, {"ldm/configs": 1, "ldm/unet": None}),
    ],
)
def test_settings_that_readers_do_not_get_are_refused_and_fail_the_checks(
    folders: dict[str, Path], tmp_path: Path, component: str, settings: dict[str, Any], failures: dict[str, Any]
) -> None:
    folder = with_config(folders["sd1"], tmp_path / "model", component, **settings)
    first = next(iter(settings))
    with pytest.raises(ErasecError, match=f"{component} {first} is"):
        Ldm().size(load(str(folder)))  # by which the plan refuses it
    (tmp_path / "out").mkdir()
    with pytest.raises(ErasecError, match=f"{component} {first} is"):
        Ldm().export(Folder(folder), tmp_path / "out", Context())
    assert not list((tmp_path / "out").iterdir())
    # The file of the same tensors, which says nothing of the settings.
    checks = {check.name: check for check in read_back(Folder(folder), "sd1", folders["sd1-ldm"] / FILE)}
    assert {name for name, check in checks.items() if not check.passed} == failures.keys()
    assert checks["ldm/configs"].value == failures["ldm/configs"]
    assert any(f"{component} {name} is" in checks["ldm/configs"].how for name in settings)


def test_the_notes_are_those_of_the_readers(folders: dict[str, Path]) -> None:
    assert "config=FOLDER" in Ldm().notes(load("glyphs"))[0]
    assert "has not the sizes" in Ldm().notes(load(str(folders["sd1"])))[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_fails(folders: dict[str, Path], tmp_path: Path, value: float) -> None:
    key = "first_stage_model.decoder.conv_in.weight"
    tensor = read_tensor(read_header(folders["sd1-ldm"] / FILE)[0][key])
    tensor.view(-1)[7] = value
    patch_file(folders["sd1-ldm"] / FILE, tmp_path / FILE, {key: lambda: tensor})
    check = finite_check("ldm/finite", read_header(tmp_path / FILE)[0])
    assert failed(check) == 1
    assert key in check.how


def test_parts_of_one_tensor_in_two_dtypes_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sd2"], tmp_path / "model"))
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    key = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, key: tensors[key].float()}, file)
    with pytest.raises(ErasecError, match="in_proj_weight have the dtypes F16 and F32"):
        Ldm().export(Folder(folder), tmp_path / "out", Context())


def test_a_model_without_a_denoiser_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"prior": ["diffusers", "StableCascadeUNet"]}')
    with pytest.raises(ErasecError, match="this model has no denoiser"):
        Ldm().export(Folder(tmp_path), tmp_path / "out", Context())


def with_tensors(folder: Path, out: Path, file: str, more: dict[str, torch.Tensor]) -> Path:
    """A copy of a folder with further tensors in one of its files."""
    shutil.copytree(folder, out)
    save_file({**load_file(out / file), **more}, out / file)
    return out


def test_what_no_single_file_can_hold_is_refused_by_the_size(folders: dict[str, Path], tmp_path: Path) -> None:
    """A plan asks for the size, so nothing is solved and written first."""
    for family in UNETS:
        assert Ldm().size(load(str(folders[family]))) > 0
    with pytest.raises(ErasecError, match="this model has no denoiser"):
        Ldm().size(replace(load(str(folders["sd1"])), family=replace(FAMILIES["flux"], name="other")))
    unet, text = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
    extra = with_tensors(folders["sd1"], tmp_path / "extra", unet, {"adapter.weight": torch.zeros(1)})
    with pytest.raises(ErasecError, match=r"adapter\.weight has no place"):
        Ldm().size(load(str(extra)))
    first = "text_model.encoder.layers.0."
    layer = {key: value for key, value in load_file(folders["sd2"] / text).items() if key.startswith(first)}
    for count in (23, 24):
        more = {
            key.replace(".0.", f".{number}.", 1): value.clone()
            for number in range(3, count)
            for key, value in layer.items()
        }
        model = load(str(with_tensors(folders["sd2"], tmp_path / str(count), text, more)))
        if count == 23:
            assert Ldm().size(model) > 0
            continue
        with pytest.raises(ErasecError, match="this text_encoder has 24 layers"):
            Ldm().size(model)
    with pytest.raises(ErasecError, match="predicts 'sample'"):
        Ldm().size(load(str(with_scheduler(folders["sd1"], tmp_path / "sample", prediction_type="sample"))))


def test_one_tensor_at_a_time(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor is read for writing, none is still alive but the parts that stand above it in a joint tensor."""
    import gc
    import weakref

    from erasec.targets import ldm

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(entry: Any) -> torch.Tensor:
        nonlocal most
        tensor = read_tensor(entry)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(each() is not None for each in alive[-8:]))
        return tensor

    monkeypatch.setattr(ldm, "read_tensor", counted)
    monkeypatch.setattr(ldm, "finite_check", lambda name, entries: Check.count(name, [], ""))
    monkeypatch.setattr(ldm, "same_tensors", lambda family, own, file: Check.count("", [], ""))
    monkeypatch.setattr(ldm, "read_back", lambda *_: ())
    gc.collect()
    Ldm().export(Folder(folders["sd2"]), tmp_path, Context())
    assert len(alive) > 500
    assert most <= 3
