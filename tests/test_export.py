"""`evmp export`: packages of files and of networks by name, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import demo
import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, TINY_LABELS, tiny_network
from jobfolder import JobFolder
from modelfolder import write_onnx
from onnx import helper
from PIL import Image

from evmp.errors import ConfigError, ModelError
from evmp.export import Request, _make, export
from evmp.model.package import ModelPackage, load_package

Make = Callable[..., str]
Run = Callable[..., subprocess.CompletedProcess[str]]
PLAIN = ("input.mean=[0, 0, 0]", "input.std=[1, 1, 1]")


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("torchvision:resnet18", weights="none")`: what is said of the package `model`."""

    def make(source: object, **options: Any) -> str:
        (tmp_path / "model").mkdir()
        return _make(Request(str(source), **options), tmp_path / "model")

    return make


def script(file: Path) -> Path:
    torch.jit.save(torch.jit.script(tiny_network().eval()), file)
    return file


def program(file: Path) -> Path:
    example = torch.zeros(2, 3, 32, 48)
    batches = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(tiny_network(), (example,), dynamic_shapes=batches), file)
    return file


def means(file: Path, **options: Any) -> Path:
    """An ONNX model that returns the mean colour."""
    node = helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0)
    return write_onnx(file, [node], ["mean"], **{"shape": ("N", 3, 32, 48), **options})


# --- of a file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "name", "size"),
    [
        (script, "model.pt", (224, 224)),
        (program, "model.pt2", (32, 48)),
        (means, "model.onnx", (32, 48)),
    ],
)
def test_a_file_is_told_by_its_content(
    make: Make, tmp_path: Path, write: Callable[[Path], Path], name: str, size: tuple[int, int]
) -> None:
    said = make(write(tmp_path / "any.bin"), model_type="classifier")

    package = load_package(tmp_path / "model")
    assert package.weights.name == name
    assert (package.input.height, package.input.width) == size
    assert said.splitlines()[0].split() == [
        "model", "classifier,", str(size[1]), "x", f"{size[0]},", "short_side,", "bilinear",
    ]  # fmt: skip
    assert 'black image  {"class":' in said


def test_external_data_comes_along(make: Make, tmp_path: Path) -> None:
    shift = {"shift": np.float32([0.25, 0.5, 0.75])}
    node = helper.make_node("Add", ["mean_", "shift"], ["mean"])
    mean = helper.make_node("ReduceMean", ["image"], ["mean_"], axes=[2, 3], keepdims=0)
    file = write_onnx(tmp_path / "in" / "m.onnx", [mean, node], ["mean"], weights=shift)
    model, place = onnx.load(file), "data/all.bin"
    (tmp_path / "in" / "data").mkdir()
    onnx.save(model, file, save_as_external_data=True, location=place, size_threshold=0)

    said = make(file, model_type="classifier", settings=("output.activation=none", *PLAIN))

    assert '"class_probs":{"2":0.75,"1":0.5,"0":0.25}' in said
    assert load_package(tmp_path / "model").files[1].name == "all.bin"


def test_bytes_are_not_normalised(make: Make, tmp_path: Path) -> None:
    cast = helper.make_node("Cast", ["image"], ["map"], to=onnx.TensorProto.FLOAT)
    file = write_onnx(tmp_path / "m.onnx", [cast], ["map"], dtype="UINT8")

    said = make(file, model_type="feature_extractor")

    assert load_package(tmp_path / "model").input.scale == 1
    assert (
        'outputs      map: (1, 3, 32, 32) float32\nblack image  {"feature":[0.0,0.0,0.0]}' in said
    )


def test_characters_come_out_of_a_recognisers_metadata(make: Make, tmp_path: Path) -> None:
    (wheel,) = demo.fetch(packages=ROOT / "tests" / "models.txt").glob("rapidocr_onnx*.whl")
    name = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(name, tmp_path)

    said = make(tmp_path / name, model_type="text_recognizer")

    package = load_package(tmp_path / "model")
    assert len(package.labels) == 6623 and package.output.text.space
    assert (package.input.height, package.input.color_order) == (48, "bgr")
    assert '"sequence_predict_text":""' in said


def test_labels_and_settings_are_the_users(make: Make, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(TINY_LABELS) + "\n")
    settings = ("input.resize=letterbox", "input.scale=1/128", "input.mean=[0, 0, 0]")

    said = make(
        script(tmp_path / "m.pt"),
        model_type="classifier",
        labels=str(tmp_path / "names.txt"),
        settings=settings,
    )

    package = load_package(tmp_path / "model")
    assert package.labels == tuple(TINY_LABELS) and '"class_name":"dark"' in said
    assert (package.input.resize, package.input.scale) == ("letterbox", 1 / 128)
    assert (tmp_path / "model" / "model.yaml").read_text().startswith('# From "m.pt"; written by')


# --- of a network by its name ---------------------------------------------------------------------


def pixels_of(package: ModelPackage, image: Image.Image) -> torch.Tensor:
    """Return the input for an image in the steps of torchvision's and timm's own transforms."""
    spec = package.input
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    factor = spec.short_side / min(image.size)
    width, height = (int(side * factor) for side in image.size)
    image = image.resize((width, height), filters[spec.interpolation])
    left, top = round((width - spec.width) / 2), round((height - spec.height) / 2)
    pixels = np.asarray(image)[top : top + spec.height, left : left + spec.width] / 255
    planes = (pixels - np.array(spec.mean)) / np.array(spec.std)
    return torch.from_numpy(planes.transpose(2, 0, 1)[None]).float()


def test_torchvisions_network_of_a_checkpoint(
    run_evmp: Run,
    job: JobFolder,
    make_table: Callable[..., Path],
    photo: Callable[[str], np.ndarray],
    photo_file: Callable[..., bytes],
    torchvision: Any,
) -> None:
    network = torchvision.models.squeezenet1_1(num_classes=3).eval()
    torch.save({"state_dict": network.state_dict()}, job.path / "cats.pth")
    (job.path / "names.txt").write_text("tabby\nsiamese\nlion\n")
    make_table(job.path / "in.parquet", [photo_file("chelsea", "PNG"), photo_file("china", "PNG")])

    options = ["--weights", "cats.pth", "--classes", "3", "--labels", "names.txt"]
    done = run_evmp("export", "torchvision:squeezenet1_1", "cats", *options, cwd=job.path)
    rows = job.do(model_path="cats")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("wrote        cats: labels.txt, model.pt, model.yaml\nmodel")
    assert "outputs      0: (1, 3) float32" in done.stdout
    package = load_package(job.path / "cats")
    for row, name in zip(rows, ("chelsea", "china"), strict=True):
        with torch.inference_mode():
            scores = network(pixels_of(package, Image.fromarray(photo(name)))).softmax(1)
        found = row["prediction_result"]["class_probs"]
        assert list(found) == ["tabby", "siamese", "lion"]
        np.testing.assert_allclose(list(found.values()), scores[0], atol=2e-3)


def test_the_preprocessing_and_the_labels_are_those_of_torchvisions_weights(
    torchvision: Any,
) -> None:
    from evmp.export.torchvision import draft_of_torchvision

    draft = draft_of_torchvision(Request("torchvision:efficientnet_b0", weights="none"))

    assert draft.spec == {
        "model_type": "classifier",
        "input": {
            "height": 224,
            "width": 224,
            "resize": "short_side",
            "resize_size": 256,
            "interpolation": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
    }
    assert (len(draft.labels), draft.labels[967]) == (1000, "espresso")


def test_features_are_returned_by_their_names(make: Make, torchvision: Any) -> None:
    features = ("features.12=map", "classifier.1")

    said = make("torchvision:squeezenet1_1", weights="none", features=features, n_classes=5)

    assert "model        feature_extractor, 224 x 224, short_side, bilinear" in said
    assert "map: (1, 512, 13, 13) float32, classifier.1: (1, 5, 13, 13) float32" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "detector, 320 x 320, letterbox, bilinear"),
        ("ssdlite320_mobilenet_v3_large", "detector, 320 x 320, letterbox, bilinear"),
        ("lraspp_mobilenet_v3_large", "segmentor, 520 x 520, stretch, bilinear"),
        ("vit_b_16", "classifier, 224 x 224, short_side, bilinear"),
    ],
)
def test_each_family_of_torchvision_has_its_type(
    make: Make, torchvision: Any, name: str, words: str
) -> None:
    assert words in make(f"torchvision:{name}", weights="none")


def test_timms_network_of_a_checkpoint(
    make: Make, tmp_path: Path, photo: Callable[[str], np.ndarray], torchvision: Any
) -> None:
    timm = pytest.importorskip("timm")
    from evmp.model import open_model

    network = timm.create_model("mobilenetv3_small_050", num_classes=7).eval()
    torch.save(network.state_dict(), tmp_path / "seven.pth")

    make("timm:mobilenetv3_small_050", weights=str(tmp_path / "seven.pth"), n_classes=7)

    package = load_package(tmp_path / "model")
    config = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**config, is_training=False)
    image = Image.fromarray(photo("coffee"))
    planes = pixels_of(package, image)
    with torch.inference_mode():
        expected = network(transform(image)[None])
        np.testing.assert_allclose(network(planes), expected, atol=2e-2)
    black = np.zeros((1, package.input.height, package.input.width, 3), np.uint8)
    (outputs,) = open_model(package, "cpu", 1, 1).predict(black, [0])
    with torch.inference_mode():
        (scores,) = network(transform(Image.fromarray(black[0]))[None])
    np.testing.assert_allclose(outputs["0"], scores, atol=1e-4)


@pytest.mark.slow
def test_timms_features_are_those_before_its_classes(make: Make, torchvision: Any) -> None:
    pytest.importorskip("timm")

    said = make("timm:mobilenetv3_small_050", weights="none", model_type="feature_extractor")

    assert "0: (1, 1024) float32" in said


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("torchvision:resnet", {}, "has no such network, did you mean resnet"),
        ("torchvision:r3d_18", {}, "is no network for single images"),
        (
            "torchvision:resnet18",
            {"weights": "V3"},
            "V3 is no file, and none of IMAGENET1K_V1, DEF",
        ),
        (
            "torchvision:resnet18",
            {"weights": "none", "features": ("layre4",)},
            "the network has no layre4, did you mean layer4",
        ),
        ("torchvision:mnasnet0_75", {"weights": "none", "n_classes": -3}, "cannot make a mnasnet0"),
        ("timm:efficientnet_lit0", {}, "has no such network, did you mean efficientnet_lite0"),
        ("timm:efficientnet_lite0", {"weights": "V1"}, "V1 is no file, and not none"),
    ],
)
def test_a_wrong_request_says_what_there_is(
    make: Make, torchvision: Any, source: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(source, **options)


def test_a_checkpoint_that_does_not_fit_is_named(
    make: Make, tmp_path: Path, torchvision: Any
) -> None:
    file = tmp_path / "wrong.pth"
    for content, message in (
        ({"fc.weight": torch.zeros(3)}, "of another network: Missing key.*features"),
        ([torch.zeros(3)], "holds a list, expected a state_dict"),
        (
            {"model": torchvision.models.squeezenet1_1(num_classes=3).state_dict()},
            "another network: size mismatch for .*; --classes says how many it has",
        ),
        (Path("code"), "cannot be read as a checkpoint: Weights only load failed"),
    ):
        torch.save(content, file)
        with pytest.raises(ModelError, match=message):
            make("torchvision:squeezenet1_1", weights=str(file))
        (tmp_path / "model").rmdir()
    file.write_bytes(b"no checkpoint")
    with pytest.raises(ModelError, match=r"wrong\.pth: cannot be read as a checkpoint"):
        make("torchvision:squeezenet1_1", weights=str(file))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_that_is_not_there_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"evmp.export.{library}", raising=False)

    with pytest.raises(ModelError, match=f"^{library} cannot be imported .*; install"):
        make(f"{library}:resnet18", weights="none")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("input.heigth=3", "-Dinput.heigth: unknown key, did you mean height?"),
        ("input.height=0", "-Dinput.height: got 0, expected an integer from 1 to 8192"),
        ("input=3", "-Dinput: got 3, expected a mapping"),
        ("model_type=detecto", '-Dmodel_type: got "detecto", expected .*, did you mean detector'),
        ("input.mean=[1", r'-Dinput.mean: got "\[1", .*'),
        ("input.height", '-D"input.height": expected -Dkey=value'),
        ("=3", '-D"=3": expected -Dkey=value'),
        ("weights=\udcff", "expected -Dkey=value in UTF-8"),
        ("weights=../m.pt", '-Dweights: got "../m.pt", expected a file inside the package'),
        ("model_type=self_define", "-Dmodel_type: got self_define, whose model the user's pr"),
        ("model_type=text_detection_recognition", "is a folder of two packages; export each"),
    ],
)
def test_a_wrong_setting_is_said(make: Make, tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(script(tmp_path / "m.pt"), model_type="classifier", settings=(setting,))


def test_a_request_must_be_whole(tmp_path: Path) -> None:
    folder, file = tmp_path / "model", script(tmp_path / "m.pt")
    (tmp_path / "full").mkdir()
    for options, place, message in (
        ({}, folder, "--type: required but missing, it says what the model in the file does"),
        ({"weights": "none"}, folder, "--weights: only of use with torchvision:NAME"),
        ({"model_type": "classifier"}, tmp_path / "full", "full: is there already; name another"),
        ({"model_type": "text_detection_recognition"}, folder, "--type: a text_detection_recog"),
        ({"model_type": "classifier", "features": ("a",)}, folder, "--features: of a feature_ext"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(Request(str(file), **options), place)
    with pytest.raises(ConfigError, match="full: is no model package, so it is not replaced"):
        export(Request(str(file), model_type="classifier"), tmp_path / "full", force=True)


def test_labels_of_what_has_none_are_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n")
    file, labels = script(tmp_path / "m.pt"), str(tmp_path / "names.txt")

    with pytest.raises(ConfigError, match="--labels: a feature_extractor has none"):
        make(file, model_type="feature_extractor", labels=labels)


def test_labels_must_be_as_many_as_the_classes(
    make: Make, tmp_path: Path, torchvision: Any
) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    options = {"weights": "none", "labels": str(tmp_path / "names.txt"), "n_classes": 3}

    with pytest.raises(ConfigError, match=r"2 labels from class 0 on, but --classes is 3; .*_off"):
        make("torchvision:squeezenet1_1", **options)

    (tmp_path / "model").rmdir()
    make("torchvision:squeezenet1_1", **options, settings=("output.label_offset=1",))
    assert load_package(tmp_path / "model").class_names(3) == ("background", "cat", "dog")


def test_files_of_the_package_are_named_by_settings(make: Make, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    settings = ("weights=sub/w.onnx", "output.labels=sub/abc.txt")

    make(
        means(tmp_path / "m.onnx"),
        model_type="classifier",
        labels=str(tmp_path / "names.txt"),
        settings=settings,
    )

    package = load_package(tmp_path / "model")
    assert package.labels == ("a", "b", "c")
    assert package.weights == tmp_path / "model/sub/w.onnx"


def test_errors_name_the_place_that_was_asked_for(tmp_path: Path) -> None:
    request = Request(
        str(means(tmp_path / "m.onnx")), "classifier", settings=("output.labels=abc.txt",)
    )

    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/model/abc.txt: cannot be read")):
        export(request, tmp_path / "model")


def test_a_stop_leaves_nothing(
    start_evmp: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "names.txt")  # who reads it waits for a writer
    options = ["--type", "classifier", "--labels", "names.txt"]

    process = start_evmp("export", means(tmp_path / "m.onnx"), "model", *options, cwd=tmp_path)
    with open(tmp_path / "names.txt", "w"):  # it is open at both ends: the export is under way
        assert list(tmp_path.glob(".model.evmp-*"))
        process.terminate()
        _, errors = process.communicate(timeout=30)

    assert process.returncode == 143
    assert "stopped by SIGTERM, no package was written; run the same command again" in errors
    assert sorted(it.name for it in tmp_path.iterdir()) == ["m.onnx", "names.txt"]


def test_a_killed_export_is_swept_by_the_next_and_two_at_once_are_refused(
    start_evmp: Callable[..., subprocess.Popen[str]], run_evmp: Run, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "names.txt")  # who reads it waits for a writer
    command = ["export", means(tmp_path / "m.onnx"), "model", "--type", "classifier"]

    process = start_evmp(*command, "--labels", "names.txt", cwd=tmp_path)
    with open(tmp_path / "names.txt", "w"):
        second = run_evmp(*command, cwd=tmp_path)
        process.kill()
        process.communicate(timeout=30)
    left = [it.name for it in tmp_path.glob(".model.*")]
    third = run_evmp(*command, cwd=tmp_path)

    assert second.returncode == 2 and "model: another export is writing it" in second.stderr
    assert left == [".model.evmp-export"]
    assert third.returncode == 0
    assert sorted(it.name for it in tmp_path.iterdir()) == ["m.onnx", "model", "names.txt"]


def test_the_command_leaves_a_whole_package_or_nothing(run_evmp: Run, tmp_path: Path) -> None:
    file = means(tmp_path / "m.onnx")
    command = ["export", file, "out/model", "--type", "classifier"]

    unfit = run_evmp(*command[:3], "--type", "detector", cwd=tmp_path)
    first = run_evmp(*command, cwd=tmp_path)
    again = run_evmp(*command, cwd=tmp_path)
    forced = run_evmp(*command, "--force", "-Doutput.label_offset=0", cwd=tmp_path)

    assert unfit.returncode == 3
    assert unfit.stderr.startswith(
        "evmp: model: out/model/model.onnx: the model returned mean: (3,)"
    )
    assert first.returncode == 0 and "model        classifier, 48 x 32, short_side" in first.stdout
    assert again.returncode == 2 and "out/model: is there already; name another" in again.stderr
    assert forced.returncode == 0
    assert "label_offset: 0" in (tmp_path / "out/model/model.yaml").read_text()
    assert [it.name for it in (tmp_path / "out").iterdir()] == ["model"]
