"""A JPEG to a 224 x 224 row: evmp's decoder and resize against simplejpeg, cv2 and torch.

    python bench/bench_decode.py --json out/bench/decode.json

Photographs of three sizes at two qualities, decoded and resized, antialiased, by one thread. evmp
writes into a row that it is given, as its decoders do, and lets libjpeg-turbo decode at half size
or less where more would be left than the row needs. The others decode whole, but for Pillow's
`draft`, which does the same, and cv2's half-size decoding, shown where half the size is enough.
"evmp, fast_decode" is what the job's key of that name does.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import harness
import numpy as np
import simplejpeg
import workload
from PIL import Image

from evmp.fit import Fit
from evmp.image import ImageDecoder
from evmp.model.package import load_package

SIZES = [(500, 375), (1024, 768), (1920, 1080)]
QUALITIES = [75, 90]
N_PICTURES = 8
SIDE = 224

Way = Callable[[bytes], object]


def by_evmp(*, fast: bool) -> Way:
    """Decode and resize into one row, as a decoder process does."""
    decoder = ImageDecoder(1 << 30, fast=fast)
    fit = Fit(load_package(workload.network()).input)
    row = memoryview(bytearray(SIDE * SIDE * 3))
    return lambda data: fit.into(decoder.decode(data, *fit.enough), row)


def by_pillow(data: bytes) -> Any:
    """Decode at a fraction of the size where Pillow can, and resize."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (SIDE, SIDE))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def by_simplejpeg(data: bytes) -> Any:
    """Decode whole, and resize by Pillow."""
    image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def by_cv2(cv2: Any, flags: int) -> Way:
    """Decode and resize by OpenCV."""
    cv2.setNumThreads(1)

    def work(data: bytes) -> Any:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)

    return work


def by_torch(torch: Any) -> Way:
    """Decode by simplejpeg, resize by torch on its fast path for uint8."""
    torch.set_num_threads(1)

    def work(data: bytes) -> Any:
        planes = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)[None]
        return torch.nn.functional.interpolate(
            planes, size=(SIDE, SIDE), mode="bilinear", antialias=True
        )

    return work


def ways(height: int) -> dict[str, Way]:
    """Return all installed ways for pictures of a height; the first is the baseline."""
    found: dict[str, Way] = {"simplejpeg + Pillow": by_simplejpeg, "Pillow, draft": by_pillow}
    if torch := harness.peer("torch"):
        found["simplejpeg + torch"] = by_torch(torch)
    if cv2 := harness.peer("cv2"):
        found["cv2"] = by_cv2(cv2, cv2.IMREAD_COLOR)
        if height >= 2 * SIDE:
            found["cv2, half size"] = by_cv2(cv2, cv2.IMREAD_REDUCED_COLOR_2)
    found["evmp"] = by_evmp(fast=False)
    found["evmp, fast_decode"] = by_evmp(fast=True)
    return found


def over(way: Way, pictures: list[bytes]) -> harness.Work:
    """Do one picture after the other, for ever."""

    def turns() -> Iterator[object]:
        while True:
            yield from map(way, pictures)

    endless = turns()
    return lambda: next(endless)


def by_fast_decode(pictures: list[bytes]) -> dict[str, float]:
    """Return by how many grey levels `fast_decode` changes the rows of some pictures."""
    exact, fast = (rows_of(pictures, fast=fast) for fast in (False, True))
    levels = np.abs(exact - fast)
    return {
        "mean": float(levels.mean()),
        "99th percentile": float(np.percentile(levels, 99)),
        "greatest": float(levels.max()),
    }


def rows_of(pictures: list[bytes], *, fast: bool) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Return (n, 224, 224, 3)."""
    decoder = ImageDecoder(1 << 30, fast=fast)
    fit = Fit(load_package(workload.network()).input)
    rows = np.zeros((len(pictures), SIDE, SIDE, 3), np.uint8)
    for picture, row in zip(pictures, rows, strict=True):
        fit.into(decoder.decode(picture, *fit.enough), memoryview(row.reshape(-1)))
    return rows.astype(np.int16)


def main() -> None:
    """Measure every size and quality."""
    packages = ["simplejpeg", "Pillow", "torch", "opencv-python-headless", "numpy"]
    bench = harness.Bench("decode", __doc__, packages)
    changes: list[dict[str, Any]] = []
    for width, height in SIZES:
        for quality in QUALITIES:
            pictures = list(workload.jpegs(N_PICTURES, width, height, quality, spread=0.0))
            contenders = {name: over(way, pictures) for name, way in ways(height).items()}
            size = f"{width}x{height} q{quality}"
            bench.compare(size, contenders, 1.0, "frames/s")
            changes.append({"size": size, **by_fast_decode(pictures)})
    bench.tables["grey levels that fast_decode changes in a row"] = changes
    bench.finish()


if __name__ == "__main__":
    main()
