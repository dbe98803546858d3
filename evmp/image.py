"""Bytes to RGB frames, for the decoder processes.

The data decides the format, never a file name. JPEG, the common case, is decoded by libjpeg-turbo
straight into a scratch buffer that the decoder keeps; every other format, and the JPEGs that it
leaves (CMYK, odd subsampling), goes through Pillow, which is imported when the first one comes.

What a frame looks like, whatever it was: RGB, 8 bit. Alpha, a palette's and a colour key included,
is dropped onto white; 16-bit grey is round(x / 257), 16-bit colour keeps its high byte; CMYK is
converted without a profile; of an animation or a multi-page file the first picture counts. The EXIF
orientation is not applied: pixels come as they are stored, as plain Pillow and libjpeg give them.

A picture that is cut short is an error, never a picture with grey in it, and so is one whose damage
its format shows. So is one of more than `max_image_pixels`, which is told from the header, before
any pixel is decoded. Whatever the bytes hold, `decode` raises `DecodeError` alone, and prints
nothing.
"""

from __future__ import annotations

import ctypes
import io
import logging
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import simplejpeg

from evmp.errors import DecodeError

if TYPE_CHECKING:
    from PIL import Image

# As in the buffer protocol: bytes, or a view of a ring slot.
Buffer: TypeAlias = "bytes | bytearray | memoryview"
Pixels: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

SCRATCH_STEP_BYTES = 1 << 22
# A scratch grown above this for one huge picture is given back with the next one.
SCRATCH_KEEP_BYTES = 1 << 26
# simplejpeg multiplies height, width and 3 as C ints.
SIMPLEJPEG_MAX_BYTES = 2**31 - 1
# Pillow's pictures are converted by so much at a time.
STRIP_PIXELS = 1 << 20
MAX_MESSAGE_CHARS = 100
MAX_SIDE = 1 << 24  # of what is resized, see csrc/resize.h

# Of files that users call images; what is in one, its data decides.
IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")

_MAGIC = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "TIFF"),
    (re.compile(rb"BM"), "BMP"),
)
_PLUGINS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "GIF": "GifImagePlugin",
    "WebP": "WebPImagePlugin",
    "TIFF": "TiffImagePlugin",
    "BMP": "BmpImagePlugin",
}

# Note [JPEG warnings]
# libjpeg goes on after a warning, and simplejpeg raises with the text of the first one once the
# whole picture is in the buffer. These say that the pixels are right all the same; real cameras
# write such files. Only a truncation can still hide behind them, hence the look for the end marker.
_HARMLESS = re.compile(
    r"extraneous bytes before marker|Unknown Adobe color transform|unknown JFIF revision"
    r"|Invalid SOS parameters for sequential|bad ICC marker"
)
# These say that pixels are lost. What is neither is fatal: a kind of JPEG that Pillow may know.
_DAMAGE = re.compile(r"Corrupt JPEG data: |Inconsistent progression sequence")


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded picture."""

    pixels: Pixels
    """(H, W, 3) uint8 RGB, C-contiguous; valid until the decoder's next `decode`."""
    height: int
    """Rows of the original picture; `pixels` has fewer where a JPEG was scaled while decoding."""
    width: int
    """Columns of the original picture, likewise."""


class ImageDecoder:
    """Decodes one picture at a time into a scratch buffer that it reuses. Not thread-safe."""

    def __init__(self, max_image_pixels: int, *, fast: bool = False) -> None:
        """Make a decoder; it allocates with the first picture.

        Args:
            max_image_pixels: height x width above which a picture is refused.
            fast: let libjpeg-turbo use its faster, less exact DCT and chroma upsampling.
        """
        self._max_image_pixels = max_image_pixels
        self._fast = fast
        self._scratch: Pixels = np.empty(0, np.uint8)
        self._pillow: Any = None

    def decode(self, data: Buffer, min_height: int = 0, min_width: int = 0) -> Frame:
        """Decode the picture that `data` holds.

        Args:
            min_height: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster, as
                long as so many rows are left; with 0 for both, it is decoded at its full size.
            min_width: the same for columns.

        Raises:
            DecodeError: the data is no picture, is damaged, cut short, or too large a picture.
        """
        kind = _sniff(data)
        try:
            frame = self._decode_jpeg(data, min_height, min_width) if kind == "JPEG" else None
            return frame or self._decode_other(data, kind)
        except MemoryError:
            raise DecodeError(f"not enough memory to decode this {kind}") from None

    def _decode_jpeg(self, data: Buffer, min_height: int, min_width: int) -> Frame | None:
        """Decode into the scratch; None where it is a JPEG for Pillow."""
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except (ValueError, KeyError, RuntimeError):
            return None
        self._check_size(height, width)
        if colorspace in ("CMYK", "YCCK") or height * width * 3 > SIMPLEJPEG_MAX_BYTES:
            return None

        rows, columns = _scaled_size(height, width, min_height, min_width)
        scratch = self._reserve(rows, columns)
        options = {"fastdct": self._fast, "fastupsample": self._fast, "min_factor": 2}
        try:
            simplejpeg.decode_jpeg(
                data, "RGB", min_height=rows, min_width=columns, buffer=scratch, **options
            )
        except (ValueError, RuntimeError) as error:
            if not _are_pixels_whole(str(error), data):
                return None
        return Frame(scratch, height, width)

    def _decode_other(self, data: Buffer, kind: str) -> Frame:
        if kind == "WebP":
            self._check_canvas(bytes(data[:30]))
        self._pillow = self._pillow or _import_pillow()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_module(f"PIL.{_PLUGINS[kind]}")
                image = self._pillow.open(io.BytesIO(data), formats=[kind])
                self._check_size(image.height, image.width)
                return self._convert(image)
        except (DecodeError, MemoryError):
            raise
        except Exception as error:
            # Pillow names no set of exceptions for damaged data; it raises a dozen types.
            raise DecodeError(_describe(error, data, kind)) from None

    def _convert(self, image: Image.Image) -> Frame:
        """Load an opened image and bring it into the scratch, in strips: no second copy is made."""
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise DecodeError(
                f"{image.format} of 32-bit or signed pixels is not supported; store 8 or 16 bits"
            )
        image.load()
        width, height = image.size
        scratch = self._reserve(height, width)
        n_rows = max(1, STRIP_PIXELS // width)
        for top in range(0, height, n_rows):
            bottom = min(top + n_rows, height)
            scratch[top:bottom] = _to_rgb(image.crop((0, top, width, bottom)))
        return Frame(scratch, height, width)

    def _check_canvas(self, head: bytes) -> None:
        """Check the size of an extended WebP, whose canvas is allocated when it is opened."""
        if head[12:16] == b"VP8X" and len(head) == 30:
            width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
            self._check_size(height, width)

    def _check_size(self, height: int, width: int) -> None:
        if height < 1 or width < 1:
            raise DecodeError(f"image of {width} x {height} pixels is empty")
        if height * width > self._max_image_pixels:
            raise DecodeError(
                f"image of {width} x {height} pixels exceeds max_image_pixels "
                f"{self._max_image_pixels}"
            )
        if max(height, width) > MAX_SIDE:
            raise DecodeError(
                f"image of {width} x {height} pixels has a side of more than {MAX_SIDE}"
            )

    def _reserve(self, height: int, width: int) -> Pixels:
        """Return (height, width, 3) of the scratch, which grows, or shrinks, in whole steps."""
        n_bytes = height * width * 3
        if n_bytes > self._scratch.size or n_bytes <= SCRATCH_KEEP_BYTES < self._scratch.size:
            n_steps = -(-n_bytes // SCRATCH_STEP_BYTES)
            self._scratch = np.empty(n_steps * SCRATCH_STEP_BYTES, np.uint8)
        return self._scratch[:n_bytes].reshape(height, width, 3)


def _sniff(data: Buffer) -> str:
    head = bytes(data[:16])
    if not head:
        raise DecodeError("empty image")
    for pattern, kind in _MAGIC:
        if pattern.match(head):
            return kind
    more = "..." if len(data) > len(head) else ""
    raise DecodeError(f"not an image: unknown format (starts with '{_printable(head)}{more}')")


def _printable(data: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)


def _scaled_size(height: int, width: int, min_height: int, min_width: int) -> tuple[int, int]:
    """Return rows and columns after the strongest DCT scaling that keeps the minimum.

    Only 1/8, 1/4 and 1/2: libjpeg-turbo has no vector code for the scales between (3/8 is slower
    than 1/2), and above 1/2 they are slower than the full size.
    """
    if min_height > 0 or min_width > 0:
        for divisor in (8, 4, 2):
            rows, columns = -(-height // divisor), -(-width // divisor)
            if rows >= min_height and columns >= min_width:
                return rows, columns
    return height, width


def _are_pixels_whole(message: str, data: Buffer) -> bool:
    """Tell by simplejpeg's message; False for a kind of JPEG that Pillow may know."""
    if "Premature end of JPEG file" in message:
        raise DecodeError(f"truncated JPEG: the data ends before the image ({len(data)} bytes)")
    if _HARMLESS.search(message):
        if not _is_cut(bytes(data), "JPEG"):
            return True
        raise DecodeError(f"truncated JPEG: the end marker is missing ({len(data)} bytes)")
    if _DAMAGE.match(message):
        raise DecodeError(f"damaged JPEG: {message.removeprefix('Corrupt JPEG data: ').lower()}")
    if "data precision" in message:
        raise DecodeError(f"{message[0].lower()}{message[1:]}; store 8 bits")
    return False


def _import_pillow() -> ModuleType:
    """Import Pillow, with its own size limit off (ours is stricter) and its tongue held.

    libtiff, which comes with it, writes what it finds wrong to stderr, as does the logger of its
    TIFF plugin: the message of the error row says it already.
    """
    from PIL import Image, _imaging

    Image.MAX_IMAGE_PIXELS = None
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with suppress(OSError, AttributeError):  # a Pillow without libtiff
        library = ctypes.CDLL(_imaging.__file__)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)
    return Image


def _to_rgb(image: Image.Image) -> Pixels:
    """Convert a loaded image of any mode to (H, W, 3) uint8 RGB."""
    if image.mode.startswith("I"):
        return _scale_16_bit(np.asarray(image), image.info.get("transparency"))
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = _drop_alpha(image.convert("RGBA"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _scale_16_bit(grey: np.ndarray[Any, np.dtype[Any]], transparent: int | None) -> Pixels:
    """Scale (H, W) of 16 bits to (H, W, 3) uint8; the colour key is white."""
    levels = ((np.arange(1 << 16, dtype=np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(transparent, int):
        levels[transparent] = 255
    return np.repeat(levels[grey][:, :, np.newaxis], 3, axis=2)


def _drop_alpha(image: Image.Image) -> Image.Image:
    white = image.copy()
    white.paste((255, 255, 255, 255), (0, 0, *image.size))
    white.alpha_composite(image)
    return white


def _describe(error: Exception, data: Buffer, kind: str) -> str:
    """Say what Pillow found wrong, without its object addresses and raw bytes."""
    message = re.sub(r"<.*?>|\(?b(['\"]).*?\1\)?", "", str(error))
    message = _printable(message.encode("ascii", "replace")).strip()[:MAX_MESSAGE_CHARS]
    is_cut = "truncated" in message.lower() or _is_cut(bytes(data), kind)
    if not message or "cannot identify" in message:
        message = "its header cannot be read"
    verdict = "truncated" if is_cut else "damaged"
    return f"{verdict} {kind}: {message[0].lower()}{message[1:]} ({len(data)} bytes)"


def _is_cut(data: bytes, kind: str) -> bool:
    """Say whether the file ends before its format's own end; False where that cannot be told."""
    if kind == "JPEG":
        end = data.rfind(b"\xff\xd9")
        return end < 0 or end < data.rfind(b"\xff\xda")
    if kind == "PNG":
        return b"IEND" not in data
    if kind == "WebP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if kind == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    return False
