from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from evmp.errors import ConfigError, ModelError
from evmp.model.package import ModelPackage, check_model_type, load_package

WHOLE = """\
weights: sub/net.ts
precision: bf16
input:
  size: dynamic
  height: 320
  width: "400"
  min_height: 80
  min_width: 400
  multiple_of: 16
  enlarge_to: 100
  resize: letterbox
  interpolation: bicubic
  pad_color: [1, 2, 3]
  align: start
  color_order: bgr
  scale: 1/128
  mean: [1, 1, 1]
  std: [2, 2, 2]
output:
  activation: sigmoid
  labels: [cat, dog]
  label_offset: 1
"""


def make(folder: Path, model_yaml: str | None = "model_type: classifier\n", **files: str) -> Path:
    """Write a package; files are named with `_` for the dot."""
    folder.mkdir(exist_ok=True)
    (folder / "model.pt").write_bytes(b"weights")
    if model_yaml is not None:
        (folder / "model.yaml").write_text(model_yaml, "utf-8")
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content, "utf-8")
    return folder


def load(
    folder: Path, model_yaml: str, model_type: str = "classifier", **files: str
) -> ModelPackage:
    text = f"model_type: {model_type}\n{model_yaml}"
    return load_package(make(folder / "model", text, **files))


def problems(folder: Path, model_yaml: str, **options: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, model_yaml, **options)
    return str(caught.value).replace(f"{folder}/model/", "").splitlines()


def test_the_defaults_are_torchvisions_for_imagenet(tmp_path: Path) -> None:
    package = load_package(make(tmp_path / "model"))

    assert package.weights == tmp_path / "model" / "model.pt"
    assert (package.model_type, package.precision, package.labels) == ("classifier", "fp32", ())
    assert (package.input.height, package.input.width) == (224, 224)
    assert (package.input.resize, package.input.short_side) == ("short_side", 256)
    assert package.input.scale == 1 / 255
    assert package.input.mean == (0.485, 0.456, 0.406)
    assert package.input.std == (0.229, 0.224, 0.225)
    assert package.activation == "softmax"


def test_a_single_pt_file_is_a_package_with_the_defaults(tmp_path: Path) -> None:
    with_yaml = load_package(make(tmp_path / "model")).fingerprint()
    (tmp_path / "model" / "model.yaml").unlink()
    (tmp_path / "model" / "model.pt").rename(tmp_path / "model" / "resnet.pt")

    for path in (tmp_path / "model", tmp_path / "model" / "resnet.pt"):
        package = load_package(path)
        assert package.weights == tmp_path / "model" / "resnet.pt"
        assert package.fingerprint() == with_yaml


def test_a_model_yaml_beside_the_named_weights_counts(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "model_type: classifier\ninput: {height: 32}\n", v2_pt="v2")

    package = load_package(folder / "v2.pt")

    assert package.input.height == 32
    assert package.weights == folder / "v2.pt"


def test_everything_that_may_be_said_is_read(tmp_path: Path) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "sub" / "net.ts").touch()

    package = load(tmp_path, WHOLE)

    assert package.weights == tmp_path / "model" / "sub" / "net.ts"
    assert package.precision == "bf16"
    assert package.input.model_dump() == {
        "size": "dynamic",
        "height": 320,
        "width": 400,
        "min_height": 80,
        "min_width": 400,
        "multiple_of": 16,
        "enlarge_to": 100,
        "resize": "letterbox",
        "resize_size": 0,
        "interpolation": "bicubic",
        "pad_color": (1, 2, 3),
        "align": "start",
        "color_order": "bgr",
        "scale": 1 / 128,
        "mean": (1.0, 1.0, 1.0),
        "std": (2.0, 2.0, 2.0),
    }
    assert package.class_names(3) == ("background", "cat", "dog")


@pytest.mark.parametrize(
    ("height", "width", "given", "short_side"),
    [(224, 224, 0, 256), (224, 224, 224, 224), (299, 299, 0, 342), (64, 128, 0, 146)],
)
def test_the_short_side_keeps_the_usual_proportion(
    tmp_path: Path, height: int, width: int, given: int, short_side: int
) -> None:
    text = f"input: {{height: {height}, width: {width}, resize_size: {given}}}\n"

    assert load(tmp_path, text).input.short_side == short_side


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("wieghts: x", "wieghts: unknown key, did you mean weights?"),
        ("input: 5", "input: got 5, expected a mapping"),
        ("input: {heigth: 5}", "input.heigth: unknown key, did you mean height?"),
        ("input: {height: 0}", "input.height: got 0, expected an integer from 1 to 8192"),
        ("input: {resize: crop}", 'input.resize: got "crop", expected short_side, stretch or let'),
        ("input: {resize_size: 200}", "input.resize_size: got 200, expected 0 or at least 224, th"),
        ("input: {mean: [1, 2]}", "input.mean: got [1, 2], expected a list of 3 numbers"),
        ("input: {mean: [1, 2, 3, 4]}", "input.mean: got [1, 2, 3, 4], expected a list of 3 numb"),
        ("input: {mean: 0.5}", "input.mean: got 0.5, expected a list of 3 numbers"),
        ("input: {mean: [1, x, 3]}", 'input.mean[1]: got "x", expected a number'),
        ("input: {std: [1, 0, 1]}", "input.std[1]: got 0, expected a number above 0"),
        ("input: {scale: 1/0}", 'input.scale: got "1/0", expected a number or a fraction such as'),
        ("input: {scale: .inf}", "input.scale: got Infinity, expected a number"),
        ("input: {pad_color: [0, 0, 256]}", "input.pad_color[2]: got 256, expected an integer fr"),
        ("input: {pad_color: [0, 0, 9]}", "input.pad_color: set with resize: short_side, expect"),
        ("input: {resize: stretch, resize_size: 256}", "input.resize_size: set with resize: stre"),
        ("input: {align: start}", "input.align: set with resize: short_side, expected only with l"),
        ("input: {multiple_of: 8}", "input.multiple_of: set with size: fixed, expected only with"),
        ("input: {size: dynamic, width: 90}", "input.width: got 90, expected a multiple of mult"),
        ("input: {size: dynamic, min_width: 9}", "input.min_width: got 9, expected a multiple of"),
        ("input: {size: dynamic, min_width: 320}", "input.min_width: got 320, expected at most w"),
        ("input: {size: dynamic, resize_size: 31}", "input.resize_size: got 31, expected 0 or at"),
        ("input: {size: dynamic, enlarge_to: 9}", "input.enlarge_to: set with resize: short_side"),
        ("output: {label_offset: 1}", "output.label_offset: set without labels, expected labels"),
        ("output: {labels: [a, 5]}", 'output.labels: got ["a", 5], expected text or a list'),
        ("output: {labels: no.txt}", "output.labels: no.txt: cannot be read: no such file"),
        ("output: {labels: ../labels.txt}", 'output.labels: got "../labels.txt", expected a file'),
        (
            "output: {activation: relu}",
            'output.activation: got "relu", expected auto, softmax, sig',
        ),
        ("output: {names: [a, a]}", 'output.names: got ["a", "a"], expected names that differ'),
        ("output: {names: {a: x, b: x}}", 'output.names: got ["x", "x"], expected names that diff'),
        ("output: {names: 5}", "output.names: got 5, expected a list or a mapping"),
        ("output: {pooling: flatten}", "output.pooling: set with model_type: classifier, expected"),
        ("output: {boxes: {layout: separate, unit: pixels}}", 'output.boxes.unit: got "pixels", e'),
        ("output: {boxes: {unit: fraction}}", "output.boxes: set with model_type: classifier, exp"),
        ("weights: /etc/passwd", 'weights: got "/etc/passwd", expected a file inside the package'),
        ("weights: a/../../b", 'weights: got "a/../../b", expected a file inside the package'),
        ("weights: b.pt", 'weights: "b.pt" is not a file in '),
        ("precision: int8", 'precision: got "int8", expected fp32, fp16 or bf16'),
    ],
)
def test_a_wrong_value_is_said_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    (found,) = problems(tmp_path, line + "\n")

    assert found.startswith(f"model.yaml:2: {message}")


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    text = "input:\n  width: x\n  width: 3\n  resize_size: 1\noutput:\n  label_offset: 1\nx: 1\n"

    assert [problem.split(": ")[0] for problem in problems(tmp_path, text)] == [
        "model.yaml:3",
        "model.yaml:4",
        "model.yaml:7",
        "model.yaml:8",
    ]


def test_a_model_type_is_required_and_must_be_one_that_works(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_type: required but missing"):
        load_package(make(tmp_path / "a", "precision: fp16\n"))
    with pytest.raises(
        ConfigError, match="model_type: got self_define, whose model the user's predictor"
    ):
        load_package(make(tmp_path / "b", "model_type: self_define\n"))
    with pytest.raises(ConfigError, match=r"model.yaml: empty"):
        load_package(make(tmp_path / "c", ""))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "labels: [a]",
            "output.labels: set with model_type: feature_extractor, expected only with ",
        ),
        ("activation: softmax", "output.activation: set with model_type: feature_extractor, expec"),
    ],
)
def test_what_a_feature_does_not_need_is_refused(tmp_path: Path, output: str, message: str) -> None:
    (found,) = problems(tmp_path, f"output: {{{output}}}\n", model_type="feature_extractor")

    assert message in found


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            "across_classes: true",
            "boxes.across_classes: set without iou_threshold, expected an iou",
        ),
        ("layout: box_score_class, background_last: true", "expected only where classes have col"),
        ("strides: [4, 8]", "boxes.strides: set with layout: separate, expected only with distan"),
        ("layout: distances, unit: fraction", "boxes.unit: set with layout: distances, expected o"),
        ("layout: distances, strides: [8, 8]", "boxes.strides: got [8, 8], expected names that d"),
        ("layout: distances, strides: []", "boxes.strides: got [], expected a list"),
        ("iou_threshold: 0", "boxes.iou_threshold: got 0, expected a number above 0, at most 1"),
    ],
)
def test_boxes_that_contradict_themselves_are_refused(
    tmp_path: Path, boxes: str, message: str
) -> None:
    (found,) = problems(tmp_path, f"output: {{boxes: {{{boxes}}}}}\n", model_type="detector")

    assert message in found


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("{}", "output.labels: required with model_type: text_recognizer, but missing; expected t"),
        ("{labels: [a], text: {end: 1}}", "output.text.end: set with decoding: ctc, expected only"),
        ("{labels: [a], text: {decoding: tokens, blank: 1}}", "output.text.blank: set with decod"),
        ("{labels: [a], text: {threshold: 0.5}}", "output.text.threshold: set with model_type: t"),
        ("{labels: [a], label_offset: 1}", "output.label_offset: set with model_type: text_recog"),
        ("{labels: [a], text: {blank: 2}}", "output.text: got 2 for the classes that are no char"),
        ("{labels: [a], text: {blank: -3}}", "output.text: got -3 for the classes that are no ch"),
        (
            "{labels: [a], text: {ignored: [-3]}}",
            "output.text: got 0, -3 for the classes that are no character, expected 2 different "
            "ones of the 3 that there are with 1 characters; correct it, or output.labels",
        ),
        ("{labels: [a], text: {ignored: [1, 1]}}", "output.text.ignored: got [1, 1], expected n"),
        ("{labels: [a], text: {ignored: [x]}}", 'output.text.ignored[0]: got "x", expected an i'),
    ],
)
def test_what_no_reader_of_text_can_mean_is_refused(
    tmp_path: Path, output: str, message: str
) -> None:
    (found,) = problems(tmp_path, f"output: {output}\n", model_type="text_recognizer")

    assert message in found


def test_characters_are_the_classes_that_nothing_else_is(tmp_path: Path) -> None:
    text = "model_type: text_recognizer\noutput: {labels: chars.txt, text: {space: true}}\n"
    folder = make(tmp_path / "model", text)
    # White space may be a character, a carriage return and what ends the file are none.
    (folder / "chars.txt").write_bytes("a\r\n\u3000\n \nb\n\n".encode())

    assert load_package(folder).characters == (None, "a", "\u3000", " ", "b", " ")


def test_characters_may_begin_with_any_class(tmp_path: Path) -> None:
    text = "{decoding: tokens, end: -1, ignored: [0, 2]}"
    text = f"model_type: text_spotter\noutput: {{labels: [a, b, c], text: {text}}}\n"

    package = load_package(make(tmp_path / "model", text))

    assert package.characters == (None, "a", None, "b", "c", None)


def make_team(folder: Path, model_yaml: str = "", **parts: str) -> Path:
    """Write a package of a detector and a recognizer; `parts` replaces their model.yaml."""
    make(folder, f"model_type: text_detection_recognition\n{model_yaml}")
    texts = {
        "detector": "model_type: text_detector\n",
        "recognizer": "model_type: text_recognizer\noutput: {labels: [a]}\n",
        **parts,
    }
    for name, text in texts.items():
        make(folder / name, text)
    return folder


def test_a_package_of_two_others_is_read_with_them(tmp_path: Path) -> None:
    folder = make_team(tmp_path / "model", "output: {text: {text_threshold: 0.5}}\n")

    package = load_package(folder)

    detector, recognizer = package.parts
    assert package.models == package.parts and detector.models == (detector,)
    assert (detector.model_type, recognizer.model_type) == ("text_detector", "text_recognizer")
    assert recognizer.characters == (None, "a")
    assert package.files == (detector.weights, recognizer.weights)
    assert package.fingerprint()["parts"] == [it.fingerprint() for it in package.parts]
    (folder / "detector").rename(folder / "finder")
    with pytest.raises(ModelError, match="detector: no such file or directory"):
        load_package(folder)
    (folder / "model.yaml").write_text("model_type: text_detection_recognition\ndetector: finder\n")
    assert load_package(folder).parts == (
        replace(
            detector, directory=folder / "finder", weights=folder / "finder" / detector.weights.name
        ),
        recognizer,
    )


@pytest.mark.parametrize(
    ("model_yaml", "parts", "message"),
    [
        ("weights: a.pt\n", {}, "weights: set with model_type: text_detection_recognition, expect"),
        ("input: {height: 64}\n", {}, "expected only in the packages of detector and recognizer"),
        ("output: {labels: [a]}\n", {}, "output.labels: set with model_type: text_detection_recog"),
        ("detector: ../other\n", {}, 'detector: got "../other", expected a file inside the packag'),
        ("detector: .\n", {}, "model.yaml:1: model_type: got text_detection_recognition, expected"),
        ("detector: recognizer\n", {}, "model_type: got text_recognizer, expected text_detector"),
        (
            "",
            {"detector": "model_type: text_detector\nx: 1\n"},
            "detector/model.yaml:2: x: unknown",
        ),
        (
            "",
            {"recognizer": "model_type: text_recognizer\n"},
            "recognizer/model.yaml: output.label",
        ),
    ],
)
def test_what_is_wrong_in_a_package_of_two_others_is_said(
    tmp_path: Path, model_yaml: str, parts: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_package(make_team(tmp_path / "model", model_yaml, **parts))


def test_a_part_needs_a_model_yaml(tmp_path: Path) -> None:
    folder = make_team(tmp_path / "model")
    (folder / "detector" / "model.yaml").unlink()

    with pytest.raises(ModelError, match=r"got no model.yaml, expected that of a text_detector"):
        load_package(folder)


def test_only_a_package_of_two_others_names_them(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "recognizer: rec\n")

    assert "recognizer: set with model_type: classifier, expected only with text_detection" in found


@pytest.mark.parametrize(
    ("model_type", "activation"),
    [
        ("text_detector", "none"),
        ("classifier", "softmax"),
        ("segmentor", "softmax"),
        ("multilabel_classifier", "sigmoid"),
        ("detector", "none"),
    ],
)
def test_each_type_has_its_usual_activation(
    tmp_path: Path, model_type: str, activation: str
) -> None:
    make(tmp_path / "model", f"model_type: {model_type}\n")
    assert load_package(tmp_path / "model").activation == activation

    make(tmp_path / "model", f"model_type: {model_type}\noutput: {{activation: sigmoid}}\n")
    assert load_package(tmp_path / "model").activation == "sigmoid"


def test_labels_come_from_a_file_beside_it(tmp_path: Path) -> None:
    package = load(tmp_path, "output: {labels: names.txt}\n", names_txt="\ufeffcat\r\n café \n\n")

    assert package.labels == ("cat", "café")
    assert package.class_names(2) == ("cat", "café")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\n\ndog\n", "line 2 is empty, expected a name"),
        (b"\n\n", "no names"),
        (b"", "no names"),
        (b"cat\ncaf\xe9\n", "not UTF-8: byte 0xe9"),
    ],
)
def test_a_damaged_file_of_labels_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    make(tmp_path / "model")
    (tmp_path / "model" / "names.txt").write_bytes(content)

    (found,) = problems(tmp_path, "output: {labels: names.txt}\n")

    assert found.startswith("model.yaml:2: output.labels: names.txt:")
    assert message in found


def test_classes_without_labels_are_named_by_their_numbers(tmp_path: Path) -> None:
    assert load(tmp_path, "").class_names(3) == ("0", "1", "2")


def test_labels_must_be_as_many_as_classes(tmp_path: Path) -> None:
    package = load(tmp_path, "output: {labels: [cat, dog]}\n")

    with pytest.raises(ModelError, match="has 3 classes, but there are 2 labels from class 0 on"):
        package.class_names(3)


def test_a_name_listed_twice_is_told_apart_by_its_class(tmp_path: Path) -> None:
    package = load(tmp_path, "output: {labels: [crane, dog, crane]}\n")

    assert package.class_names(3) == ("crane (0)", "dog", "crane (2)")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "got no model.yaml and 0 *.pt, *.pt2 or *.onnx files, expected a model.yaml or"),
        (
            ["a.pt", "b.onnx"],
            "got no model.yaml and 2 *.pt, *.pt2 or *.onnx files (a.pt, b.onnx), expe",
        ),
        (["a.ckpt"], "got no model.yaml and 0 *.pt, *.pt2 or *.onnx files, expected"),
    ],
)
def test_a_folder_without_exactly_one_model_is_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for name in names:
        (tmp_path / name).touch()

    with pytest.raises(ModelError) as caught:
        load_package(tmp_path)
    assert message in str(caught.value)


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").touch()

    with pytest.raises(ModelError, match="none: no such file or directory; correct model_path"):
        load_package(tmp_path / "none")
    with pytest.raises(ModelError, match=r"model.ckpt: expected a directory or a \*.pt, "):
        load_package(tmp_path / "model.ckpt")


def test_the_type_must_be_the_jobs(tmp_path: Path) -> None:
    package = load(tmp_path, "")

    check_model_type(package, "classifier")
    with pytest.raises(ConfigError, match=r"model_type: got detector, but the package .* is a"):
        check_model_type(package, "detector")


def test_a_copy_is_the_same_model(tmp_path: Path) -> None:
    original = load(tmp_path, "output: {labels: [a, b]}\n")
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.pt", (1, 1))
    (tmp_path / "copy" / "names.txt").write_text("a\nb\n")
    (tmp_path / "copy" / "model.yaml").write_text(
        "# Another way to say the same.\nmodel_type: classifier\noutput:\n  labels: names.txt\n"
    )

    assert load_package(tmp_path / "copy").fingerprint() == original.fingerprint()


@pytest.mark.parametrize(
    ("model_yaml", "weights", "what"),
    [
        ("", b"WEIGHTS", "weights"),
        ("input: {color_order: bgr}\n", b"weights", "input"),
        ("output: {labels: [a, c]}\n", b"weights", "labels"),
        ("precision: fp16\n", b"weights", "precision"),
    ],
)
def test_a_changed_model_has_another_fingerprint(
    tmp_path: Path, model_yaml: str, weights: bytes, what: str
) -> None:
    before = load(tmp_path, "").fingerprint()

    changed = load(tmp_path, model_yaml)
    changed.weights.write_bytes(weights)
    after = changed.fingerprint()

    assert {name for name in after if after[name] != before[name]} == {what}


def test_weights_that_vanished_are_said(tmp_path: Path) -> None:
    package = load(tmp_path, "")
    package.weights.unlink()

    with pytest.raises(ModelError, match=r"model.pt: cannot be read: no such file or directory"):
        package.fingerprint()


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, evmp.model.package; print(*{'torch', 'numpy', 'pyarrow'} & {*sys.modules})"

    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
