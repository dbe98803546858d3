"""The examples of docs/models.md: every model.yaml is right, every result what the head gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from conftest import ROOT
from modelfolder import JOB

from evmp.export import Request
from evmp.head import open_head, open_text_reader
from evmp.job import load_job
from evmp.model.package import ModelPackage, load_package
from evmp.value import ModelType

SECTIONS = re.split(r"^## `(\w+)`$", (ROOT / "docs/models.md").read_text(), flags=re.MULTILINE)
TEXTS = dict(zip(SECTIONS[1::2], SECTIONS[2::2], strict=True))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

LINE = np.zeros((1, 80, 100))
LINE[0, 20:31, 10:51] = 0.9
STEPS = np.eye(5)[[0, 1, 1, 2, 4, 0, 3]] * [[1], [1], [1], [0.875], [1], [1], [0.875]]
TOKENS = np.log(21) * np.eye(4)[[[1, 2, 3, 0]]]  # each with a probability of 21 / 24
CORNERS = [[[0.25, 0.2], [0.5, 0.2], [0.5, 0.3], [0.25, 0.3]]]

# What the model of an example returns, and the size of the image.
OUTPUTS: dict[str, dict[str, Any]] = {
    "classifier": {"0": [1, 3, 2]},
    "multilabel_classifier": {"0": [-1, 2, 0]},
    "feature_extractor": {"layer4": np.arange(8).reshape(2, 2, 2) * 2 - 0.5, "logits": [1, 2]},
    "detector": {"boxes": [[64, 144, 192, 208]] * 2, "labels": [3, 1], "scores": [0.75, 0.4]},
    "text_detector": {"map": LINE},
    "text_recognizer": {"0": STEPS},
    "text_spotter": {"0": CORNERS, "1": [0.75], "2": TOKENS},
    "segmentor": {"out": [[[2, 0]], [[0, 1]]]},
}
SIZE = (400, 500)


def blocks(model_type: str, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(TEXTS[model_type]) if kind == language]


def package_of(text: str, folder: Path) -> ModelPackage:
    folder.mkdir(exist_ok=True)
    if yaml.safe_load(text)["model_type"] == "text_detection_recognition":
        for part in ("detector", "recognizer"):
            package_of(blocks(f"text_{part}", "yaml")[0], folder / part)
    (folder / yaml.safe_load(text).get("weights", "model.pt")).touch()
    (folder / "model.yaml").write_text(text)
    return load_package(folder)


def test_the_way_from_a_download_to_a_result_is_right(tmp_path: Path, torchvision: Any) -> None:
    from evmp.export.torchvision import draft_of_torchvision

    package, job = (text for kind, text in BLOCK.findall(SECTIONS[0]) if kind == "yaml")
    draft = draft_of_torchvision(Request("torchvision:resnet50", weights="none"))
    (tmp_path / "job.yaml").write_text(job)

    spec = {**draft.spec, "weights": draft.weights, "output": {"labels": "labels.txt"}}
    assert yaml.safe_load(package) == spec
    assert load_job(tmp_path / "job.yaml").model_type == "classifier"
    for name in re.findall(r"evmp export torchvision:(\w+)", SECTIONS[0]):
        assert name in torchvision.models.list_models()


def test_every_type_has_a_section() -> None:
    assert sorted([*TEXTS, "self_define"]) == sorted(get_args(ModelType))


@pytest.mark.parametrize("model_type", TEXTS)
def test_every_model_yaml_is_right(tmp_path: Path, model_type: str) -> None:
    for text in blocks(model_type, "yaml"):
        assert package_of(text, tmp_path).model_type == model_type


@pytest.mark.parametrize("model_type", OUTPUTS)
def test_every_result_is_what_comes_out(tmp_path: Path, model_type: str) -> None:
    package = package_of(blocks(model_type, "yaml")[0], tmp_path)
    head = open_head(package, SimpleNamespace(**{**JOB, "feature_name": "layer4"}))
    outputs = {k: np.asarray(v, np.float32) for k, v in OUTPUTS[model_type].items()}

    head.check([outputs])
    (result,) = head.results([outputs], [SIZE])

    (expected,) = blocks(model_type, "json")
    assert told(result) == told(expected)
    assert list(told(result)) == list(told(expected))


def test_the_result_of_two_models_is_what_comes_out(tmp_path: Path) -> None:
    model_type = "text_detection_recognition"
    reader = open_text_reader(package_of(blocks(model_type, "yaml")[0], tmp_path))
    find, read = ({"0": np.asarray(it, np.float32)} for it in (LINE, STEPS))

    lines = reader.lines([find], [np.zeros((*SIZE, 3), np.uint8)])
    (result,) = reader.results(lines, [read], 1)

    (expected,) = blocks(model_type, "json")
    assert told(result) == told(expected)
    assert list(told(result)) == list(told(expected))


def told(text: str | bytes) -> dict[str, Any]:
    """Read a result; where lines are is calculated in steps of a thousandth of a pixel."""
    result: dict[str, Any] = json.loads(text, parse_float=lambda number: round(float(number), 2))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["feature_extractor", "detector", "segmentor"])
def test_every_export_gives_a_model_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torchvision: Any, model_type: str
) -> None:
    from evmp.model import open_model

    monkeypatch.chdir(tmp_path)
    (code,) = blocks(model_type, "python")
    exec(
        code.replace('"DEFAULT"', "None, weights_backbone=None" if "resnet" not in code else "None")
    )
    spec = yaml.safe_load(blocks(model_type, "yaml")[0])
    for name in ("labels", "label_offset"):
        spec.get("output", {}).pop(name, None)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(spec))
    package = load_package(tmp_path)

    head = open_head(package, SimpleNamespace(**{**JOB, "feature_name": "layer4"}))
    outputs = open_model(package, "cpu", 1, 1).warm_up()
    head.check(outputs)

    assert head.results(outputs, [SIZE])
