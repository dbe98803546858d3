"""What the crash fuzz feeds a worker, and what must come out of it.

The stages are the production ones. What they load at their start is replaced here by something
quick whose every byte follows from the row's number: rows, an image decoder, a model, and a sink
whose appends reach the file in two pieces, so that a kill can tear them. `expected_line` says what
the output holds for a row, whoever has died on the way.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from evmp.errors import DecodeError
from evmp.key import KeyField
from evmp.model import Pending
from evmp.sink import Record, Recovered, Sink, open_sink
from evmp.source import Kind, Row
from evmp.stage import error_result

SIDE: Final = 4  # pixels of the model's input, each way
KEYS: Final = (KeyField("image"),)
LARGE: Final = 3 * 4096  # of some payloads and results; longer than what a slot keeps here
KEEP_BYTES: Final = 4096
PAUSE_SECONDS: Final = 0.002  # of the source before some rows, so that batches are filled up
FLUSH_NS: Final = 1_500_000
LONG_EVERY = 61  # rows: one has a key, and with it a result, that a slot does not keep
MAX_BLOCK_BYTES: Final = 100_000  # about 100 rows: less than most blocks have


@dataclass(frozen=True, slots=True)
class World:
    """What is special about some rows.

    Attributes:
        segfaults: rows that kill every decoder.
        aborts: rows that kill every predictor.
        hangs: rows that no decoder comes back from.
    """

    segfaults: frozenset[int] = frozenset()
    aborts: frozenset[int] = frozenset()
    hangs: frozenset[int] = frozenset()


# --- what a row is --------------------------------------------------------------------------------


def raw(row: int) -> bytes:
    """Return the "image file" of a row: its number, then noise."""
    noise = hashlib.blake2b(row.to_bytes(8, "little")).digest()
    length = LARGE if row % 59 == 11 else 8 + row % 120
    return row.to_bytes(8, "little") + (noise * (length // len(noise) + 1))[:length]


def size(row: int) -> tuple[int, int]:
    """Return the height and width of a row's "image"."""
    return 1 + row % 1009, 1 + row % 1013


def pixels(data: bytes) -> bytes:
    """Return the (SIDE, SIDE, 3) uint8 that an image becomes."""
    return hashlib.blake2b(data, digest_size=SIDE * SIDE * 3).digest()


def key(row: int) -> str:
    """Return the value of a row's key column."""
    return f"row {row}" + " of many" * (3000 if row % LONG_EVERY == 13 else 0)


def result(row: int) -> bytes:
    """Return the result of a row."""
    if row % 41 == 3:
        return error_result("read", f"row {row} is bad")
    if row % 43 == 5:
        return error_result("decode", f"row {row} is no image")
    if row % 47 == 7:
        return error_result("predict", f"ValueError: no prediction for {row}")
    return answer(row, pixels(raw(row)), size(row))


def answer(row: int, frame: bytes, size: tuple[int, int]) -> bytes:
    """Return the JSON that the "head" makes of a row."""
    return orjson.dumps(answer_of(row, frame, size))


def answer_of(row: int, frame: bytes, size: tuple[int, int]) -> dict[str, Any]:
    """Return what that JSON says."""
    padding = LARGE if row % 53 == 9 or row % LONG_EVERY == 13 else 0
    return {"pixels": frame.hex(), "size": size, "padding": "x" * padding}


def expected_line(row: int, result: bytes) -> bytes:
    """Return the line of the output for a row."""
    return b'{"image":%s,"prediction_result":%s}\n' % (orjson.dumps(key(row)), result)


# --- what the stages load -------------------------------------------------------------------------


class Rows:
    """A source of any number of rows."""

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """Yield the rows [start, stop)."""
        for row in range(start, stop):
            if row % 67 == 2:
                time.sleep(PAUSE_SECONDS)
            if row % 41 == 3:
                yield Row(row, Kind.ERROR, b"row %d is bad" % row, (key(row),))
            else:
                yield Row(row, Kind.BASE64, base64.b64encode(raw(row)), (key(row),))


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded "image"."""

    pixels: bytes | tuple[bytes, tuple[int, int]]
    height: int
    width: int


class Decoding:
    """An image decoder: the pixels are a digest of the file."""

    def __init__(self, world: World) -> None:
        self._world = world

    def decode(self, data: memoryview, *enough: int) -> Picture:
        """Decode the "image", or die of it; for a sample, its size is part of what it holds."""
        row = int.from_bytes(data[:8], "little")
        if row in self._world.segfaults:
            ctypes.string_at(0)
        if row in self._world.hangs:
            time.sleep(3600)
        if row % 43 == 5:
            raise DecodeError(f"row {row} is no image")
        frame = pixels(bytes(data))
        return Picture(frame if enough else (frame, size(row)), *size(row))


class Fitting:
    """Writes the pixels in two steps, so that a kill finds them half written."""

    enough = (SIDE, SIDE)

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the model's size."""
        return SIDE, SIDE

    def into(self, frame: Picture, place: memoryview) -> None:
        """Write the pixels of a row to its place in the batch."""
        half = len(frame.pixels) // 2
        place[:half] = frame.pixels[:half]
        place[half:] = frame.pixels[half:]


class Model:
    """A model that returns its input. It knows a row by the digest that its pixels are.

    It works by itself on what is started, and as late as it may: when the result is waited for.
    """

    rows_at_once = 3
    is_asynchronous = True

    def __init__(self, world: World) -> None:
        self._aborts = {pixels(raw(row)) for row in world.aborts}

    def warm_up(self) -> list[dict[str, Any]]:
        """Return nothing that the head would need."""
        return []

    def predict(self, frames: np.ndarray, rows: Sequence[int]) -> list[bytes]:
        """Return the pixels of some rows of a batch."""
        found = [frames[row].tobytes() for row in rows]
        if not self._aborts.isdisjoint(found):
            ctypes.string_at(0)
        return found

    def start(self, frames: np.ndarray, rows: Sequence[int]) -> Pending[list[bytes]]:
        """Begin to predict."""
        return Pending(partial(self.predict, frames, rows))

    def pin(self, memory: memoryview) -> None:
        """Do without."""

    def close(self) -> None:
        """Keep nothing."""


class Head:
    """Makes results; a row whose size is that of a row without a prediction raises."""

    def check(self, outputs: object) -> None:
        """Accept anything."""

    def results(self, outputs: Sequence[bytes], sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return a result for each row."""
        return [self._result(*pair) for pair in zip(outputs, sizes, strict=True)]

    def _result(self, frame: bytes, found: tuple[int, int]) -> bytes:
        row = row_of(found)
        if row % 47 == 7:
            raise ValueError(f"no prediction for {row}")
        return answer(row, frame, found)


def row_of(size: tuple[int, int]) -> int:
    """Return the row that has this size, below 1009 * 1013 (by the Chinese remainder theorem)."""
    height, width = size[0] - 1, size[1] - 1
    return height + 1009 * ((width - height) * pow(1009, -1, 1013) % 1013)


class TearingSink:
    """The JSON lines of production, whose appends take two writes."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def append(self, file: io.RawIOBase, records: Sequence[Record]) -> None:
        """Append the records."""
        self._sink.append(Torn(file), records)  # type: ignore[arg-type]

    def recover(self, path: Path) -> Recovered:
        """Cut off a torn end."""
        return self._sink.recover(path)


class Torn:
    """A raw file that takes about half of what it is given, as the contract of write allows."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self.name = "stage file"

    def write(self, data: memoryview) -> int | None:
        """Write some of the data."""
        return self._file.write(data[: len(data) // 2 + 1])


def loaded(world: World) -> dict[str, object]:
    """Return what replaces what, by the full name of the latter."""
    return {
        "evmp.reader.open_source": lambda job, planned: Rows(),
        "evmp.reader.FLUSH_NS": FLUSH_NS,
        "evmp.decoder.ImageDecoder": lambda limit, fast: Decoding(world),
        "evmp.decoder.KEEP_BYTES": KEEP_BYTES,
        "evmp.processor.KEEP_BYTES": KEEP_BYTES,
        "evmp.predictor.KEEP_BYTES": KEEP_BYTES,
        "evmp.pipeline.Fit": lambda spec: Fitting(),
        "evmp.engine.Fit": lambda spec: Fitting(),
        "evmp.model.preload": lambda package: None,
        "evmp.model.open_model": lambda *arguments: Model(world),
        "evmp.head.open_head": lambda package, job: Head(),
        "evmp.writer.open_sink": lambda job, keys: TearingSink(open_sink(job, keys)),
        "evmp.writer.KEEP_BYTES": KEEP_BYTES,
        "evmp.writer.MAX_BLOCK_BYTES": MAX_BLOCK_BYTES,
    }
