"""Every image format and resize mode against a plain single-process reference: Pillow and torch.

The reference shares no code with evmp: Pillow decodes, torch resizes and runs the same weights, one
image at a time. Top-1 must agree always, each probability within a tolerance. Both resize by one
filter and may round a pixel to either side; a JPEG of more than twice the input's size, though, is
decoded at a fraction of its size here and whole there.

The grid model sees a 4 x 4 grid of mean colours, so that a crop or a border in the wrong place, or
channels in the wrong order, change its answer.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jobfolder import JobFolder
from PIL import Image, ImageSequence
from torch.nn.functional import interpolate

TOLERANCE = 0.005
JPEG_TOLERANCE = 0.05
GRID = 4
N_CLASSES = 10
# What the real network gets: it takes its time, and answers small crops at random.
REAL = {
    "jpeg",
    "jpeg large",
    "jpeg large grey",
    "jpeg progressive",
    "jpeg cmyk",
    "png alpha",
    "png palette",
    "png 16 bit grey",
    "bmp",
    "gif animated",
    "webp",
    "tiff lzw",
}

Photo = Callable[[str], np.ndarray]


# --- the reference --------------------------------------------------------------------------------


def reference_image(data: bytes) -> Image.Image:
    """Open an image as 8-bit RGB: alpha onto white, 16 bits to 8, the first frame."""
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I"):
        grey = np.round(np.asarray(image) / 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def resized(image: Image.Image, width: int, height: int, filter: str) -> np.ndarray:
    """Resize with antialiasing. Returns (height, width, 3) uint8."""
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    planes = interpolate(planes, (height, width), mode=filter, antialias=True)
    return planes[0].clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def reference_pixels(image: Image.Image, spec: dict[str, Any]) -> np.ndarray:
    """Bring an image to the model's size, in the steps that a textbook would take."""
    width, height, filter = spec["width"], spec["height"], spec.get("interpolation", "bilinear")
    if spec["resize"] == "stretch":
        return resized(image, width, height, filter)
    if spec["resize"] == "short_side":
        side, short = spec["resize_size"], min(image.size)
        columns = side if image.width == short else int(image.width * side / short)
        rows = side if image.height == short else int(image.height * side / short)
        left, top = round((columns - width) / 2), round((rows - height) / 2)
        return resized(image, columns, rows, filter)[top : top + height, left : left + width]
    factor = min(width / image.width, height / image.height)
    columns, rows = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    left, top = (width - columns) // 2, (height - rows) // 2
    canvas = np.full((height, width, 3), spec.get("pad_color", (0, 0, 0)), np.uint8)
    canvas[top : top + rows, left : left + columns] = resized(image, columns, rows, filter)
    return canvas


class Reference:
    """A model package, run on one image file at a time."""

    def __init__(self, model: Path) -> None:
        self._spec = yaml.safe_load((model / "model.yaml").read_text())["input"]
        self._network = torch.jit.load(model / "model.pt").eval()

    def classify(self, data: bytes) -> np.ndarray:
        """Return (classes,) probabilities."""
        pixels = reference_pixels(reference_image(data), self._spec).astype(np.float32)
        if self._spec.get("color_order") == "bgr":
            pixels = pixels[:, :, ::-1]
        mean, std = np.float32(self._spec["mean"]), np.float32(self._spec["std"])
        tensor = torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1)[None]
        # Unoptimised, torch need not profile and compile for a handful of images.
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            return torch.softmax(self._network(tensor.contiguous())[0], 0).numpy()


# --- the images -----------------------------------------------------------------------------------


def save(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_16_bit_colour(pixels: np.ndarray) -> bytes:
    """Write (H, W, 3) uint8 as a PNG of 16 bits a channel, which Pillow cannot."""
    height, width, _ = pixels.shape
    rows = (pixels.astype(">u2") * 257).reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name: bytes, body: bytes) -> bytes:
        crc32 = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc32)

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def with_alpha(pixels: np.ndarray) -> Image.Image:
    """Fade an image out from the left to the right."""
    height, width, _ = pixels.shape
    alpha = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8), (height, width))
    return Image.fromarray(np.dstack([pixels, alpha]))


def with_clear_colour(pixels: np.ndarray) -> bytes:
    """A palette PNG, one of whose colours, that of the middle, is transparent."""
    image = Image.fromarray(pixels).quantize(32)
    return save(image, "PNG", transparency=image.getpixel((image.width // 2, image.height // 2)))


def files(photo: Photo) -> dict[str, bytes]:
    """One file of each format, by name; large, small, wide, tall and odd sizes."""
    coffee, cat, rocket = photo("coffee"), photo("chelsea"), photo("rocket")
    grey, flower = Image.fromarray(photo("camera")).convert("L"), photo("flower")
    cmyk = Image.fromarray(flower).convert("CMYK")
    small, tall = coffee[100:157, 200:291], np.ascontiguousarray(rocket[:, 200:371])
    deep = (np.asarray(grey, np.uint16) * 255 + 131).astype(np.uint16)
    return {
        "jpeg": save(coffee, "JPEG", quality=92),
        "jpeg 444": save(cat, "JPEG", quality=95, subsampling=0),
        "jpeg progressive": save(rocket, "JPEG", progressive=True),
        "jpeg large grey": save(grey, "JPEG"),
        "jpeg cmyk": save(cmyk, "JPEG"),
        "jpeg large": save(Image.fromarray(coffee).resize((1603, 1067)), "JPEG"),
        "jpeg small": save(small, "JPEG"),
        "jpeg tall": save(tall, "JPEG"),
        "png": save(cat, "PNG"),
        "png alpha": save(with_alpha(coffee), "PNG"),
        "png grey": save(grey, "PNG"),
        "png grey alpha": save(with_alpha(rocket).convert("LA"), "PNG"),
        "png palette": save(Image.fromarray(flower).quantize(64), "PNG"),
        "png palette clear": with_clear_colour(cat),
        "png 16 bit grey": save(Image.fromarray(deep), "PNG"),
        "png 16 bit colour": png_of_16_bit_colour(small),
        "png 1 bit": save(grey.convert("1"), "PNG"),
        "png 1 x 1": save(small[:1, :1], "PNG"),
        "bmp": save(tall, "BMP"),
        "bmp palette": save(Image.fromarray(small).quantize(16), "BMP"),
        "gif": save(Image.fromarray(cat).quantize(128), "GIF"),
        "gif animated": save(
            Image.fromarray(coffee), "GIF", save_all=True, append_images=[Image.fromarray(rocket)]
        ),
        "webp": save(flower, "WEBP", quality=90),
        "webp lossless alpha": save(with_alpha(small), "WEBP", lossless=True),
        "webp animated": save(
            Image.fromarray(small), "WEBP", save_all=True, append_images=[with_alpha(small)]
        ),
        "tiff": save(cat, "TIFF"),
        "tiff lzw": save(coffee, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": save(rocket, "TIFF", compression="jpeg"),
        "tiff cmyk": save(cmyk, "TIFF"),
        "tiff 16 bit grey": save(Image.fromarray(deep), "TIFF"),
        "tiff pages": save(
            Image.fromarray(flower), "TIFF", save_all=True, append_images=[Image.fromarray(cat)]
        ),
    }


@pytest.fixture(scope="module")
def images(photo: Photo) -> dict[str, bytes]:
    return files(photo)


def write_grid_model(folder: Path, **spec: Any) -> Path:
    torch.manual_seed(5)
    linear = torch.nn.Linear(3 * GRID * GRID, N_CLASSES)
    torch.nn.init.normal_(linear.weight, std=0.5)
    pool = torch.nn.AdaptiveAvgPool2d(GRID)
    network = torch.nn.Sequential(pool, torch.nn.Flatten(), linear).eval()
    folder.mkdir()
    torch.jit.save(torch.jit.script(network), folder / "model.pt")
    package = {
        "model_type": "classifier",
        "input": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], **spec},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(package))
    return folder


def differences(rows: list[dict[str, Any]], model: Path, images: dict[str, bytes]) -> list[str]:
    """Name every row that is not what the reference makes of it."""
    reference, found = Reference(model), []
    for row, (name, data) in zip(rows, images.items(), strict=True):
        expected, result = reference.classify(data), row["prediction_result"]
        if "class_probs" not in result:
            found.append(f"{name}: {result}")
            continue
        probs = np.array(list(result["class_probs"].values()))
        error = np.abs(probs - expected).max()
        limit = JPEG_TOLERANCE if name.startswith("jpeg") else TOLERANCE
        if error > limit or result["class"] != expected.argmax():
            found.append(f"{name}: {error:.4f}, {result['class']} and {expected.argmax()}")
    return found


# --- the tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {"resize": "stretch", "width": 96, "height": 64},
        {"resize": "short_side", "width": 96, "height": 64, "resize_size": 112},
        {
            "resize": "letterbox",
            "width": 80,
            "height": 96,
            "pad_color": [114, 30, 200],
            "interpolation": "bicubic",
            "color_order": "bgr",
        },
    ],
    ids=lambda spec: spec["resize"],
)
def test_every_format_is_classified_as_by_the_reference(
    job: JobFolder, make_table: Callable[..., Path], images: dict[str, bytes], spec: dict[str, Any]
) -> None:
    model = write_grid_model(job.path / "grid", **spec)
    make_table(job.path / "in.parquet", list(images.values()))

    rows = job.do(model_path="grid")

    assert [row["id"] for row in rows] == [str(index) for index in range(len(images))]
    assert differences(rows, model, images) == []


def test_real_network_classifies_every_format_as_the_reference(
    job: JobFolder, make_table: Callable[..., Path], images: dict[str, bytes], real_model: Path
) -> None:
    some = {name: data for name, data in images.items() if name in REAL}
    make_table(job.path / "in.parquet", list(some.values()))

    rows = job.do(model_path=str(real_model), torch_threads=2)

    assert len(rows) == len(REAL)
    assert differences(rows, real_model, some) == []


def test_fast_decoding_stays_near_the_reference(
    job: JobFolder, make_table: Callable[..., Path], images: dict[str, bytes]
) -> None:
    spec = {"resize": "stretch", "width": 96, "height": 64}
    model = write_grid_model(job.path / "grid", **spec)
    jpegs = {name: data for name, data in images.items() if name.startswith("jpeg")}
    make_table(job.path / "in.parquet", list(jpegs.values()))

    rows = job.do(model_path="grid", fast_decode=True)

    assert differences(rows, model, jpegs) == []


def test_reference_sees_the_first_frame_only(images: dict[str, bytes], photo: Photo) -> None:
    animated = Image.open(io.BytesIO(images["gif animated"]))

    assert len(list(ImageSequence.Iterator(animated))) == 2
    first = reference_image(images["gif animated"])
    assert np.abs(np.asarray(first, int) - photo("coffee")).mean() < 10
