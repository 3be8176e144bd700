"""The judge classifier on small classifiers of colours: a folder in transformers' layout, and an ONNX file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from erasec.errors import ErasecError, MissingTool
from erasec.judges.classifier import DEFAULT, REVISION, Classifier
from erasec.recipe.concept import Concept, find

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
PICTURES = np.stack([np.full((48, 40, 3), rgb, dtype=np.uint8) for rgb in COLOURS.values()])
PREPARATION = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 32, "width": 32},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_normalize": True,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}


def colour(name: str, **row: Any) -> Concept:
    return Concept(name=name, erase=(name,), judge=(("classifier", tuple(row.items())),))


def write_folder(folder: Path, labels: tuple[str, ...], places: tuple[int, ...]) -> Path:
    """A small ResNet for the classes ``labels``; those at ``places`` are red, green and blue. Its body is random, and
    its head is solved for the three pictures."""
    from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16],
        depths=[1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: place for place, label in enumerate(labels)},
    )
    model = ResNetForImageClassification(config).eval()
    folder.mkdir(parents=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    prepare = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        features = model.resnet(prepare(list(PICTURES), return_tensors="pt")["pixel_values"]).pooler_output[:, :, 0, 0]
        wanted = torch.zeros(3, len(labels), dtype=torch.float64)
        wanted[range(3), places] = 10.0
        head = model.classifier[1]
        head.weight.copy_(torch.linalg.lstsq(features.double(), wanted).solution.T)
        head.bias.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("classifier") / "colours", tuple(COLOURS), (0, 1, 2))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with 1000 classes without names, to which red is 497, green 571 and blue 701."""
    labels = tuple(f"LABEL_{index}" for index in range(1000))
    return write_folder(tmp_path_factory.mktemp("classifier") / "imagenet", labels, (497, 571, 701))


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits that are the mean of each channel, with a file of labels and a preprocessor_config.json."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    shapes = (("pixels", ["n", 3, "h", "w"]), ("logits", ["n", 3]))
    pixels, logits = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes)
    model = helper.make_model(
        helper.make_graph(nodes, "colours", [pixels], [logits]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    path = tmp_path_factory.mktemp("onnx") / "colours.onnx"
    onnx.save(model, path)
    path.with_name("labels.txt").write_text("red\ngreen\nblue, azure\n")
    path.with_name("preprocessor_config.json").write_text(json.dumps(PREPARATION))
    return path


def judge_of(*concepts: Concept, **options: object) -> Classifier:
    judge = Classifier.for_concepts(concepts, options, explicit=True)
    assert judge is not None
    return judge


def of_onnx(path: Path, *concepts: Concept, **options: object) -> Classifier:
    return judge_of(*concepts, onnx=str(path), labels=str(path.with_name("labels.txt")), **options)


def test_a_folder_sees_each_colour_where_it_is_and_nowhere_else(folder: Path) -> None:
    judge = judge_of(*map(colour, COLOURS), folder=str(folder))
    for place, name in enumerate(COLOURS):
        assert judge.sees(PICTURES, [name] * 3).tolist() == [index == place for index in range(3)]
    assert not judge.sees(PICTURES, ["", "", ""]).any()


def test_an_onnx_file_sees_each_colour_where_it_is_and_nowhere_else(onnx_file: Path) -> None:
    judge = of_onnx(onnx_file, *map(colour, COLOURS))
    for place, name in enumerate(COLOURS):
        assert judge.sees(PICTURES, [name] * 3).tolist() == [index == place for index in range(3)]
    assert judge.title == "classifier colours.onnx, top-1"


def test_the_best_k_classes_count(onnx_file: Path) -> None:
    """In a picture that is mostly red and somewhat green, green is second and blue is last."""
    picture = np.full((1, 32, 32, 3), (200, 100, 20), dtype=np.uint8)
    judges = {top: of_onnx(onnx_file, colour("green"), colour("blue"), top=top) for top in (1, 2, 3)}
    assert [judges[top].sees(picture, ["green"])[0] for top in (1, 2, 3)] == [False, True, True]
    assert [judges[top].sees(picture, ["blue"])[0] for top in (1, 2, 3)] == [False, False, True]
    assert of_onnx(onnx_file, colour("green", top=2)).sees(picture, ["green"])[0]
    counts = judges[1].protocols(picture, "green")
    assert {name: values.tolist() for name, values in counts.items()} == {
        "top-1 (pictures)": [0],
        "top-5 (pictures)": [1],
    }


def test_bundled_objects_are_classes_of_imagenet(imagenet: Path) -> None:
    concepts = [find(name) for name in ("church", "gas-pump", "parachute", "tench")]
    judge = judge_of(*concepts, folder=str(imagenet))
    for place, name in enumerate(("church", "gas-pump", "parachute")):
        assert judge.sees(PICTURES, [name] * 3).tolist() == [index == place for index in range(3)]
    assert not judge.sees(PICTURES, ["tench"] * 3).any()


def test_an_index_means_nothing_to_another_classifier(folder: Path) -> None:
    """It goes by names there, and has no church."""
    with pytest.raises(ErasecError, match="classifier cannot see church") as caught:
        judge_of(find("church"), folder=str(folder))
    assert "there are: blue, green, red" in caught.value.why
    judge = judge_of(colour("church", index=497, label="Red"), folder=str(folder))
    assert judge.sees(PICTURES, ["church"] * 3).tolist() == [True, False, False]


def test_a_class_has_several_names(onnx_file: Path) -> None:
    judge = of_onnx(onnx_file, colour("azure"))
    assert judge.sees(PICTURES, ["azure"] * 3).tolist() == [False, False, True]


def test_without_weights_the_error_is_the_command_that_fetches_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingTool) as caught:
        Classifier.for_concepts([find("church")])
    assert caught.value.fix.startswith(f"hf download {DEFAULT} --revision {REVISION} ")
    assert Classifier.needs() == caught.value.fix


@pytest.mark.parametrize(
    ("lost", "match"), [("labels.txt", "no file .*labels.txt"), ("preprocessor_config.json", "no file .*preproc")]
)
def test_a_missing_file_is_an_error(onnx_file: Path, tmp_path: Path, lost: str, match: str) -> None:
    shutil.copytree(onnx_file.parent, tmp_path / "copy")
    (tmp_path / "copy" / lost).unlink()
    with pytest.raises(ErasecError) as caught:
        of_onnx(tmp_path / "copy" / "colours.onnx", colour("red"))
    caught.match("classifier lacks a file")
    assert lost in caught.value.why


def test_labels_of_another_number_are_an_error(onnx_file: Path, tmp_path: Path) -> None:
    shutil.copytree(onnx_file.parent, tmp_path / "copy")
    (tmp_path / "copy" / "labels.txt").write_text("red\ngreen\n")
    with pytest.raises(ErasecError, match="3 outputs and 2 classes"):
        of_onnx(tmp_path / "copy" / "colours.onnx", colour("red")).sees(PICTURES, ["red"] * 3)


def test_an_onnx_file_that_is_none_is_an_error(onnx_file: Path, tmp_path: Path) -> None:
    shutil.copytree(onnx_file.parent, tmp_path / "copy")
    (tmp_path / "copy" / "colours.onnx").write_bytes(b"no graph")
    with pytest.raises(ErasecError, match="cannot be read"):
        of_onnx(tmp_path / "copy" / "colours.onnx", colour("red")).sees(PICTURES, ["red"] * 3)


def test_a_folder_with_code_of_its_own_does_not_run_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForImageClassification"), "mine.Mine"),
    }
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    (tmp_path / "copy" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ErasecError, match="cannot be read"):
        judge_of(colour("red"), folder=str(tmp_path / "copy")).sees(PICTURES, ["red"] * 3)
    assert not (tmp_path / "ran").exists()


def test_the_digest_holds_weights_classes_and_k(onnx_file: Path, folder: Path) -> None:
    judges = [
        of_onnx(onnx_file, colour("red")),
        of_onnx(onnx_file, colour("red"), top=5),
        of_onnx(onnx_file, colour("blue")),
        judge_of(colour("red"), folder=str(folder)),
    ]
    assert len({judge.digest for judge in judges}) == 4
    assert judges[0].digest == of_onnx(onnx_file, colour("red")).digest
