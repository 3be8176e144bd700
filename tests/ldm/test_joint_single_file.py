"""Single files of sd3 and flux, read as folders where that is possible, and edited as files where it is not."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from joint_models import save_original

from erasec.base import Context
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_header, read_tensor, save_tensors
from erasec.commands import plan
from erasec.commands.apply import apply
from erasec.commands.diff import compare
from erasec.errors import ErasecError
from erasec.ldm.single_file import SingleFile
from erasec.model import edit_file, loading
from erasec.model.edit import Edit, LowRank
from erasec.recipe.recipe import Recipe
from erasec.targets.ldm import DENOISER_FILE, FILE, Ldm

SITES = {
    "sd35": (
        "context_embedder.weight",
        "transformer_blocks.0.attn.add_k_proj.weight",
        "transformer_blocks.0.attn.add_v_proj.weight",
        "transformer_blocks.1.attn2.to_q.weight",
        "norm_out.linear.weight",
    ),
    "flux": (
        "time_text_embed.text_embedder.linear_1.weight",
        "single_transformer_blocks.0.attn.to_v.weight",
        "single_transformer_blocks.1.proj_mlp.weight",
        "norm_out.linear.weight",
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of an sd3 without T5, and of flux; the single files of each, whole and of the transformer alone."""
    root = tmp_path_factory.mktemp("joint")
    for name in ("sd35", "flux"):
        save_original(name, root / name, torch.float16)
        for parts in ("all", "denoiser"):
            (root / f"{name}-{parts}").mkdir()
            artifact = Ldm(parts=parts).export(Folder(root / name), root / f"{name}-{parts}", Context())
            assert all(check.passed for check in artifact.checks)
    return root


def path(root: Path, name: str) -> Path:
    """The file of one of the folders of the target."""
    return root / name / (FILE if name.endswith("-all") else DENOISER_FILE)


@pytest.mark.parametrize("name", ["sd35-all", "sd35-denoiser", "flux-all", "flux-denoiser"])
def test_every_tensor_is_the_folders(root: Path, name: str) -> None:
    folder, single = loading.load(str(root / name.split("-")[0])), loading.load(str(path(root, name)))
    whole = name.endswith("-all")
    assert single.family.name == folder.family.name
    assert single.family.components == (folder.family.components if whole else ("transformer",))
    assert single.sites == folder.sites
    assert {site: single.site_digest(site) for site in single.sites} == {
        site: folder.site_digest(site) for site in folder.sites
    }
    if whole:
        assert compare(root / name.split("-")[0], path(root, name)) == []
        assert single.family == folder.family


def test_the_folder_written_of_sd3_loads_and_reads_prompts_alike(root: Path, tmp_path: Path) -> None:
    """Configs and tokenizers are derived from the family and the shapes; they are those of the original folder."""
    single, folder = loading.load(str(path(root, "sd35-all"))), loading.load(str(root / "sd35"))
    single.source.write(tmp_path / "out", {})
    ours, wanted = (
        diffusers.StableDiffusion3Pipeline.from_pretrained(
            where, torch_dtype=torch.float16, text_encoder_3=None, tokenizer_3=None
        )
        for where in (tmp_path / "out", root / "sd35")
    )
    for part in single.family.components:
        states = (getattr(pipe, part).state_dict() for pipe in (ours, wanted))
        assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    for part in ("transformer", "vae"):
        own, others = getattr(ours, part).config, getattr(wanted, part).config
        same = {key: value for key, value in others.items() if key[0] != "_" and key != "sample_size"}
        assert {key: own[key] for key in same} == same
    assert ours.scheduler.config["shift"] == wanted.scheduler.config["shift"] == 3.0
    for stream in ("context", "pooled"):
        prompts = ["", "a photo of a garbage truck"]
        assert torch.equal(single.encode(prompts, stream).states, folder.encode(prompts, stream).states)
    assert single.source.notes == ()


def test_a_build_of_sd3_is_planned_from_the_file(root: Path, tmp_path: Path) -> None:
    recipe = Recipe(model=str(path(root, "sd35-all")), erase=("golf ball",), targets=("ldm", "lora"))
    description = plan.describe(plan.make_plan(recipe, tmp_path / "out", pin=False))
    assert description["passes"][0]["sites"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flux-all", "holds T5 (text_encoder_2) without its tokenizer"),
        ("flux-denoiser", "holds no text_encoder and no text_encoder_2 and no vae"),
        ("sd35-denoiser", "holds no text_encoder and no text_encoder_2 and no vae"),
    ],
)
def test_a_file_that_is_no_whole_folder_says_what_to_give(root: Path, tmp_path: Path, name: str, words: str) -> None:
    recipe = Recipe(model=str(path(root, name)), erase=("golf ball",))
    with pytest.raises(ErasecError) as caught:
        plan.make_plan(recipe, tmp_path / "out")
    assert words in caught.value.what
    assert "erasec build FOLDER ... --target edit, then erasec apply EDIT" in caught.value.fix
    assert "from_single_file(FILE)" in caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sd35-all", "sd35-denoiser", "flux-all", "flux-denoiser"])
def test_an_edit_of_the_folder_is_merged_into_the_file(root: Path, tmp_path: Path, name: str) -> None:
    """Whole tensors, rows of joint tensors, and tensors whose halves have other places in the file."""
    folder = loading.load(str(root / name.split("-")[0]))
    sites = {site.key: site for site in folder.parameters}
    deltas = {}
    for number, key in enumerate(SITES[name.split("-")[0]]):
        generator = torch.Generator().manual_seed(number)
        height, width = sites[key].shape
        deltas[sites[key]] = LowRank(
            torch.randn(height, 1, generator=generator), torch.randn(1, width, generator=generator)
        )
    edited = folder.with_edit(Edit(deltas, "hand", ("none",), ""))
    edit_file.write_edits(tmp_path / "x.edit.safetensors", edited.edits, edited.base_record())
    base, out = path(root, name), tmp_path / "out.safetensors"
    assert apply(tmp_path / "x.edit.safetensors", str(base), out).tensors == len(deltas)
    source, before = SingleFile(out), read_header(base)[0]
    for key, make in edited.merged()["transformer"].items():
        assert torch.equal(read_tensor(source.entries("transformer")[key]), make())
    after = read_header(out)[0]
    assert after.keys() == before.keys()
    changed = [key for key in after if not torch.equal(read_tensor(after[key]), read_tensor(before[key]))]
    assert len(changed) == 4  # two of the sites of sd3 are rows of one tensor
    apply(tmp_path / "x.edit.safetensors", str(root / name.split("-")[0]), tmp_path / "folder")
    if name.endswith("-all"):
        assert compare(tmp_path / "folder", out) == []


def test_a_projection_in_the_file_is_not_read_because_readers_take_the_identity(root: Path, tmp_path: Path) -> None:
    tensors = {key: read_tensor(entry) for key, entry in read_header(path(root, "sd35-all"))[0].items()}
    key = "text_encoders.clip_l.transformer.text_projection.weight"
    save_tensors(tmp_path / FILE, tensors | {key: torch.full((32, 32), 2.0).half()})
    source = SingleFile(tmp_path / FILE)
    projection = source.entries("text_encoder")["text_projection.weight"]
    assert torch.equal(read_tensor(projection), torch.eye(32).half())
    with pytest.raises(ErasecError, match=r"text_projection\.weight cannot be replaced"):
        source.by_file({"text_encoder": {"text_projection.weight": lambda: torch.zeros(32, 32)}})
