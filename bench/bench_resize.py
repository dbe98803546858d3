"""Resizing to 224 x 224, and normalisation: evmp at every SIMD level, torch, Pillow, cv2.

    python bench/bench_resize.py --json out/bench/resize.json

All antialias but "cv2 linear", which is there to show what that costs: its result is another one.
Everybody uses one thread. evmp writes into a row that it is given. "evmp, sizes change" never gets
the same geometry twice in a row, so that it computes its weights anew.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import harness
import numpy as np

from evmp import _native

SIZES = [(500, 375), (480, 270), (1024, 768), (1920, 1080), (256, 256)]
SIDE = 224
SEED = 1
SCALE = (0.0171, 0.0175, 0.0174)
BIAS = (-2.12, -2.04, -1.80)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def at_level(level: str, work: harness.Work) -> harness.Work:
    """Do something at a SIMD level."""

    def run() -> None:
        _native.set_simd_level(level)
        work()

    return run


def evmp_resize(src: Pixels, dst: Pixels, **options: Any) -> None:
    """Resize into a row of a batch."""
    _native.resize(src, *src.shape[:2], dst, SIDE, SIDE, **options)


def evmp_changing(src: Pixels, dst: Pixels) -> harness.Work:
    """Resize two boxes in turns that differ by less than can be seen."""
    height, width = src.shape[:2]
    boxes = itertools.cycle([(0.0, 0.0, width - d, height - d) for d in (0.0, 1e-9)])
    return lambda: evmp_resize(src, dst, box=next(boxes))


def torch_resize(torch: Any, src: Pixels, mode: str) -> harness.Work:
    """Resize by torch on its fast path for uint8: (1, 3, H, W), channels last."""
    torch.set_num_threads(1)
    image = torch.from_numpy(src).permute(2, 0, 1)[None]
    return functools.partial(
        torch.nn.functional.interpolate, image, size=(SIDE, SIDE), mode=mode, antialias=True
    )


def pillow_resize(pillow: Any, src: Pixels, mode: str) -> harness.Work:
    """Resize by Pillow, from an image that exists to a new one."""
    image = pillow.fromarray(src)
    return functools.partial(image.resize, (SIDE, SIDE), getattr(pillow, mode.upper()))


def cv2_resize(cv2: Any, src: Pixels, mode: int) -> harness.Work:
    """Resize by OpenCV."""
    cv2.setNumThreads(1)
    return functools.partial(cv2.resize, src, (SIDE, SIDE), interpolation=mode)


def resizers(src: Pixels, mode: str, peers: dict[str, Any]) -> dict[str, harness.Work]:
    """Return all ways to resize an image; the first is the baseline."""
    dst = np.empty((SIDE, SIDE, 3), np.uint8)
    ways: dict[str, harness.Work] = {}
    if peers["torch"]:
        ways["torch uint8"] = torch_resize(peers["torch"], src, mode)
    if peers["PIL.Image"]:
        ways["Pillow"] = pillow_resize(peers["PIL.Image"], src, mode)
    if peers["cv2"] and mode == "bilinear":
        ways["cv2 area"] = cv2_resize(peers["cv2"], src, peers["cv2"].INTER_AREA)
        ways["cv2 linear"] = cv2_resize(peers["cv2"], src, peers["cv2"].INTER_LINEAR)
    for level in _native.simd_levels():
        work = functools.partial(evmp_resize, src, dst, filter=mode)
        ways[f"evmp {level}"] = at_level(level, work)
    if mode == "bilinear":
        ways["evmp, sizes change"] = at_level(level, evmp_changing(src, dst))
    return ways


def normalizers(src: Pixels, peers: dict[str, Any]) -> dict[str, harness.Work]:
    """Return all ways to make float32 (3, H, W) of an image; the first is the baseline."""
    scale, bias = np.float32(SCALE), np.float32(BIAS)
    dst = np.empty((3, SIDE, SIDE), np.float32)

    def in_numpy() -> object:
        return np.ascontiguousarray((src.astype(np.float32) * scale + bias).transpose(2, 0, 1))

    ways: dict[str, harness.Work] = {"numpy": in_numpy}
    if peers["torch"]:
        ways["torch"] = in_torch(peers["torch"], src)
    if peers["cv2"]:
        blob: Callable[..., object] = peers["cv2"].dnn.blobFromImage
        ways["cv2 blobFromImage"] = functools.partial(blob, src, 0.0175, mean=(123, 116, 104))
    work = functools.partial(_native.normalize, src, dst, SIDE, SIDE, scale=SCALE, bias=BIAS)
    for level in _native.simd_levels():
        ways[f"evmp {level}"] = at_level(level, work)
    return ways


def in_torch(torch: Any, src: Pixels) -> harness.Work:
    """Normalise as torchvision's transforms do."""
    image = torch.from_numpy(src).permute(2, 0, 1)
    scale, bias = (torch.tensor(values)[:, None, None] for values in (SCALE, BIAS))
    return lambda: (image.to(torch.float32, memory_format=torch.contiguous_format) * scale).add_(
        bias
    )


def main() -> None:
    """Measure every contender on every size."""
    bench = harness.Bench("resize", __doc__, ["torch", "Pillow", "opencv-python-headless", "numpy"])
    peers = {module: harness.peer(module) for module in ("torch", "PIL.Image", "cv2")}
    rng = np.random.default_rng(SEED)
    for mode in ("bilinear", "bicubic"):
        for width, height in SIZES:
            src = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            size = f"{width}x{height} {mode}"
            bench.compare(size, resizers(src, mode, peers), 1, "frames/s")
    src = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    bench.compare(f"{SIDE}x{SIDE} normalise", normalizers(src, peers), 1, "frames/s")
    bench.finish()


if __name__ == "__main__":
    main()
