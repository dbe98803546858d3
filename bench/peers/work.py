"""What every peer does with a row, and the frame of a peer's process.

W1 is Base64, JPEG, antialiased resize to 224 x 224, float32 planes, consumed. W2 goes on through a
network and writes a JSON line for each row; W3 does so through a larger one on a GPU (gpu.py). The
functions here are the fastest of those that the peers' users have at hand and that do the same
work: pybase64, simplejpeg, and for the resize cv2's INTER_AREA or torch's antialias, the only fast
ones that do not alias (see bench/README.md).

A peer is a script with a function `run(task, sink)`. It is started with one argument, the task as
JSON, and leaves a report: how many rows, what they looked like, when the first was consumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pybase64
import simplejpeg
from task import Task, look, parse, write_report

SIDE = 224
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
SCALE = (1 / (255 * STD)).reshape(3, 1, 1)
BIAS = (-MEAN / STD).reshape(3, 1, 1)
TOP = 5
BATCH_ROWS = 16
AT_ONCE = 4

Array = np.ndarray[Any, Any]


# --- rows ----------------------------------------------------------------------------------------


def read_cells(table: str, n_rows: int = 64) -> Iterator[tuple[str, memoryview]]:
    """Yield id and image of each row; the image is a view, no copy."""
    # Without these it holds the compressed bytes of the whole table, in the end.
    with pq.ParquetFile(table, pre_buffer=False, buffer_size=1 << 20) as file:
        for records in file.iter_batches(n_rows, columns=["id", "image"], use_threads=False):
            yield from zip(records["id"].to_pylist(), views(records["image"]), strict=True)


def views(column: pa.Array) -> list[memoryview]:
    """Return views of the cells of a text column."""
    return [memoryview(cell.as_buffer()) for cell in column.cast(pa.binary())]


def decode(cell: Any) -> Array:
    """Turn Base64 of a JPEG into (H, W, 3) uint8."""
    data = pybase64.b64decode(cell, validate=True)
    # Where a smaller scale is at least as good, it is faster; other factors than 1/2 are slower.
    return simplejpeg.decode_jpeg(data, "RGB", min_height=SIDE, min_width=SIDE, min_factor=2)


def resizer(kind: str) -> Callable[[Array], Array]:
    """Return the function from (H, W, 3) to (224, 224, 3) uint8, antialiased, on one thread."""
    if kind == "cv2":
        import cv2

        cv2.setNumThreads(1)
        return lambda image: cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    import torch
    from torch.nn.functional import interpolate

    def resize(image: Array) -> Array:
        planes = torch.from_numpy(image).permute(2, 0, 1)[None]
        small = interpolate(planes, (SIDE, SIDE), mode="bilinear", antialias=True)
        return small[0].permute(1, 2, 0).numpy()

    return resize


def normalise(pixels: Array, planes: Array | None = None) -> Array:
    """Turn (224, 224, 3) uint8 into (3, 224, 224) float32."""
    planes = np.empty((3, SIDE, SIDE), np.float32) if planes is None else planes
    np.multiply(pixels.transpose(2, 0, 1), SCALE, out=planes)
    planes += BIAS
    return planes


def preparer(kind: str) -> Callable[[Any], Array]:
    """Return the function from Base64 to (3, 224, 224) float32."""
    resize = resizer(kind)
    return lambda cell: normalise(resize(decode(cell)))


# --- the network ---------------------------------------------------------------------------------


def load_network(path: str, n_threads: int) -> Callable[[Sequence[Array]], Array]:
    """Return a function from N times (3, 224, 224) to scores (N, 1000).

    It is as fast as torch can be told to be: four images at once take an eighth less time each than
    one alone, and more are not faster.
    """
    import torch

    torch.set_num_threads(n_threads)
    module = torch.jit.load(path).eval().to(memory_format=torch.channels_last)
    module = torch.jit.freeze(module)

    def predict(planes: Array) -> Array:
        with torch.inference_mode():
            batch = torch.from_numpy(planes).contiguous(memory_format=torch.channels_last)
            return module(batch).numpy()

    def in_fours(planes: Sequence[Array]) -> Array:
        starts = range(0, len(planes), AT_ONCE)
        return np.concatenate([predict(np.stack(planes[i : i + AT_ONCE])) for i in starts])

    predict(np.zeros((AT_ONCE, 3, SIDE, SIDE), np.float32))
    return in_fours


def to_line(name: str, scores: Array) -> bytes:
    """Write a row's result: its best classes with their probabilities."""
    values = np.exp(scores - scores.max())
    values /= values.sum()
    best = np.argsort(-values)[:TOP]
    probs = {str(number): float(values[number]) for number in best}
    result = {"class": int(best[0]), "class_probs": probs}
    return orjson.dumps({"id": name, "prediction_result": result}) + b"\n"


# --- where the rows end --------------------------------------------------------------------------


class Sink(Protocol):
    """Takes what a peer has made."""

    def take(self, names: Sequence[str], arrays: Sequence[Array]) -> None:
        """Take rows; W1: (3, 224, 224) float32 each; W2: (1000,) scores each."""

    def count(self, n_rows: int, total: float) -> None:
        """Count rows that a process of the peer has consumed already."""


class Consumed:
    """The sink of W1: looks at some pixels of each row."""

    def __init__(self) -> None:
        self.rows, self.total, self.first = 0, 0.0, 0.0

    def take(self, names: Sequence[str], arrays: Sequence[Array]) -> None:
        self.count(len(arrays), sum(look(array) for array in arrays))

    def count(self, n_rows: int, total: float) -> None:
        self.first = self.first or time.monotonic()
        self.rows += n_rows
        self.total += total


class Written(Consumed):
    """The sink of W2: a line for each row."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file

    def take(self, names: Sequence[str], arrays: Sequence[Array]) -> None:
        self._file.writelines(map(to_line, names, arrays))
        self.count(len(arrays), 0.0)


def main(run: Callable[[Task, Sink], None]) -> None:
    """Run a peer."""
    task = parse()
    with open(task.out, "wb") as file:
        sink = Consumed() if task.work == "w1" else Written(file)
        run(task, sink)
    finished = time.monotonic()
    write_report(task, rows=sink.rows, total=sink.total, first=sink.first, finished=finished)
