"""Target trt with a fake TensorRT and no GPU: the settings of the builder, the record, and refitting."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erasec.checkpoint.safetensors import file_digest
from erasec.errors import ErasecError, MissingTool
from erasec.graphs.weights import digests, weight_digests
from erasec.options import configure
from erasec.targets.trt import Trt, refit
from erasec.tensorrt import devices, engines
from erasec.tensorrt.engines import RTX, TRT, Builder, read_record, write_record

onnx = pytest.importorskip("onnx")
pytest.importorskip("polygraphy")

# The part of TensorRT that Polygraphy calls. An engine is a log of the calls that built it; its weights are
# those of the ONNX file that it parsed.
FAKE = '''
import enum, json, os
import onnx
from onnx import numpy_helper

__version__ = os.environ.get("FAKE_TENSORRT", "11.4.0.106")

class Flags(enum.IntEnum):
    TF32 = 0
    REFIT = 1
BuilderFlag = Flags
class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1
class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0
class ProfilingVerbosity(enum.IntEnum):
    DETAILED = 2
class DeviceType(enum.IntEnum):
    GPU = 0
    DLA = 1
class SerializationFlag(enum.IntEnum):
    INCLUDE_REFIT = 2
class ILogger:
    pass
class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
    def __init__(self, severity=None):
        pass

def init_libnvinfer_plugins(logger, name):
    return True

class Tensor:
    is_shape_tensor, dtype = False, None
    def __init__(self, info):
        self.name = info.name
        self.shape = tuple(dim.dim_value or -1 for dim in info.type.tensor_type.shape.dim)

class Network:
    def __init__(self, log):
        self.log, self.inputs = log, []
    def __iter__(self):
        return iter(())
    num_inputs = property(lambda self: len(self.inputs))
    def get_input(self, index):
        return self.inputs[index]

class OnnxParser:
    num_errors = 0
    def __init__(self, network, logger):
        self.network = network
    def parse_from_file(self, path):
        model = onnx.load(path).graph
        self.network.inputs = [Tensor(info) for info in model.input]
        weights = {each.name: numpy_helper.to_array(each).tobytes().hex() for each in model.initializer}
        self.network.log.update(parsed=path, weights=weights)
        return True

class Profile:
    def __init__(self):
        self.shapes = {}
    def set_shape(self, name, *shapes):
        self.shapes[name] = shapes

class Cache:
    def __init__(self, data):
        self.data = data
    def combine(self, other, ignore_mismatch):
        self.data = other.data + self.data
        return True
    def serialize(self):
        return memoryview(self.data + b"timed ")

class Config:
    num_optimization_profiles, DLA_core, default_device_type = 1, -1, DeviceType.GPU
    def __init__(self, log):
        self.log = log
        log.update(flags=[], profiles=[], pools={}, cache="")
    def set_flag(self, flag):
        self.log["flags"].append(flag.name)
    def get_flag(self, flag):
        return flag.name in self.log["flags"]
    def clear_flag(self, flag):
        self.log.setdefault("cleared", []).append(flag.name)
    def add_optimization_profile(self, profile):
        self.log["profiles"].append(profile.shapes)
    def set_memory_pool_limit(self, pool, size):
        self.log["pools"][pool.name] = size
    def create_timing_cache(self, data):
        return Cache(bytes(data))
    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        self.log["cache"] = cache.data.decode()
    def get_timing_cache(self):
        return self.cache

class Builder:
    def __init__(self, logger):
        self.log = {"version": __version__}
    def create_network(self, flags=0):
        self.log["network"] = flags
        return Network(self.log)
    def create_builder_config(self):
        return Config(self.log)
    def create_optimization_profile(self):
        return Profile()
    def build_serialized_network(self, network, config):
        return json.dumps(self.log).encode()

class Engine:
    def __init__(self, log):
        self.log = log
    def create_serialization_config(self):
        return Serialization()
    def serialize_with_config(self, config):
        assert config.flags == [SerializationFlag.INCLUDE_REFIT]
        return json.dumps(self.log).encode()

class Serialization:
    def __init__(self):
        self.flags = []
    def set_flag(self, flag):
        self.flags.append(flag)

class Runtime:
    def __init__(self, logger):
        pass
    broken = False
    def deserialize_cuda_engine(self, data):
        return None if self.broken else Engine(json.loads(bytes(data)))

class Weights:
    def __init__(self, array):
        self.data = array.tobytes().hex()

class Refitter:
    """The bias is fused with the weight: who sets one must set the other."""
    fixed, stubborn, unwilling = set(), set(), set()
    def __init__(self, engine, logger):
        self.engine, self.set = engine, {}
    def get_all_weights(self):
        return [name for name in self.engine.log["weights"] if name not in self.fixed]
    def set_named_weights(self, name, weights):
        self.set[name] = weights.data
        return name not in self.unwilling
    def get_missing_weights(self):
        fused = {"b"} if "w" in self.set else set()
        return sorted((fused | self.stubborn) - self.set.keys())
    def refit_cuda_engine(self):
        self.engine.log["weights"].update(self.set)
        self.engine.log["last"] = sorted(self.set)
        return True
'''
PROFILE = {"x": [(1, 4), (2, 4), (3, 4)]}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A machine with a GPU and with TensorRT, neither of which is real; the folder of its nvidia-smi."""
    root = tmp_path_factory.mktemp("machine")
    library, programs = root / "library" / "tensorrt", root / "programs"
    library.mkdir(parents=True)
    programs.mkdir()
    (library / "__init__.py").write_text(FAKE)
    answers(programs, "echo 'NVIDIA L4, 8.9'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(programs), prepend=":")
        patch.setenv("PYTHONPATH", str(library.parent), prepend=":")
        patch.syspath_prepend(str(library.parent))
        yield programs
    sys.modules.pop("tensorrt", None)


def answers(programs: Path, line: str) -> None:
    (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{line}\n")
    (programs / "nvidia-smi").chmod(0o755)


def graph(path: Path, w: float = 1.0, b: float = 2.0, operation: str = "Add") -> Path:
    """y = x w + b"""
    from onnx import helper, numpy_helper

    nodes = [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node(operation, ["xw", "b"], ["y"])]
    infos = [helper.make_tensor_value_info(name, 1, ["n", 4]) for name in ("x", "y")]
    arrays = {"w": np.full((4, 4), w, np.float32), "b": np.full(4, b, np.float32), "rest": np.zeros(1, np.float32)}
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    inside = helper.make_graph(nodes, "g", infos[:1], infos[1:], weights)
    onnx.save(helper.make_model(inside, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def built(folder: Path, source: Path, target: Trt) -> Path:
    """A folder with one engine, as the target makes it."""
    file = folder / "unet" / "model.engine"
    entry, library = target.engine(source, file, PROFILE)
    write_record(folder, target.builder(), library, {"unet": entry})
    return file


@pytest.fixture(scope="module")
def refittable(machine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refittable")
    built(root / "out", graph(root / "g.onnx"), Trt(refit=True))
    return root / "out"


@pytest.fixture
def file(refittable: Path, tmp_path: Path) -> Path:
    """A refittable engine of the plain ``graph``, for a test to change."""
    return Path(shutil.copytree(refittable, tmp_path / "out")) / "unet" / "model.engine"


def test_the_builder_gets_the_options(machine: Path, tmp_path: Path) -> None:
    cache = tmp_path / "times"
    file = built(tmp_path / "out", graph(tmp_path / "g.onnx"), Trt(workspace=3, timing_cache=str(cache)))
    log = json.loads(file.read_bytes())
    assert log["version"] == "11.4.0.106"
    assert log["network"] == 1 << 1  # strongly typed
    assert log["parsed"] == str(tmp_path / "g.onnx")
    assert log["flags"] == [] and log["cleared"] == ["TF32"]
    assert log["profiles"] == [{"x": [list(shape) for shape in PROFILE["x"]]}]
    assert log["pools"] == {"WORKSPACE": 3 << 20}
    assert log["cache"] == "" and cache.read_bytes() == b"timed "
    record = read_record(tmp_path / "out")
    assert record["builder"]["name"] == TRT and record["builder"]["version"] == "11.4.0.106"
    assert record["capabilities"] == ["89"] and not record["refit"]
    assert "initializers" not in record["components"]["unet"]


def test_the_next_build_reads_the_timing_cache(machine: Path, tmp_path: Path) -> None:
    target, source = Trt(timing_cache=str(tmp_path / "times")), graph(tmp_path / "g.onnx")
    built(tmp_path / "first", source, target)
    log = json.loads(built(tmp_path / "second", source, target).read_bytes())
    assert log["cache"] == "timed "


def test_a_timing_cache_may_lie_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Trt(timing_cache="~/times").builder().timing_cache == str(tmp_path / "times")
    assert Trt().builder().timing_cache == ""


def test_only_a_refittable_engine_undoes_an_erasure() -> None:
    assert not Trt().how_to_undo() and "before the erasure" in Trt(refit=True).how_to_undo()


def test_an_engine_can_be_refitted_only_on_request(machine: Path, file: Path, tmp_path: Path) -> None:
    assert json.loads(file.read_bytes())["flags"] == ["REFIT"]
    record = read_record(tmp_path / "out")
    assert record["refit"]
    assert record["components"]["unet"]["initializers"] == weight_digests(graph(tmp_path / "g.onnx"))
    plain = built(tmp_path / "plain", graph(tmp_path / "g.onnx"), Trt())
    assert json.loads(plain.read_bytes())["flags"] == []
    with pytest.raises(ErasecError, match="cannot be refitted") as caught:
        refit(plain, graph(tmp_path / "other.onnx", w=5.0))
    assert "un-erased" in caught.value.why


def test_a_refit_and_back_is_the_same_engine(file: Path, tmp_path: Path) -> None:
    a, b = graph(tmp_path / "a.onnx"), graph(tmp_path / "b.onnx", w=5.0)
    before = json.loads(file.read_bytes())["weights"]
    assert refit(file, b) == ("w",)
    log = json.loads(file.read_bytes())
    assert log["weights"]["w"] == np.full((4, 4), 5.0, np.float32).tobytes().hex()
    assert log["last"] == ["b", "w"]  # what is fused with it was set too
    entry = read_record(tmp_path / "out")["components"]["unet"]
    assert entry["engine"] == file_digest(file) and entry["refitted"] == ["w"]
    assert (entry["graph"], entry["weights"]) == digests(b)
    engines.check_runs_here(tmp_path / "out")
    assert refit(file, a) == ("w",)
    assert json.loads(file.read_bytes())["weights"] == before
    assert read_record(tmp_path / "out")["components"]["unet"]["weights"] == digests(a)[1]


def test_every_refit_sets_all_that_was_ever_refitted(file: Path, tmp_path: Path) -> None:
    a, b, c = graph(tmp_path / "a"), graph(tmp_path / "b", w=5.0), graph(tmp_path / "c", w=5.0, b=7.0)
    assert refit(file, b) == ("w",)
    assert refit(file, c) == ("b", "w")
    assert refit(file, a) == ("b", "w")
    assert json.loads(file.read_bytes())["weights"]["b"] == np.full(4, 2.0, np.float32).tobytes().hex()


def test_another_graph_is_not_refitted(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(ErasecError, match="built from another graph"):
        refit(file, graph(tmp_path / "b", operation="Mul"))
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("trouble", "what"),
    [
        ("fixed", "TensorRT cannot refit w"),
        ("unwilling", "does not take other weights for w"),
        ("stubborn", "could not refit"),
        ("broken", "could not load the engine"),
    ],
)
def test_a_failed_refit_leaves_the_engine_unchanged(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, what: str
) -> None:
    before = file.read_bytes(), read_record(tmp_path / "out")
    part = engines.load_library(TRT).Runtime if trouble == "broken" else engines.load_library(TRT).Refitter
    monkeypatch.setattr(part, trouble, {"none there" if trouble == "stubborn" else "w"})
    with pytest.raises(ErasecError, match=what):
        refit(file, graph(tmp_path / "b", w=5.0))
    assert (file.read_bytes(), read_record(tmp_path / "out")) == before


def test_an_engine_of_another_library_is_not_refitted(tmp_path: Path) -> None:
    file = tmp_path / "unet" / "model.engine"
    file.parent.mkdir()
    file.write_bytes(b"a program")
    entry = engines.engine_entry(file, ("", ""), PROFILE, 1.0) | {"initializers": {}}
    write_record(tmp_path, Builder(RTX, refit=True), "1.7.1", {"unet": entry})
    with pytest.raises(ErasecError, match="cannot be refitted"):
        refit(file, graph(tmp_path / "g.onnx"))


def test_the_version_that_may_drop_a_bias_makes_no_refittable_engines(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trt(refit=True).check()
    monkeypatch.setattr(engines, "version", lambda library: "11.3.0.99")
    Trt().check()
    with pytest.raises(ErasecError, match=r"engines of TensorRT 11\.3\.0\.99 may compute wrong outputs") as caught:
        Trt(refit=True).check()
    assert "bias" in caught.value.why and "11.4" in caught.value.fix
    record = read_record(tmp_path / "out")
    record["builder"]["version"] = "11.3.0.99"
    engines.rewrite_record(tmp_path / "out", record)
    with pytest.raises(ErasecError, match="may compute wrong outputs"):
        refit(file, graph(tmp_path / "b", w=5.0))


def test_a_missing_tensorrt_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[str], Any] = lambda name: None if name == TRT else object()  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", find)
    with pytest.raises(MissingTool, match="trt needs tensorrt") as caught:
        Trt().check()
    for words in ('pip install "erasec[trt]"', "--target trt-rtx", "--target onnx"):
        assert words in caught.value.fix


def test_a_missing_gpu_is_an_error(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trt().check()
    monkeypatch.setattr(devices, "gpus", list)
    with pytest.raises(MissingTool, match="trt needs an NVIDIA GPU") as caught:
        Trt().check()
    assert "--target trt-rtx" in caught.value.fix and "--target onnx" in caught.value.fix


def test_an_old_tensorrt_is_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "version", lambda library: "8.6.1")
    with pytest.raises(MissingTool, match="TensorRT 10 or later"):
        Trt().check()


def test_it_has_the_options_of_both_and_its_own() -> None:
    target = configure(Trt, {"refit": True, "batch": "1:2:4", "precision": "fp32"}, "trt")
    assert target.builder() == Builder(TRT, refit=True)
    assert not Trt().refit
    with pytest.raises(ErasecError, match="no option 'capabilities'"):
        configure(Trt, {"capabilities": "80"}, "trt")


@pytest.mark.gpu
def test_a_real_engine_computes_and_is_refitted(tmp_path: Path) -> None:
    Trt(refit=True).check()
    x = np.random.default_rng(0).standard_normal((2, 4), np.float32)

    def computed(file: Path) -> Any:
        with engines.Session(file) as session:
            return session.run({"x": x})["y"]

    a, b = graph(tmp_path / "a.onnx"), graph(tmp_path / "b.onnx", w=5.0)
    file = built(tmp_path / "out", a, Trt(refit=True))
    first = computed(file)
    np.testing.assert_allclose(first, x @ np.ones((4, 4)) + 2, rtol=1e-3)
    refit(file, b)
    np.testing.assert_allclose(computed(file), x @ np.full((4, 4), 5.0) + 2, rtol=1e-3)
    refit(file, a)
    np.testing.assert_array_equal(computed(file), first)
