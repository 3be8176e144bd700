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

from erasec.base import Origin
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import file_digest, read_header, read_tensor, save
from erasec.errors import ErasecError
from erasec.graphs import export as tracing
from erasec.graphs import link as linker
from erasec.graphs.export import template
from erasec.graphs.graph import Weight, graphs
from erasec.graphs.link import BASE, EDITED, link, read_manifest, write
from erasec.graphs.parity import load, tensors
from erasec.model import sidecar as extras
from erasec.model.sidecar import Extras

onnx = pytest.importorskip("onnx")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(file: Path) -> dict[str, Any]:
    """The arrays of an ONNX file's initializers, by name."""
    # Not by onnx.load, which refuses data that has a second name, as a shared file does.
    found = {}
    for tensor in onnx.load(file, load_external_data=False).graph.initializer:
        place = {item.key: item.value for item in tensor.external_data}
        if not place:
            found[tensor.name] = onnx.numpy_helper.to_array(tensor)
            continue
        data = (file.parent / place["location"]).read_bytes()
        start, dtype = int(place["offset"]), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        found[tensor.name] = np.frombuffer(data[start : start + int(place["length"])], dtype).reshape(tensor.dims)
    return found


def right(checkpoint: Path, exported: Path) -> bool:
    return all(check.passed for check in tensors(Folder(checkpoint), exported))


def resaved(folder: Path, component: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write a component's weights again, changed."""
    (file,) = Folder(folder).weight_files(component)
    found = {key: read_tensor(entry) for key, entry in Folder(folder).entries(component).items()}
    save(file, change(found))


@pytest.fixture
def base(random_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to change."""
    return Path(shutil.copytree(random_folder, tmp_path / "base"))


@pytest.fixture(scope="module")
def linked(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("linked") / "onnx"
    write(Folder(random_folder), out)
    return out


@pytest.mark.parametrize("name", linker.NAMES)
def test_the_weights_are_those_that_the_exporter_itself_writes(
    linked: Path, random_folder: Path, tmp_path: Path, name: str
) -> None:
    """The map from tensors to initializers, proven: export with weights and with its own folding, match by value."""
    graph = next(each for each in graphs(Folder(random_folder)) if each.name == name)
    given = tracing.inputs(Folder(random_folder), graph, tracing.TRACED, 300, torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            load(Folder(random_folder), graph), tuple(given.values()), str(tmp_path / "model.onnx"),
            input_names=list(graph.inputs), output_names=list(graph.outputs), opset_version=linker.OPSET,
            dynamic_axes={**graph.inputs, **graph.outputs}, dynamo=False, do_constant_folding=True,
        )  # fmt: skip
    ours, theirs = stored(linked / name / "model.onnx"), stored(tmp_path / "model.onnx")
    found = [{(array.shape, array.tobytes()) for array in arrays.values()} for arrays in (ours, theirs)]
    assert found[0] == found[1]
    assert len(found[0]) > 20
    nodes = [
        Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)
        for file in (linked / name / "model.onnx", tmp_path / "model.onnx")
    ]
    for kind in ("MatMul", "Gemm", "Conv", "InstanceNormalization", "LayerNormalization", "Softmax", "Transpose"):
        assert nodes[0][kind] == nodes[1][kind], kind


def test_the_layout_and_what_the_manifest_says(linked: Path, random_folder: Path) -> None:
    told = read_manifest(linked)
    assert [told[key] for key in ("schema", "precision", "vae", "base")] == ["erasec.onnx/1", "fp32", "fp32", {}]
    assert set(told["graphs"]) == set(linker.NAMES)
    digests = {name: file["sha256"] for name, file in told["files"].items()}
    for name, graph in told["graphs"].items():
        assert set(graph["files"]) == {"model.onnx", BASE}
        digests |= {f"{name}/{file}": each["sha256"] for file, each in graph["files"].items()}
        assert graph["edited"] == []
    files = {name.as_posix() for name in Folder(linked).files()} - {linker.MANIFEST}
    assert digests == {name: file_digest(linked / name) for name in files}
    for name, component in (("text_encoder", "text_encoder"), ("vae_encoder", "vae")):
        kept = Folder(random_folder).config(component)
        assert Folder(linked).config(name).items() >= kept.items()


def test_one_tensor_begins_where_a_page_does(linked: Path) -> None:
    model = onnx.load(linked / "unet" / "model.onnx", load_external_data=False)
    places = [{item.key: item.value for item in tensor.external_data} for tensor in model.graph.initializer]
    assert len(places) > 100
    assert {int(place["offset"]) % linker.PAGE for place in places} == {0}
    ends = sorted((int(place["offset"]), int(place["offset"]) + int(place["length"])) for place in places)
    assert all(before[1] <= after[0] for before, after in pairwise(ends))


def test_edited_tensors_lie_apart(variant: Callable[..., Any], linked: Path) -> None:
    made = variant("a")
    told = read_manifest(made.onnx)
    assert told["base"] == made.origin.tensors
    assert len(told["base"]) == 14
    keys = {f"unet/{item['key']}" for item in told["graphs"]["unet"]["edited"]}
    assert keys == set(told["base"])
    assert [name for name in linker.NAMES if (made.onnx / name / EDITED).exists()] == ["unet"]
    assert right(made.folder, made.onnx)
    ours, others = stored(made.onnx / "unet" / "model.onnx"), stored(linked / "unet" / "model.onnx")
    moved = {name for name in ours if not np.array_equal(ours[name], others[name])}
    assert moved == {item["name"] for item in told["graphs"]["unet"]["edited"]}


def test_the_same_checkpoint_gives_the_same_bytes(random_folder: Path, linked: Path, tmp_path: Path) -> None:
    write(Folder(random_folder), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(linked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_another_dtype(
    base: Path, random_folder: Path, linked: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    for component in ("text_encoder", "unet", "vae"):
        resaved(base, component, lambda found: {key: tensor.to(dtype) for key, tensor in found.items()})
    write(Folder(base), tmp_path / "out")
    ours, theirs = (stored(root / "unet" / "model.onnx") for root in (tmp_path / "out", linked))
    assert {array.dtype for array in ours.values()} == {np.dtype(np.float32)}
    for name, array in ours.items():
        wanted = torch.from_numpy(theirs[name].copy()).to(dtype).float().numpy()
        assert np.array_equal(array, wanted), name
    # A float32 copy is the same numbers; bfloat16 rounds them, and is then compared with what it is.
    assert right(random_folder, tmp_path / "out") is (dtype == torch.float32)
    assert right(base, tmp_path / "out")


def test_a_checkpoint_in_shards(base: Path, linked: Path, tmp_path: Path) -> None:
    folder = base / "unet"
    entries = Folder(base).entries("unet")
    shards = [f"diffusion_pytorch_model-{number}-of-00002.safetensors" for number in ("00001", "00002")]
    where = {key: shards[place % 2] for place, key in enumerate(sorted(entries))}
    for shard in shards:
        save(folder / shard, {key: read_tensor(entry) for key, entry in entries.items() if where[key] == shard})
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    write(Folder(base), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(linked)


def older(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {key: key for key in found}
    for new, old in linker.OLDER.items():
        names = {key: name.replace(new, old) for key, name in names.items()}
    return {names[key]: tensor for key, tensor in found.items()}


def renamed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = linker.PREFIX
    return {key.removeprefix(prefix) if key.startswith(prefix) else prefix + key: each for key, each in found.items()}


@pytest.mark.parametrize(("component", "change"), [("vae", older), ("text_encoder", renamed)])
def test_names_of_older_libraries(
    base: Path, linked: Path, tmp_path: Path, component: str, change: Callable[..., Any]
) -> None:
    before = set(Folder(base).entries(component))
    resaved(base, component, change)
    assert set(Folder(base).entries(component)) != before
    write(Folder(base), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(linked)
    assert right(base, tmp_path / "out")


def test_a_tensor_that_is_not_there_is_not_made_up(base: Path, tmp_path: Path) -> None:
    resaved(base, "unet", lambda found: {key: each for key, each in found.items() if key != "conv_out.bias"})
    with pytest.raises(ErasecError, match=r"the checkpoint has no conv_out\.bias") as caught:
        write(Folder(base), tmp_path / "out")
    assert "random numbers" in caught.value.why


def test_a_tensor_of_another_shape_is_told(base: Path, tmp_path: Path) -> None:
    resaved(base, "unet", lambda found: found | {"conv_out.bias": torch.zeros(5)})
    with pytest.raises(ErasecError, match=r"conv_out\.bias is \(5,\)") as caught:
        write(Folder(base), tmp_path / "out")
    assert "(4,)" in caught.value.why


def test_what_float16_cannot_hold_is_told(base: Path, tmp_path: Path) -> None:
    key, names = "encoder.conv_in.weight", ("vae_encoder",)
    resaved(
        base, "vae", lambda found: {name: each.float() * (1e6 if name == key else 1) for name, each in found.items()}
    )
    with pytest.raises(ErasecError, match=r"encoder\.conv_in\.weight does not fit into float16") as caught:
        write(Folder(base), tmp_path / "out", names=names, vae="fp16")
    assert "largest number is" in caught.value.why
    assert "island" in caught.value.fix
    write(Folder(base), tmp_path / "islands", names=names, vae="fp16", islands=("*norm*", "*.conv_in"))
    assert stored(tmp_path / "islands" / "vae_encoder" / "model.onnx")[key].dtype == np.float32


def test_fp16_rounds_all_but_the_islands(random_folder: Path, linked: Path, tmp_path: Path) -> None:
    write(Folder(random_folder), tmp_path / "out", "fp16")
    for name in linker.NAMES:
        ours, theirs = (stored(root / name / "model.onnx") for root in (tmp_path / "out", linked))
        assert ours.keys() == theirs.keys()
        for key, array in ours.items():
            whole = "norm" in key or name.startswith("vae")
            assert array.dtype == (np.float32 if whole else np.float16), key
            assert np.array_equal(array, theirs[key].astype(array.dtype))
    assert right(random_folder, tmp_path / "out")
    assert [read_manifest(tmp_path / "out")[key] for key in ("precision", "vae")] == ["fp16", "fp32"]


def test_attention_that_overflows_is_an_island(base: Path, random_folder: Path) -> None:
    unet = next(each for each in graphs(Folder(base)) if each.name == "unet")
    assert linker.islands_of(Folder(base), unet, ("*norm*",)) == ("*norm*",)
    file = base / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "upcast_attention": True}))
    islands = linker.islands_of(Folder(base), unet, ("*norm*",))
    assert islands == ("*norm*", "*.attn1", "*.attn2")
    for graph in graphs(Folder(base)):
        if graph.name != "unet":
            assert linker.islands_of(Folder(base), graph, ()) == ()
    module = tracing.empty(Folder(base), unet, "fp16", islands, Extras())
    kinds = {name: each.dtype for name, each in module.named_parameters()}
    assert {each for name, each in kinds.items() if ".attn2." in name} == {torch.float32}
    assert {each for name, each in kinds.items() if ".ff." in name} == {torch.float16}


def test_a_base_is_shared_by_hard_links(variant: Callable[..., Any], random_folder: Path, tmp_path: Path) -> None:
    a, b = variant("a"), variant("b")
    out = tmp_path / "shared"
    write(Folder(b.folder), out, origin=b.origin, share=a.onnx)
    assert contents(out) == contents(b.onnx)
    for name in linker.NAMES:
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
            write(Folder(b.folder), tmp_path / "out", precision, ("unet",), origin=origin, share=a.onnx)
        assert words in caught.value.why
        shutil.rmtree(tmp_path / "out")
    with pytest.raises(ErasecError, match="cannot be shared"):
        write(Folder(b.folder), tmp_path / "out", origin=b.origin, share=linked)
    with pytest.raises(ErasecError, match="is no ONNX folder"):
        write(Folder(b.folder), tmp_path / "other", origin=b.origin, share=b.folder)


def test_a_shared_file_that_was_cut_is_told(variant: Callable[..., Any], tmp_path: Path) -> None:
    a, b = variant("a"), variant("b")
    cut = Path(shutil.copytree(a.onnx, tmp_path / "cut"))
    os.truncate(cut / "text_encoder" / BASE, 4096)
    with pytest.raises(ErasecError, match="cannot be shared") as caught:
        write(Folder(b.folder), tmp_path / "out", origin=b.origin, share=cut)
    assert "not as large" in caught.value.why


def test_linking_holds_a_few_tensors_at_a_time(random_folder: Path, tmp_path: Path) -> None:
    checkpoint = Folder(random_folder)
    unet = next(each for each in graphs(checkpoint) if each.name == "unet")
    made, entries = template(checkpoint, unet, "fp32", linker.OPSET), checkpoint.entries("unet")
    sizes = [4 * int(np.prod(weight.shape)) for weight in made.weights]
    tracemalloc.start()
    link(made, entries, tmp_path / "unet")
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
        save(tmp_path / "x.safetensors", {"a": torch.randn(3, 5, generator=draw, dtype=torch.float64).to(dtype)})
        (entry,) = read_header(tmp_path / "x.safetensors")[0].values()
        wanted = read_tensor(entry)
        assert np.array_equal(
            linker.array(entry), wanted.float().numpy() if dtype == torch.bfloat16 else wanted.numpy()
        )
        turned = replace(entry, shape=(5, 3), transposed=True)
        assert np.array_equal(linker.array(turned), read_tensor(turned).double().numpy())
    save(tmp_path / "x.safetensors", {"a": torch.arange(3)})
    with pytest.raises(ErasecError, match="stored as I64"):
        linker.array(*read_header(tmp_path / "x.safetensors")[0].values())


def test_an_embedding_with_new_tokens_lies_apart_so_that_the_base_can_be_shared(base: Path, tmp_path: Path) -> None:
    origin = Origin({"text_encoder": "0" * 64}, {})
    for name in ("a", "b"):
        extras.write(base, Extras((), {"<new>": torch.full((128,), float(ord(name)))}))
        share = None if name == "a" else tmp_path / "a"
        write(Folder(base), tmp_path / name, names=("text_encoder",), origin=origin, share=share)
        assert right(base, tmp_path / name)
    told = read_manifest(tmp_path / "b")
    assert told["carried"] == ["tokens"]
    (item,) = told["graphs"]["text_encoder"]["edited"]
    assert item["key"].endswith("token_embedding.weight")
    one, two = (tmp_path / name / "text_encoder" for name in ("a", "b"))
    assert (one / BASE).samefile(two / BASE)
    assert (one / EDITED).read_bytes() != (two / EDITED).read_bytes()


def test_an_island_is_of_one_component_and_of_no_component_it_is_told(random_folder: Path, tmp_path: Path) -> None:
    names = ("text_encoder", "unet")
    write(Folder(random_folder), tmp_path / "out", "fp16", names, islands=("*norm*", "mid_block"))
    ours = stored(tmp_path / "out" / "unet" / "model.onnx")
    whole = {key for key, array in ours.items() if array.dtype == np.float32}
    assert whole == {key for key in ours if "norm" in key or key.startswith("mid_block")}
    with pytest.raises(ErasecError, match=r"no module is named '\*nrom\*'") as caught:
        write(Folder(random_folder), tmp_path / "other", "fp16", names, islands=("*norm*", "*nrom*"))
    assert "such as *norm*" in caught.value.why
    write(Folder(random_folder), tmp_path / "fp32", "fp32", ("text_encoder",), islands=("*nrom*",))  # every module is


def test_rows_for_new_tokens_are_added_below() -> None:
    weight = Weight("w", "token_embedding.weight", (3, 2), (0, 1), (3, 2), "float32")
    table = np.arange(4, dtype=np.float32).reshape(2, 2)
    made = linker.laid_out(table, weight, [torch.tensor([8.0, 9.0])])
    assert made.tolist() == [[0, 1], [2, 3], [8, 9]]
    with pytest.raises(ErasecError, match="is "):
        linker.laid_out(table, weight)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no sound"),
        ("[]", "no sound"),
        ('{"schema": "erasec.onnx/9"}', "knows erasec.onnx/1"),
        ('{"schema": "erasec.onnx/1", "graphs": {"../x": {}}}', "no sound"),
        (None, "no sound"),
    ],
)
def test_a_manifest_that_is_none_is_told(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / linker.MANIFEST).write_text(content)
    with pytest.raises(ErasecError) as caught:
        read_manifest(tmp_path)
    assert words in caught.value.why
    assert caught.value.fix
