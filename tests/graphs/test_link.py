"""Linking: the exporter's own weights without the exporter, from any checkpoint, in little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import GRAPHS

from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import file_digest, read_header, read_tensor, save_tensors
from erasec.errors import ErasecError
from erasec.graphs.export import TRACED, graph_template, sample_inputs, weightless_module
from erasec.graphs.graph import Weight
from erasec.graphs.link import BASE, EDITED, OPSET, PAGE, fp32_modules, lay_out, link, read_array, write_onnx
from erasec.graphs.manifest import MANIFEST, Origin, read_manifest
from erasec.graphs.parity import compare_weights, load_module
from erasec.graphs.signature import graphs
from erasec.ldm.tensor_names import OLD_VAE
from erasec.model.sidecar import Extras, write_extras

onnx = pytest.importorskip("onnx")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(file: Path) -> dict[str, Any]:
    """The arrays of an ONNX file's initializers, by name."""
    # Not by onnx.load, which refuses data that has a second name, as a shared file does.
    arrays = {}
    for tensor in onnx.load(file, load_external_data=False).graph.initializer:
        place = {item.key: item.value for item in tensor.external_data}
        if not place:
            arrays[tensor.name] = onnx.numpy_helper.to_array(tensor)
            continue
        data = (file.parent / place["location"]).read_bytes()
        start, dtype = int(place["offset"]), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        arrays[tensor.name] = np.frombuffer(data[start : start + int(place["length"])], dtype).reshape(tensor.dims)
    return arrays


def right(checkpoint: Path, exported: Path) -> bool:
    return all(check.passed for check in compare_weights(Folder(checkpoint), exported))


def resaved(folder: Path, component: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write a component's weights again, changed."""
    (file,) = Folder(folder).weight_files(component)
    tensors = {key: read_tensor(entry) for key, entry in Folder(folder).entries(component).items()}
    save_tensors(file, change(tensors))


@pytest.fixture(scope="module")
def linked(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("linked") / "onnx"
    write_onnx(Folder(random_folder), out)
    return out


@pytest.mark.parametrize("name", GRAPHS)
def test_the_weights_are_those_that_the_exporter_itself_writes(
    linked: Path, random_folder: Path, tmp_path: Path, name: str
) -> None:
    """The map from tensors to initializers, proven: export with weights and with its own folding, match by value."""
    graph = next(each for each in graphs(Folder(random_folder)) if each.name == name)
    given = sample_inputs(Folder(random_folder), graph, TRACED, 300, torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            load_module(Folder(random_folder), graph),
            tuple(given.values()),
            str(tmp_path / "model.onnx"),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamic_axes={**graph.inputs, **graph.outputs},
            dynamo=False,
            do_constant_folding=True,
        )
    ours, theirs = stored(linked / name / "model.onnx"), stored(tmp_path / "model.onnx")
    contents_of = [{(array.shape, array.tobytes()) for array in arrays.values()} for arrays in (ours, theirs)]
    assert contents_of[0] == contents_of[1]
    assert len(contents_of[0]) > 20
    nodes = [
        Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)
        for file in (linked / name / "model.onnx", tmp_path / "model.onnx")
    ]
    for kind in ("MatMul", "Gemm", "Conv", "InstanceNormalization", "LayerNormalization", "Softmax", "Transpose"):
        assert nodes[0][kind] == nodes[1][kind], kind


def test_the_manifest_lists_every_file(linked: Path, random_folder: Path) -> None:
    manifest = read_manifest(linked)
    assert [manifest[key] for key in ("schema", "precision", "vae", "base")] == ["erasec.onnx/1", "fp32", "fp32", {}]
    assert set(manifest["graphs"]) == set(GRAPHS)
    digests = {name: file["sha256"] for name, file in manifest["files"].items()}
    for name, graph in manifest["graphs"].items():
        assert set(graph["files"]) == {"model.onnx", BASE}
        digests |= {f"{name}/{file}": entry["sha256"] for file, entry in graph["files"].items()}
        assert graph["edited"] == []
    files = {name.as_posix() for name in Folder(linked).files()} - {MANIFEST}
    assert digests == {name: file_digest(linked / name) for name in files}
    for name, component in (("text_encoder", "text_encoder"), ("vae_encoder", "vae")):
        config = Folder(random_folder).config(component)
        assert Folder(linked).config(name).items() >= config.items()


def test_tensors_begin_on_pages_and_do_not_overlap(linked: Path) -> None:
    model = onnx.load(linked / "unet" / "model.onnx", load_external_data=False)
    places = [{item.key: item.value for item in tensor.external_data} for tensor in model.graph.initializer]
    assert len(places) > 100
    assert {int(place["offset"]) % PAGE for place in places} == {0}
    ends = sorted((int(place["offset"]), int(place["offset"]) + int(place["length"])) for place in places)
    assert all(before[1] <= after[0] for before, after in pairwise(ends))


def test_edited_tensors_are_in_a_file_of_their_own(variant: Callable[..., Any], linked: Path) -> None:
    edited = variant("a")
    manifest = read_manifest(edited.onnx)
    assert manifest["base"] == edited.origin.tensors
    assert len(manifest["base"]) == 14
    keys = {f"unet/{item['key']}" for item in manifest["graphs"]["unet"]["edited"]}
    assert keys == set(manifest["base"])
    assert [name for name in GRAPHS if (edited.onnx / name / EDITED).exists()] == ["unet"]
    assert right(edited.folder, edited.onnx)
    ours, others = stored(edited.onnx / "unet" / "model.onnx"), stored(linked / "unet" / "model.onnx")
    changed = {name for name in ours if not np.array_equal(ours[name], others[name])}
    assert changed == {item["name"] for item in manifest["graphs"]["unet"]["edited"]}


def test_the_same_checkpoint_gives_the_same_bytes(random_folder: Path, linked: Path, tmp_path: Path) -> None:
    write_onnx(Folder(random_folder), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(linked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_another_dtype(
    base: Path, random_folder: Path, linked: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    for component in ("text_encoder", "unet", "vae"):
        resaved(base, component, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    write_onnx(Folder(base), tmp_path / "out")
    ours, theirs = (stored(root / "unet" / "model.onnx") for root in (tmp_path / "out", linked))
    assert {array.dtype for array in ours.values()} == {np.dtype(np.float32)}
    for name, array in ours.items():
        wanted = torch.from_numpy(theirs[name].copy()).to(dtype).float().numpy()
        assert np.array_equal(array, wanted), name
    # A float32 copy is the same numbers; bfloat16 rounds them, and is then compared with what it is.
    assert right(random_folder, tmp_path / "out") is (dtype == torch.float32)
    assert dtype == torch.float32 or right(base, tmp_path / "out")


def test_a_checkpoint_in_shards(base: Path, linked: Path, tmp_path: Path) -> None:
    folder = base / "unet"
    entries = Folder(base).entries("unet")
    shards = [f"diffusion_pytorch_model-{number}-of-00002.safetensors" for number in ("00001", "00002")]
    where = {key: shards[place % 2] for place, key in enumerate(sorted(entries))}
    for shard in shards:
        save_tensors(folder / shard, {key: read_tensor(entry) for key, entry in entries.items() if where[key] == shard})
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    write_onnx(Folder(base), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(linked)


def older(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the names that diffusers gave to the attention of a VAE in its early versions."""
    names = {key: key for key in tensors}
    for old, new in OLD_VAE.items():
        names = {key: name.replace(f".{new}.", f".{old}.") for key, name in names.items()}
    return {names[key]: tensor for key, tensor in tensors.items()}


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the prefix text_model. where names have none, and without where they have it."""
    prefix = "text_model."
    return {key.removeprefix(prefix) if key.startswith(prefix) else prefix + key: t for key, t in tensors.items()}


@pytest.mark.parametrize(("component", "change"), [("vae", older), ("text_encoder", renamed)])
def test_names_of_older_libraries(
    base: Path, linked: Path, tmp_path: Path, component: str, change: Callable[..., Any]
) -> None:
    before = set(Folder(base).entries(component))
    resaved(base, component, change)
    assert set(Folder(base).entries(component)) != before
    write_onnx(Folder(base), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(linked)
    assert right(base, tmp_path / "out")


def test_a_missing_tensor_is_an_error(base: Path, tmp_path: Path) -> None:
    resaved(base, "unet", lambda tensors: {key: value for key, value in tensors.items() if key != "conv_out.bias"})
    with pytest.raises(ErasecError, match=r"the checkpoint has no conv_out\.bias") as caught:
        write_onnx(Folder(base), tmp_path / "out")
    assert "random numbers" in caught.value.why


def test_a_tensor_of_another_shape_is_an_error(base: Path, tmp_path: Path) -> None:
    resaved(base, "unet", lambda tensors: tensors | {"conv_out.bias": torch.zeros(5)})
    with pytest.raises(ErasecError, match=r"conv_out\.bias has the shape \(5,\)") as caught:
        write_onnx(Folder(base), tmp_path / "out")
    assert "(4,)" in caught.value.why


def test_numbers_beyond_float16_are_an_error(base: Path, tmp_path: Path) -> None:
    key, names = "encoder.conv_in.weight", ("vae_encoder",)
    resaved(
        base,
        "vae",
        lambda tensors: {name: value.float() * (1e6 if name == key else 1) for name, value in tensors.items()},
    )
    with pytest.raises(ErasecError, match=r"encoder\.conv_in\.weight does not fit into float16") as caught:
        write_onnx(Folder(base), tmp_path / "out", names=names, vae="fp16")
    assert "largest number is" in caught.value.why
    assert "keep_in_fp32" in caught.value.fix
    write_onnx(Folder(base), tmp_path / "kept", names=names, vae="fp16", keep_in_fp32=("*norm*", "*.conv_in"))
    assert stored(tmp_path / "kept" / "vae_encoder" / "model.onnx")[key].dtype == np.float32


def test_fp16_rounds_all_modules_except_those_that_stay_in_fp32(
    random_folder: Path, linked: Path, tmp_path: Path
) -> None:
    write_onnx(Folder(random_folder), tmp_path / "out", "fp16")
    for name in GRAPHS:
        ours, theirs = (stored(root / name / "model.onnx") for root in (tmp_path / "out", linked))
        assert ours.keys() == theirs.keys()
        for key, array in ours.items():
            whole = "norm" in key or name.startswith("vae")
            assert array.dtype == (np.float32 if whole else np.float16), key
            assert np.array_equal(array, theirs[key].astype(array.dtype))
    assert right(random_folder, tmp_path / "out")
    assert [read_manifest(tmp_path / "out")[key] for key in ("precision", "vae")] == ["fp16", "fp32"]


def test_attention_that_overflows_stays_in_fp32(base: Path, random_folder: Path) -> None:
    unet = next(each for each in graphs(Folder(base)) if each.name == "unet")
    assert fp32_modules(Folder(base), unet, ("*norm*",)) == ("*norm*",)
    file = base / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "upcast_attention": True}))
    keep_in_fp32 = fp32_modules(Folder(base), unet, ("*norm*",))
    assert keep_in_fp32 == ("*norm*", "*.attn1", "*.attn2")
    for graph in graphs(Folder(base)):
        if graph.name != "unet":
            assert fp32_modules(Folder(base), graph, ()) == ()
    module = weightless_module(Folder(base), unet, "fp16", keep_in_fp32, Extras())
    kinds = {name: each.dtype for name, each in module.named_parameters()}
    assert {each for name, each in kinds.items() if ".attn2." in name} == {torch.float32}
    assert {each for name, each in kinds.items() if ".ff." in name} == {torch.float16}


def test_a_base_is_shared_by_hard_links(variant: Callable[..., Any], random_folder: Path, tmp_path: Path) -> None:
    a, b = variant("a"), variant("b")
    out = tmp_path / "shared"
    write_onnx(Folder(b.folder), out, origin=b.origin, share=a.onnx)
    assert contents(out) == contents(b.onnx)
    for name in GRAPHS:
        assert (out / name / BASE).stat().st_ino == (a.onnx / name / BASE).stat().st_ino
    assert (out / "unet" / EDITED).read_bytes() != (a.onnx / "unet" / EDITED).read_bytes()


def test_another_base_is_not_shared(variant: Callable[..., Any], linked: Path, tmp_path: Path) -> None:
    a, b = variant("a"), variant("b")
    components = b.origin.components | {"unet": "0" * 64}
    for origin, precision, words in (
        (replace(b.origin, components=components), "fp32", "origin"),
        (replace(b.origin, tensors={}), "fp32", "origin"),
        (None, "fp32", "origin"),
        (b.origin, "fp16", "graph"),
    ):
        with pytest.raises(ErasecError, match="cannot be shared") as caught:
            write_onnx(Folder(b.folder), tmp_path / "out", precision, ("unet",), origin=origin, share=a.onnx)
        assert words in caught.value.why
        shutil.rmtree(tmp_path / "out")
    with pytest.raises(ErasecError, match="cannot be shared"):
        write_onnx(Folder(b.folder), tmp_path / "out", origin=b.origin, share=linked)
    with pytest.raises(ErasecError, match="is no ONNX folder"):
        write_onnx(Folder(b.folder), tmp_path / "other", origin=b.origin, share=b.folder)


def test_a_truncated_shared_file_is_refused(variant: Callable[..., Any], tmp_path: Path) -> None:
    a, b = variant("a"), variant("b")
    cut = Path(shutil.copytree(a.onnx, tmp_path / "cut"))
    os.truncate(cut / "text_encoder" / BASE, 4096)
    with pytest.raises(ErasecError, match="cannot be shared") as caught:
        write_onnx(Folder(b.folder), tmp_path / "out", origin=b.origin, share=cut)
    assert "not as large" in caught.value.why


def test_linking_holds_a_few_tensors_at_a_time(random_folder: Path, tmp_path: Path) -> None:
    checkpoint = Folder(random_folder)
    unet = next(each for each in graphs(checkpoint) if each.name == "unet")
    made, entries = graph_template(checkpoint, unet, "fp32", OPSET), checkpoint.entries("unet")
    sizes = [4 * int(np.prod(weight.shape)) for weight in made.weights]
    tracemalloc.start()
    link(made, "unet", entries, tmp_path / "unet")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * max(sizes) + 2_000_000 < sum(sizes) / 2


def test_linking_and_relinking_import_no_torch() -> None:
    names = "{'torch', 'onnx', 'diffusers'}"
    code = f"import sys, erasec.graphs.link, erasec.commands.relink; print(sorted({names} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tensor_is_read_as_it_is_stored(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.float32, torch.float64, torch.bfloat16):
        save_tensors(
            tmp_path / "x.safetensors", {"a": torch.randn(3, 5, generator=draw, dtype=torch.float64).to(dtype)}
        )
        (entry,) = read_header(tmp_path / "x.safetensors")[0].values()
        wanted = read_tensor(entry)
        assert np.array_equal(read_array(entry), wanted.float().numpy() if dtype == torch.bfloat16 else wanted.numpy())
        turned = replace(entry, shape=(5, 3), transposed=True)
        assert np.array_equal(read_array(turned), read_tensor(turned).double().numpy())
    save_tensors(tmp_path / "x.safetensors", {"a": torch.arange(3)})
    with pytest.raises(ErasecError, match="stored as I64"):
        read_array(*read_header(tmp_path / "x.safetensors")[0].values())


def test_an_embedding_with_new_tokens_counts_as_edited_so_that_the_base_can_be_shared(
    base: Path, tmp_path: Path
) -> None:
    origin = Origin({"text_encoder": "0" * 64}, {})
    for name in ("a", "b"):
        write_extras(base, Extras((), {"<new>": torch.full((128,), float(ord(name)))}))
        share = None if name == "a" else tmp_path / "a"
        write_onnx(Folder(base), tmp_path / name, names=("text_encoder",), origin=origin, share=share)
        assert right(base, tmp_path / name)
    manifest = read_manifest(tmp_path / "b")
    assert manifest["carried"] == ["tokens"]
    (item,) = manifest["graphs"]["text_encoder"]["edited"]
    assert item["key"].endswith("token_embedding.weight")
    one, two = (tmp_path / name / "text_encoder" for name in ("a", "b"))
    assert (one / BASE).samefile(two / BASE)
    assert (one / EDITED).read_bytes() != (two / EDITED).read_bytes()


def test_a_pattern_may_match_one_component_and_one_that_matches_none_is_refused(
    random_folder: Path, tmp_path: Path
) -> None:
    names = ("text_encoder", "unet")
    write_onnx(Folder(random_folder), tmp_path / "out", "fp16", names, keep_in_fp32=("*norm*", "mid_block"))
    ours = stored(tmp_path / "out" / "unet" / "model.onnx")
    whole = {key for key, array in ours.items() if array.dtype == np.float32}
    assert whole == {key for key in ours if "norm" in key or key.startswith("mid_block")}
    with pytest.raises(ErasecError, match=r"no module is named '\*nrom\*'") as caught:
        write_onnx(Folder(random_folder), tmp_path / "other", "fp16", names, keep_in_fp32=("*norm*", "*nrom*"))
    assert "such as *norm*" in caught.value.fix
    write_onnx(
        Folder(random_folder), tmp_path / "fp32", "fp32", ("text_encoder",), keep_in_fp32=("*nrom*",)
    )  # every module is


def test_rows_for_new_tokens_are_added_below() -> None:
    weight = Weight("w", "token_embedding.weight", (3, 2), (0, 1), (3, 2), "float32")
    table = np.arange(4, dtype=np.float32).reshape(2, 2)
    extended = lay_out(table, weight, [torch.tensor([8.0, 9.0])])
    assert extended.tolist() == [[0, 1], [2, 3], [8, 9]]
    with pytest.raises(ErasecError, match=r"has the shape \(2, 2\)"):
        lay_out(table, weight)
