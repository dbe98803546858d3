"""Every format against plain Pillow, and everything that is no image against `DecodeError`."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import simplejpeg
import skimage.data
from PIL import Image, PngImagePlugin

from evmp.errors import DecodeError
from evmp.image import SCRATCH_KEEP_BYTES, ImageDecoder

LIMIT = 178956970
PHOTO = Image.fromarray(skimage.data.coffee()).resize((90, 60))
GREY = PHOTO.convert("L")
GREY_16 = Image.fromarray(np.arange(0, 65536, 12, dtype=np.uint16)[:5400].reshape(60, 90))
PALETTE = PHOTO.quantize(64)
ALPHA = PHOTO.copy()
ALPHA.putalpha(GREY)


def encode(image, file_format, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


IMAGES = {
    "jpeg": encode(PHOTO, "JPEG", quality=90),
    "jpeg-progressive": encode(PHOTO, "JPEG", progressive=True),
    "jpeg-grey": encode(GREY, "JPEG"),
    "jpeg-444": encode(PHOTO, "JPEG", subsampling=0),
    "jpeg-restart": encode(PHOTO, "JPEG", restart_marker_rows=1),
    "jpeg-cmyk": encode(PHOTO.convert("CMYK"), "JPEG"),
    "jpeg-mpo": encode(PHOTO, "MPO", save_all=True, append_images=[GREY.convert("RGB")]),
    "png": encode(PHOTO, "PNG"),
    "png-palette": encode(PALETTE, "PNG"),
    "png-grey": encode(GREY, "PNG"),
    "png-1": encode(PHOTO.convert("1"), "PNG"),
    "bmp": encode(PHOTO, "BMP"),
    "bmp-palette": encode(PALETTE, "BMP"),
    "gif": encode(PALETTE, "GIF"),
    "gif-animated": encode(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]),
    "webp": encode(PHOTO, "WEBP"),
    "webp-lossless": encode(PHOTO, "WEBP", lossless=True),
    "webp-animated": encode(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(180)]),
    "tiff": encode(PHOTO, "TIFF"),
    "tiff-pages": encode(PHOTO, "TIFF", save_all=True, append_images=[PHOTO.rotate(180)]),
    "tiff-lzw": encode(PHOTO, "TIFF", compression="tiff_lzw"),
    "tiff-jpeg": encode(PHOTO, "TIFF", compression="jpeg"),
    "tiff-group4": encode(PHOTO.convert("1"), "TIFF", compression="group4"),
    "tiff-cmyk": encode(PHOTO.convert("CMYK"), "TIFF"),
}
TRANSPARENT = {
    "png-alpha": encode(ALPHA, "PNG"),
    "png-grey-alpha": encode(ALPHA.convert("LA"), "PNG"),
    "png-palette-key": encode(PALETTE, "PNG", transparency=3),
    "png-palette-alpha": encode(PALETTE, "PNG", transparency=bytes(range(0, 256, 4))),
    "png-color-key": encode(PHOTO, "PNG", transparency=PHOTO.getpixel((5, 5))),
    "png-grey-key": encode(GREY, "PNG", transparency=GREY.getpixel((5, 5))),
    "gif-key": encode(PALETTE, "GIF", transparency=PALETTE.getpixel((5, 5))),
    "webp-alpha": encode(ALPHA, "WEBP"),
    "tiff-alpha": encode(ALPHA, "TIFF"),
}
SIXTEEN_BITS = {
    "png-16": encode(GREY_16, "PNG"),
    "tiff-16": encode(GREY_16, "TIFF"),
    "tiff-16-lzw": encode(GREY_16, "TIFF", compression="tiff_lzw"),
}
ALL = IMAGES | TRANSPARENT | SIXTEEN_BITS


@pytest.fixture
def decoder() -> ImageDecoder:
    return ImageDecoder(LIMIT)


def png_of(width, height, pixels=b"", depth=1, color=0) -> bytes:
    """Build a PNG by hand, of 1-bit grey unless told otherwise, whatever its header claims."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = {"IHDR": header, "IDAT": zlib.compress(pixels), "IEND": b""}
    body = b""
    for name, data in parts.items():
        typed = name.encode() + data
        body += struct.pack(">I", len(data)) + typed + struct.pack(">I", zlib.crc32(typed))
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("name", IMAGES)
def test_opaque_image_equals_pillows(decoder, name):
    frame = decoder.decode(memoryview(IMAGES[name]))

    expected = np.asarray(Image.open(io.BytesIO(IMAGES[name])).convert("RGB"))
    assert (frame.height, frame.width) == (60, 90)
    assert frame.pixels.dtype == np.uint8 and frame.pixels.flags.c_contiguous
    # Pillow and simplejpeg bring their own builds of libjpeg-turbo.
    tolerance = 1 if name.startswith("jpeg") else 0
    np.testing.assert_allclose(frame.pixels.astype(int), expected, atol=tolerance)


@pytest.mark.parametrize("name", TRANSPARENT)
def test_alpha_is_dropped_onto_white(decoder, name):
    pixels = decoder.decode(TRANSPARENT[name]).pixels

    rgba = np.asarray(Image.open(io.BytesIO(TRANSPARENT[name])).convert("RGBA")).astype(float)
    alpha = rgba[:, :, 3:] / 255
    assert alpha.min() < 1
    np.testing.assert_allclose(pixels, rgba[:, :, :3] * alpha + 255 * (1 - alpha), atol=1)


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_16_bit_grey_scales_to_the_nearest_of_8(decoder, name):
    pixels = decoder.decode(SIXTEEN_BITS[name]).pixels

    expected = np.rint(np.asarray(GREY_16) / 257)
    np.testing.assert_array_equal(pixels, np.repeat(expected[:, :, np.newaxis], 3, axis=2))


def test_16_bit_colour_key_is_white(decoder):
    key = int(np.asarray(GREY_16)[1, 1])
    data = encode(GREY_16, "PNG")
    typed = b"tRNS" + struct.pack(">H", key)
    chunk = struct.pack(">I", 2) + typed + struct.pack(">I", zlib.crc32(typed))
    place = data.index(b"IDAT") - 4

    pixels = decoder.decode(data[:place] + chunk + data[place:]).pixels

    assert pixels[1, 1].tolist() == [255, 255, 255]
    assert pixels[1, 2, 0] == round(int(np.asarray(GREY_16)[1, 2]) / 257)


def test_16_bit_colour_keeps_its_high_byte(decoder):
    pixels = decoder.decode(png_of(1, 1, b"\0\x12\xff\x80\x00\xff\xff", 16, 2)).pixels

    assert pixels.tolist() == [[[0x12, 0x80, 0xFF]]]


def test_exif_orientation_is_not_applied(decoder):
    exif = Image.Exif()
    exif[0x0112] = 6

    frame = decoder.decode(encode(PHOTO, "JPEG", exif=exif))

    assert (frame.height, frame.width) == (60, 90)


def test_image_taller_than_a_strip_is_whole(decoder):
    tall = np.random.default_rng(0).integers(0, 256, (1100, 1000, 3), np.uint8)

    pixels = decoder.decode(encode(Image.fromarray(tall), "BMP")).pixels

    np.testing.assert_array_equal(pixels, tall)


@pytest.mark.parametrize(
    ("minimum", "expected"),
    [((0, 0), (300, 451)), ((38, 57), (38, 57)), ((39, 0), (75, 113)), ((0, 200), (150, 226))],
)
def test_jpeg_is_scaled_by_a_power_of_two_down_to_the_minimum(decoder, minimum, expected):
    data = encode(PHOTO.resize((451, 300)), "JPEG")

    frame = decoder.decode(data, *minimum)

    assert frame.pixels.shape == (*expected, 3)
    assert (frame.height, frame.width) == (300, 451)


def test_scaled_jpeg_shows_the_same_picture(decoder):
    data = encode(PHOTO.resize((720, 480)), "JPEG", quality=95)

    pixels = decoder.decode(data, 120, 180).pixels.astype(int)

    expected = PHOTO.resize((720, 480)).resize((180, 120), Image.Resampling.BOX)
    assert np.abs(pixels - np.asarray(expected)).mean() < 2


def test_fast_decoding_is_close_to_the_exact_one(decoder):
    exact = decoder.decode(IMAGES["jpeg"]).pixels.astype(int)
    fast = ImageDecoder(LIMIT, fast=True).decode(IMAGES["jpeg"]).pixels

    assert 0 < np.abs(exact - fast).mean() < 4


def test_scratch_is_reused_and_a_huge_one_given_back(decoder):
    first = decoder.decode(IMAGES["jpeg"]).pixels
    second = decoder.decode(IMAGES["png"]).pixels
    assert np.shares_memory(first, second)

    width = SCRATCH_KEEP_BYTES // 3 // 4000 + 1
    huge = decoder.decode(png_of(width, 4000, bytes((width // 8 + 1 + 1) * 4000))).pixels
    assert huge.shape == (4000, width, 3)
    assert decoder.decode(IMAGES["jpeg"]).pixels.base.size <= SCRATCH_KEEP_BYTES


def test_jpeg_does_not_import_pillow():
    code = (
        "import sys; from evmp.image import ImageDecoder;"
        "ImageDecoder(10**6).decode(sys.stdin.buffer.read()); assert 'PIL' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], input=IMAGES["jpeg"], check=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty image"),
        (b"hello", "not an image: unknown format (starts with 'hello')"),
        (
            b"hello, I am\n\x00\xff a text",
            "not an image: unknown format (starts with 'hello, I am... a...')",
        ),
        (IMAGES["jpeg"][:600], "truncated JPEG: "),
        (IMAGES["jpeg"][:30], "truncated JPEG: "),
        (IMAGES["jpeg-cmyk"][:3000], "truncated JPEG: "),
        (IMAGES["png"][:3000], "truncated PNG: "),
        (IMAGES["png"][:20], "truncated PNG: "),
        (IMAGES["gif"][:3000], "truncated GIF: "),
        (IMAGES["webp"][:900], "truncated WebP: "),
        (IMAGES["bmp"][:900], "truncated BMP: "),
        (IMAGES["tiff"][:3000], "truncated TIFF: "),
        (encode(PHOTO.convert("F"), "TIFF"), "TIFF of 32-bit or signed pixels is not supported"),
    ],
)
def test_what_is_no_whole_image_is_named(decoder, data, message):
    with pytest.raises(DecodeError) as caught:
        decoder.decode(data)

    assert str(caught.value).startswith(message)


def test_jpeg_of_12_bits_is_refused_by_name(decoder):
    data = bytearray(IMAGES["jpeg"])
    data[data.index(b"\xff\xc0") + 4] = 12

    with pytest.raises(DecodeError, match=r"^unsupported JPEG data precision 12; store 8 bits$"):
        decoder.decode(data)


def test_jpeg_with_unusual_subsampling_goes_to_pillow(decoder):
    data = bytearray(encode(PHOTO, "JPEG", subsampling=0))
    data[data.index(b"\xff\xc0") + 11] = 0x31
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg_header(data)

    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decoder.decode(data).pixels, expected)


@pytest.mark.parametrize("tail", [b"\0" * 1000, b"appended metadata", IMAGES["jpeg-444"]])
def test_what_follows_the_end_of_a_jpeg_is_ignored(decoder, tail):
    expected = decoder.decode(IMAGES["jpeg"]).pixels.copy()

    np.testing.assert_array_equal(decoder.decode(IMAGES["jpeg"] + tail).pixels, expected)


def test_stray_bytes_before_the_end_marker_are_harmless(decoder):
    data = IMAGES["jpeg"]
    expected = decoder.decode(data).pixels.copy()

    np.testing.assert_array_equal(
        decoder.decode(data[:-2] + b"\1\2\3" + data[-2:]).pixels, expected
    )
    with pytest.raises(DecodeError, match="truncated JPEG"):
        decoder.decode(data[:-2] + b"\1\2\3")


def test_damaged_jpeg_data_is_an_error(decoder):
    data = IMAGES["jpeg-restart"].replace(b"\xff\xd1", b"\xff\xd6", 1)

    with pytest.raises(DecodeError, match=r"^damaged JPEG: found marker 0xd6 instead of rst1$"):
        decoder.decode(data)


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(IMAGES["jpeg"])
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_of(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + IMAGES["gif"][10:]


def webp_of(width: int, height: int) -> bytes:
    data = bytearray(IMAGES["webp-animated"])
    place = data.index(b"VP8X") + 12
    data[place : place + 6] = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return bytes(data)


@pytest.mark.parametrize("build", [png_of, jpeg_of, gif_of, webp_of])
def test_too_many_pixels_are_refused_from_the_header(decoder, build):
    message = "image of 30000 x 20000 pixels exceeds max_image_pixels 178956970"

    with pytest.raises(DecodeError, match=f"^{message}$"):
        decoder.decode(build(30000, 20000))


def test_side_that_cannot_be_resized_is_refused(decoder):
    with pytest.raises(DecodeError, match="20000000 x 1 pixels has a side of more than 16777216"):
        decoder.decode(png_of(20_000_000, 1))


def test_canvas_of_a_webp_is_checked_before_pillow_allocates_it(decoder, monkeypatch):
    monkeypatch.setattr("evmp.image._import_pillow", pytest.fail)

    with pytest.raises(DecodeError, match="exceeds max_image_pixels"):
        decoder.decode(webp_of(30000, 20000))


def test_limit_above_pillows_own_is_ours():
    with pytest.raises(DecodeError, match="truncated PNG"):
        ImageDecoder(10**10).decode(png_of(30000, 30000))


def test_bomb_in_a_png_text_chunk_is_an_error(decoder):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 50_000_000, zip=True)

    with pytest.raises(DecodeError, match="damaged PNG: decompressed data too large"):
        decoder.decode(encode(PHOTO, "PNG", pnginfo=text))


@pytest.mark.parametrize("name", ["jpeg", "png"])
def test_lack_of_memory_is_an_error_of_the_row(decoder, name, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(decoder, "_reserve", fail)

    with pytest.raises(DecodeError, match="not enough memory to decode this"):
        decoder.decode(IMAGES[name])


@pytest.mark.parametrize("name", ALL)
def test_truncation_anywhere_is_an_error_or_loses_nothing(decoder, name, capfd, recwarn):
    data = ALL[name]
    whole = decoder.decode(data).pixels.copy()
    generator = random.Random(name)
    tail = range(max(0, len(data) - 30), len(data))
    for length in {*generator.sample(range(len(data)), 60), *tail}:
        try:
            np.testing.assert_array_equal(decoder.decode(data[:length]).pixels, whole)
        except DecodeError as error:
            assert_fit_for_a_result(error)

    assert capfd.readouterr() == ("", "") and not recwarn.list


@pytest.mark.parametrize("name", ALL)
def test_damage_anywhere_raises_nothing_else(decoder, name, capfd, recwarn):
    generator = random.Random(name)
    for n_bytes in (1, 1, 2, 4, 8, 16, 64) * 15:
        data = bytearray(ALL[name])
        for _ in range(n_bytes):
            # Half of it among the headers, which is where it hurts.
            end = len(data) if generator.random() < 0.5 else 128
            data[generator.randrange(end)] = generator.randrange(256)
        try:
            decoder.decode(data)
        except DecodeError as error:
            assert_fit_for_a_result(error)

    assert capfd.readouterr() == ("", "") and not recwarn.list


def assert_fit_for_a_result(error: DecodeError) -> None:
    message = str(error)
    assert message.isascii() and message.isprintable() and len(message) < 200
    assert "0x" not in message.replace("marker 0x", "") and "b'" not in message
