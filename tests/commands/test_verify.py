"""``erasec verify``: it verifies what a build wrote, and finds whatever was changed in it, first of all by whom."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forged import TARGETS, change_tensor, edit_json, make, replace_digests, sign_over
from signed import key_pair, needs_signing
from typer.testing import CliRunner

from erasec.base import EditTarget
from erasec.checkpoint import manifest
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import file_digest, read_header, read_tensor, save_tensors
from erasec.cli.app import app
from erasec.commands import plan
from erasec.commands.verify import Verification, verify
from erasec.errors import CHECK_FAILED, ErasecError
from erasec.model.loading import load
from erasec.recipe.recipe import Publish
from erasec.reporting.bom import BOM
from erasec.reporting.provenance import PROVENANCE

UNET, VAE = "hf/unet/diffusion_pytorch_model.safetensors", "hf/vae/diffusion_pytorch_model.safetensors"
GRAPHS = ("onnx", "openvino:weights=int8", "triton")


@pytest.fixture(scope="module")
def release(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed release, with its public key beside it as key.pub."""
    parent = tmp_path_factory.mktemp("release")
    private, _ = key_pair(parent)
    make(random_folder, parent / "out", private, targets=("lora", "edit"), publish=Publish())
    return parent / "out"


def states(verification: Verification) -> dict[str, str]:
    return {finding.what: finding.state for finding in verification.findings}


def test_every_artifact_of_a_build_is_verified(whole: Path, random_folder: Path) -> None:
    found = verify(whole, str(random_folder))
    assert found.wrong == "" and found.outcome == "verified in part"
    described = ("files", "report", "card", "recipe", "provenance", "bill of materials", "hf and the base")
    assert states(found) == {"signature": "not verified", **dict.fromkeys((*described, *TARGETS), "verified")}
    assert [note.split()[0] for note in found.notes] == ["lora", "edit", "No", "What"]


@pytest.mark.slow
def test_every_kind_of_graph_is_verified(random_folder: Path, tmp_path: Path) -> None:
    make(random_folder, tmp_path / "out", targets=GRAPHS)
    found = verify(tmp_path / "out", str(random_folder))
    assert {states(found)[name.partition(":")[0]] for name in GRAPHS} == {"verified"}
    change_tensor(tmp_path / "out" / VAE, "decoder.conv_in.weight")
    merged = Folder(tmp_path / "out" / "hf")
    for text in GRAPHS:
        target: Any = plan.make_target(text)
        assert not all(check.passed for check in target.compare(merged, tmp_path / "out" / target.name))


def test_what_cannot_be_verified_is_said(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else True)
    found = verify(whole)
    open_ends = {finding.what: finding.how for finding in found.findings if finding.state == "not verified"}
    assert open_ends.keys() == {"signature", "hf and the base", "lora", "edit", "onnx"}
    assert "--base MODEL" in open_ends["lora"] and 'pip install "erasec[onnx]"' in open_ends["onnx"]
    assert states(found)["ldm"] == "verified"


@needs_signing
def test_a_signed_release_holds_no_edit_and_is_verified(release: Path, random_folder: Path) -> None:
    from model_signing import verifying

    assert sorted(os.listdir(release.parent / "out.private")) == ["edit", "erasec.manifest.json", "lora"]
    assert not {"edit", "lora"} & set(os.listdir(release))
    key = release.parent / "key.pub"
    found = verify(release, str(random_folder), key)
    assert found.outcome == "verified" and set(states(found).values()) == {"verified"}
    config: Any = verifying.Config
    config().use_elliptic_key_verifier(public_key=key).verify(release, release / manifest.SIGNATURE)
    report = json.loads((release / "report.json").read_text())
    assert [(item["path"], item["inside"]) for item in report["undoing"]] == [("lora", False), ("edit", False)]
    assert any("out.private" in note for note in report["notes"])
    assert "[publish]\nedits = false" in (release / "recipe.toml").read_text()


@needs_signing
def test_every_single_byte_change_of_any_file_is_found(release: Path, tmp_path: Path) -> None:
    """Every byte of the smallest files, and samples of the others: their ends and some between."""
    out, key = Path(shutil.copytree(release, tmp_path / "out")), release.parent / "key.pub"
    files = sorted(path for path in out.rglob("*") if path.is_file())
    assert len(files) > 15
    for file in files:
        name, data = file.relative_to(out).as_posix(), file.read_bytes()
        size = len(data)
        places = range(size) if size < 100 else sorted({0, 1, size // 3, size // 2, size - 2, size - 1})
        for place in places if name == manifest.SIGNATURE or size < 100 else [*places][:: 1 if size < 10**5 else 3]:
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            found = verify(out, key=key)
            assert len(found.findings) < 3 and found.wrong, (name, place)
            assert name in found.wrong or name == manifest.FILE, found.wrong
        file.write_bytes(data)
    assert verify(out, key=key).wrong == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: (out / "hf/more").touch(), "hf/more is there, and is not listed"),
        (lambda out: (out / "hf/.hidden").touch(), "hf/.hidden is there"),
        (lambda out: (out / ".rejected").mkdir(), ".rejected/ is there"),
        (lambda out: (out / "report.html").unlink(), "report.html is missing"),
        (
            lambda out: shutil.copy(out / "hf/vae/config.json", out / "hf/unet/config.json"),
            "hf/unet/config.json is not",
        ),
        (lambda out: shutil.move(out / "hf/unet/config.json", out / "hf/unet/other"), "hf/unet/config.json is missing"),
        (
            lambda out: (shutil.move(out / "README.md", out.parent / "x"), (out / "README.md").symlink_to("../x")),
            "README.md is not the file",
        ),
        (
            lambda out: manifest.renew([out / "onnx/unet/model.onnx"]),
            "onnx/unet/model.onnx was changed after the build",
        ),
    ],
)
def test_files_that_were_added_lost_swapped_or_linked(copied: Path, change: Callable[[Path], Any], words: str) -> None:
    change(copied)
    assert words in verify(copied).wrong


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: edit_json(out / "report.json", lambda r: r.update(outcome="rejected")), "was rejected"),
        (lambda out: edit_json(out / "report.json", lambda r: r.update(digest="0" * 64)), "digest of all artifacts"),
        (lambda out: edit_json(out / "report.json", lambda r: r.pop("verdict")), "report.json cannot be read"),
        (lambda out: (out / "more").touch(), "more is there, and report.json does not describe it"),
        (lambda out: (out / BOM).unlink(), f"{BOM} is missing"),
        (lambda out: (out / "README.md").write_text("# another model"), "README.md is about other files"),
        (
            lambda out: (out / "README.md").write_text((out / "README.md").read_text().replace("# ", "# Not ")),
            "README.md does not say what report.json says",
        ),
        (
            lambda out: (out / "recipe.toml").write_text(
                (out / "recipe.toml").read_text().replace('digest = "', 'digest = "' + "0" * 64 + '" #')
            ),
            "recipe.toml is for another base",
        ),
        (
            lambda out: (out / "recipe.toml").write_text((out / "recipe.toml").read_text().replace('"church"', '"x"')),
            "recipe.toml",
        ),
        (
            lambda out: edit_json(out / PROVENANCE, lambda s: s["subject"].pop()),
            f"{PROVENANCE} is about another",
        ),
        (
            lambda out: edit_json(out / BOM, lambda b: b["components"][1]["hashes"][0].update(content="0" * 64)),
            f"{BOM} lists another",
        ),
    ],
)
def test_what_does_not_belong_to_the_files_is_found_without_the_manifest(
    copied: Path, change: Callable[[Path], Any], words: str
) -> None:
    """Somebody changes one file and writes the manifest, and the provenance of all but itself, again."""
    change(copied)
    if not words.startswith(PROVENANCE):
        statement = json.loads((copied / PROVENANCE).read_text())
        statement["subject"] = [
            {"name": name, "digest": {"sha256": file_digest(copied / name)}}
            for name in manifest.contents(copied)
            if name != PROVENANCE
        ]
        (copied / PROVENANCE).write_text(json.dumps(statement))
    sign_over(copied)
    assert words in verify(copied).wrong


def test_a_tensor_that_is_neither_edited_nor_the_base_s_is_found(copied: Path, random_folder: Path) -> None:
    """Also where every digest in the build was written again; without the base, it cannot be."""
    change_tensor(copied / VAE, "decoder.conv_in.weight")
    replace_digests(copied, VAE)
    found = verify(copied, str(random_folder))
    assert found.wrong.startswith("vae/decoder.conv_in.weight is not the base's")
    found = verify(copied)
    assert states(found)["hf and the base"] == "not verified" and "ldm does not hold the merged weights" in found.wrong


def test_an_artifact_with_other_weights_is_found(copied: Path, random_folder: Path) -> None:
    key = next(key for key in Folder(copied / "hf").entries("unet") if key.endswith("attn2.to_k.weight"))
    change_tensor(copied / UNET, key)
    replace_digests(copied, UNET)
    found = verify(copied, str(random_folder))
    assert states(found)["hf and the base"] == "verified"  # an edited tensor may be anything
    assert found.wrong.startswith("ldm does not hold the merged weights")
    base, merged = load(str(random_folder)), Folder(copied / "hf")
    for text in TARGETS:
        target: Any = plan.make_target(text)
        given = (base, merged) if isinstance(target, EditTarget) else (merged,)
        assert not all(check.passed for check in target.compare(*given, copied / target.name)), text


def test_another_base_is_no_base(whole: Path, tmp_path: Path, random_folder: Path) -> None:
    other = Path(shutil.copytree(random_folder, tmp_path / "other"))
    change_tensor(other / UNET.removeprefix("hf/"), "conv_in.weight")
    assert "is not the base of this build" in verify(whole, str(other)).wrong
    with pytest.raises(ErasecError):
        verify(whole, str(tmp_path / "none"))
    with pytest.raises(ErasecError, match="is no build") as caught:
        verify(whole / "hf")
    assert str(whole) in caught.value.why


def test_a_lora_for_other_weights_is_found_beyond_rounding(whole: Path, random_folder: Path, tmp_path: Path) -> None:
    from erasec.targets.lora import FILE, Lora

    merged, base = Folder(whole / "hf"), load(str(random_folder))
    lora = Path(shutil.copytree(whole / "lora", tmp_path / "lora"))
    _, check = Lora().compare(base, merged, lora)
    assert check.passed and check.limit is not None
    _, truncated = Lora(rank=1).compare(base, merged, lora)
    assert truncated.limit is None  # it is reported: a truncated LoRA holds other weights
    entries, metadata = read_header(lora / FILE)
    tensors = {name: read_tensor(entry) for name, entry in entries.items()}
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    save_tensors(lora / FILE, {**tensors, name: tensors[name] * 1.5}, metadata)
    assert not Lora().compare(base, merged, lora)[1].passed
    start = name.removesuffix("lora_up.weight")
    for key, value in (
        ("lora_unet_x.lora_down.weight", torch.ones(1, 2)),
        (f"{start}diff", torch.ones(1)),  # which readers of LoRA files add to the weight
        (f"{start}alpha", torch.tensor(torch.nan)),
    ):
        save_tensors(lora / FILE, {**tensors, key: value}, metadata)
        (failed,) = [check for check in Lora().compare(base, merged, lora) if not check.passed]
        assert failed.name == "lora/merged", key
    save_tensors(lora / "more.safetensors", tensors)
    assert [check.name for check in Lora().compare(base, merged, lora)] == ["lora/files"]


def test_the_command_prints_what_it_found_and_exits_with_3(copied: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(copied)])
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == "verified in part"
    assert "edit can undo the erasure" in result.stderr
    (copied / "README.md").write_text("forged")
    result = CliRunner().invoke(app, ["verify", str(copied), "--json"])
    content = json.loads(result.stdout)
    assert result.exit_code == CHECK_FAILED and content["outcome"] == "wrong"
    assert content["wrong"] in result.stderr and content["wrong"].startswith("README.md is not the file that was built")
    assert [item["state"] for item in content["findings"]] == ["wrong"]


@needs_signing
def test_the_file_that_hubs_add_is_not_covered_and_any_other_is_wrong(release: Path, tmp_path: Path) -> None:
    out, key = Path(shutil.copytree(release, tmp_path / "out")), release.parent / "key.pub"
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    found = verify(out, key=key)
    assert found.wrong == "" and found.outcome == "verified in part"
    assert states(found)[".gitattributes"] == "not verified" and states(found)["signature"] == "verified"
    (out / ".gitattributes").unlink()
    (out / ".gitattributes").symlink_to(key)
    assert ".gitattributes is there, and is not listed" in verify(out, key=key).wrong
    (out / ".gitattributes").unlink()
    (out / ".gitignore").touch()
    assert ".gitignore is there, and is not listed" in verify(out, key=key).wrong
    (out / ".gitignore").unlink()
    (out / "hf" / ".gitattributes").touch()
    assert "hf/.gitattributes is there, and is not listed" in verify(out, key=key).wrong


@needs_signing
def test_a_signature_without_a_key_is_not_verified_and_that_is_stated(release: Path) -> None:
    finding = next(finding for finding in verify(release).findings if finding.what == "signature")
    assert finding.state == "not verified" and "neither who made it nor which files it covers" in finding.how


@needs_signing
def test_a_build_without_a_signature_fails_where_a_key_is_given(whole: Path, tmp_path: Path) -> None:
    _, public = key_pair(tmp_path)
    assert verify(whole, key=public).wrong.startswith("there is no model.sig")
