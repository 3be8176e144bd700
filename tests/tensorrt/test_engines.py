"""Engines: a real one is built, and one that does not fit this machine is refused before it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from erasec.checkpoint.safetensors import file_digest
from erasec.errors import ErasecError, MissingTool
from erasec.tensorrt import devices, engines
from erasec.tensorrt.engines import (
    RTX,
    TRT,
    Builder,
    Session,
    build_engine,
    check_fits,
    check_runs_here,
    read_record,
    write_record,
)

onnx = pytest.importorskip("onnx")
PROFILE = {"x": [(1, 4), (2, 4), (3, 4)]}
VERSION = "1.7.1.116"


def graph(path: Path) -> Path:
    """y = x w in float32."""
    from onnx import helper, numpy_helper

    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    infos = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 4), ("y", 8))]
    weight = numpy_helper.from_array(np.arange(32, dtype=np.float32).reshape(4, 8), "w")
    opset = helper.make_opsetid("", 18)
    path.parent.mkdir(parents=True, exist_ok=True)
    inside = helper.make_graph([node], "g", infos[:1], infos[1:], [weight])
    onnx.save(helper.make_model(inside, opset_imports=[opset], ir_version=9), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose engine was never built: nothing here may load it."""
    file = tmp_path / "unet" / "model.engine"
    file.parent.mkdir()
    file.write_bytes(b"a program")
    entry = engines.engine_entry(file, ("graph", "weights"), PROFILE, 1.26)
    write_record(tmp_path, Builder(RTX), VERSION, {"unet": entry})
    return tmp_path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set what this machine has."""

    def set_(gpus: tuple[tuple[str, str], ...] = (("RTX 4090", "89"),), version: str = VERSION) -> None:
        monkeypatch.setattr(devices, "gpus", lambda: list(gpus))
        monkeypatch.setattr(engines, "version", lambda library: version)
        monkeypatch.setattr(engines, "require_library", lambda library: None)

    return set_


def changed(folder: Path, **fields: Any) -> None:
    engines.rewrite_record(folder, read_record(folder) | fields)


def test_the_record_describes_what_was_built(folder: Path) -> None:
    record = json.loads((folder / "engine.json").read_text())
    assert record == read_record(folder)
    assert record["builder"]["name"] == RTX and record["builder"]["version"] == VERSION
    assert record["capabilities"] == [] and not record["refit"]
    assert record["erasec"]
    assert record["components"]["unet"] == {
        "file": "unet/model.engine",
        "graph": "graph",
        "weights": "weights",
        "bytes": 9,
        "seconds": 1.3,
        "engine": file_digest(folder / "unet" / "model.engine"),
        "profile": {"x": {"min": [1, 4], "opt": [2, 4], "max": [3, 4]}},
    }


def test_the_record_of_tensorrt_has_the_gpu_that_it_was_built_on(folder: Path, here: Callable[..., None]) -> None:
    here(gpus=(("RTX 4090", "89"), ("A100", "80")))
    write_record(folder, Builder(TRT), "11.4.0.106", {})
    assert read_record(folder)["capabilities"] == ["89"]


@pytest.mark.parametrize("content", ["", "{}", '{"schema": "erasec.engines/1", "components": {"unet": {}}}', "[]"])
def test_a_damaged_record_is_refused(folder: Path, content: str) -> None:
    (folder / "engine.json").write_text(content)
    with pytest.raises(ErasecError, match="no folder of engines"):
        check_runs_here(folder)


def test_a_record_of_another_schema_is_refused(folder: Path) -> None:
    changed(folder, schema="erasec.engines/9")
    with pytest.raises(ErasecError, match=r"has the schema erasec\.engines/9"):
        read_record(folder)


def test_an_engine_for_this_machine_passes(folder: Path, here: Callable[..., None]) -> None:
    here()
    check_runs_here(folder)
    check_runs_here(folder, ("unet",))


def test_a_changed_or_missing_engine_is_refused(folder: Path, here: Callable[..., None]) -> None:
    here()
    (folder / "unet" / "model.engine").write_bytes(b"a Program")
    with pytest.raises(ErasecError, match=r"unet/model.engine is not the engine that was built") as caught:
        check_runs_here(folder)
    assert "sha256" in caught.value.why
    (folder / "unet" / "model.engine").unlink()
    with pytest.raises(ErasecError) as caught:
        check_runs_here(folder)
    assert caught.value.why == "the file is missing"


def test_one_error_lists_all_that_does_not_fit(folder: Path, here: Callable[..., None]) -> None:
    changed(folder, capabilities=["86", "120"])
    here(version="1.8.0")
    with pytest.raises(ErasecError, match="do not run on this machine") as caught:
        check_runs_here(folder)
    assert not isinstance(caught.value, MissingTool)
    assert "TensorRT-RTX 1.7.1.116, and 1.8.0 is installed" in caught.value.why
    assert "for compute capability 8.6 or 12.0, and this machine has RTX 4090 (8.9)" in caught.value.why
    assert "--target trt-rtx" in caught.value.fix and "--target onnx" in caught.value.fix


@pytest.mark.parametrize(
    ("capabilities", "gpu", "fits"),
    [([], "75", False), ([], "80", True), ([], "121", True), (["75"], "75", True), (["75", "80"], "89", False)],
)
def test_which_gpus_an_engine_is_for(
    folder: Path, here: Callable[..., None], capabilities: list[str], gpu: str, fits: bool
) -> None:
    changed(folder, capabilities=capabilities)
    here(gpus=(("GPU", gpu),))
    if fits:
        check_runs_here(folder)
    else:
        with pytest.raises(ErasecError, match="do not run") as caught:
            check_runs_here(folder)
        assert "compute capability" in caught.value.why


def test_an_engine_that_was_not_built_is_named(folder: Path, here: Callable[..., None]) -> None:
    here()
    with pytest.raises(ErasecError, match="no engine of vae_encoder") as caught:
        check_runs_here(folder, ("vae_encoder",))
    assert caught.value.why == "it has unet"


def test_without_a_gpu_a_session_is_an_error(
    folder: Path, here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(engines, "load_library", loaded.append)
    here(gpus=())
    with pytest.raises(MissingTool, match="do not run on this machine") as caught:
        Session(folder / "unet" / "model.engine")
    assert caught.value.why == "no NVIDIA GPU answers to nvidia-smi"
    assert loaded == []  # it ended before a library was asked for anything


def test_without_the_library_the_error_names_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in (RTX, "polygraphy") else object())
    with pytest.raises(MissingTool, match="trt-rtx needs polygraphy and tensorrt_rtx") as caught:
        check_runs_here(folder)
    assert caught.value.fix == 'pip install "erasec[trt-rtx]"'


def test_a_session_loads_the_file_that_was_checked_and_runs_what_fits(
    folder: Path, here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a runner that gives the engine's bytes back."""

    class Runner:
        def __init__(self, engine: bytes) -> None:
            self.engine, self.active = engine, False

        def activate(self) -> None:
            self.active = True

        def deactivate(self) -> None:
            self.active = False

        def infer(self, inputs: Any) -> dict[str, Any]:
            return {"y": np.frombuffer(self.engine, np.uint8)}

    library = ModuleType("polygraphy.backend.trt")
    vars(library).update(EngineFromBytes=lambda read: read(), TrtRunner=Runner)
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", library)
    monkeypatch.setattr(engines, "load_library", lambda library: None)
    here()
    (folder / "checked").write_bytes(b"a program")
    (folder / "unet" / "model.engine").write_bytes(b"another one")
    entry = read_record(folder)["components"]["unet"] | {"file": "checked"}
    changed(folder, components={"unet": entry})
    with Session(folder / "unet" / "model.engine") as session:
        assert session.run({"x": np.zeros((2, 4))})["y"].tobytes() == b"a program"
        with pytest.raises(ErasecError, match="does not take x of 4x4"):
            session.run({"x": np.zeros((4, 4))})
        assert session._runner.active
    assert not session._runner.active


def test_shapes_outside_the_profile_are_refused(folder: Path) -> None:
    record = read_record(folder)
    for shape in ((1, 4), (3, 4)):
        check_fits("unet", record, {"x": np.zeros(shape)})
    for shape in ((4, 4), (1, 5), (1, 4, 1)):
        with pytest.raises(ErasecError, match="does not take x of " + "x".join(map(str, shape))) as caught:
            check_fits("unet", record, {"x": np.zeros(shape)})
        assert caught.value.why == "it was built for 1x4 to 3x4"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A graph and its engine, in float32."""
    pytest.importorskip(RTX)
    pytest.importorskip("polygraphy")
    root = tmp_path_factory.mktemp("built")
    file = root / "out" / "unet" / "model.engine"
    entry, library = build_engine(graph(root / "model.onnx"), file, PROFILE, Builder(RTX, ("80", "89"), workspace=64))
    write_record(root / "out", Builder(RTX, ("80", "89"), 64), library, {"unet": entry})
    return root / "model.onnx", root / "out"


def test_a_real_engine_is_built_without_a_gpu(built: tuple[Path, Path]) -> None:
    record = read_record(built[1])
    entry = record["components"]["unet"]
    file = built[1] / "unet" / "model.engine"
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.engine"]
    assert np.arange(8, 16, dtype=np.float32).tobytes() in file.read_bytes()
    assert entry["bytes"] == file.stat().st_size and entry["engine"] == file_digest(file)
    assert (entry["graph"], entry["weights"]) == engines.digests(built[0])
    assert record["capabilities"] == ["80", "89"] and record["workspace"] == 64
    assert record["builder"]["version"] == engines.version(RTX)


def test_a_real_engine_is_not_loaded_where_there_is_no_gpu(built: tuple[Path, Path], here: Callable[..., None]) -> None:
    here(gpus=(), version=read_record(built[1])["builder"]["version"])
    with pytest.raises(MissingTool, match="do not run on this machine"):
        Session(built[1] / "unet" / "model.engine")


def test_the_error_of_a_build_has_the_librarys_message(built: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="TensorRT-RTX could not build") as caught:
        build_engine(built[0], tmp_path / "model.engine", {"z": PROFILE["x"]}, Builder(RTX))
    assert "'z'" in caught.value.why and "{'x'}" in caught.value.why
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_killed_build_names_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    with pytest.raises(ErasecError) as caught:
        build_engine(graph(tmp_path / "unet" / "model.onnx"), tmp_path / "e" / "model.engine", PROFILE, Builder(RTX))
    assert "killed by signal 9" in caught.value.why
    assert "more memory" in caught.value.fix


def test_one_process_uses_one_library(tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text("__version__ = '11.4.0'")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "from erasec import errors\nfrom erasec.tensorrt import engines\n"
        "print(engines.load_library(engines.TRT).__version__)\n"
        "try:\n    engines.load_library(engines.RTX)\nexcept errors.ErasecError as error:\n    print(error.what)\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-3:] == [
        "11.4.0",
        "this process already uses another library than TensorRT-RTX",
        "False",
    ]


@pytest.mark.gpu
def test_an_engine_computes_what_its_graph_does(tmp_path: Path) -> None:
    file = tmp_path / "out" / "unet" / "model.engine"
    entry, library = build_engine(graph(tmp_path / "model.onnx"), file, PROFILE, Builder(RTX))
    write_record(tmp_path / "out", Builder(RTX), library, {"unet": entry})
    x = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    with Session(file) as session:
        outputs = session.run({"x": x})
    np.testing.assert_allclose(outputs["y"], x @ np.arange(32, dtype=np.float32).reshape(4, 8), rtol=1e-2, atol=1e-2)
