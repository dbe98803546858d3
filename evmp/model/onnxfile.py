"""What an ONNX file says about itself, read without onnx or onnxruntime.

An ONNX file is one protocol buffer: fields, each a number, a type and, mostly, a length. Walking
them tells a whole file from a truncated one, and finds the files that hold its weights where they
are not within, `external data`. Only the few numbers below are known here; the rest is skipped.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from evmp.errors import ModelError
from evmp.setting import show

# Every serializer begins with field 1, a varint: the version of the format.
START: Final = b"\x08"
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FIXED_SIZE: Final = {FIXED64: 8, FIXED32: 4}
GRAPH: Final = 7  # the field of a model that it cannot do without

# Which fields of a message hold messages that hold tensors, all the way down from the model.
PARTS: Final = {
    "model": {GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
EXTERNAL_DATA: Final = 13  # of a tensor: keys (1) and values (2), one of which is the location


class Malformed(Exception):
    """The bytes are no protocol buffer, or not a whole one."""


def check_whole(file: Path) -> None:
    """Refuse a file that begins as ONNX and does not go on or end so.

    Raises:
        ModelError: it is truncated, damaged, or something else.
        OSError: it cannot be read.
    """
    try:
        numbers = {number for number, _ in fields(_mapped(file))}
    except Malformed as error:
        raise _damaged(file, error) from None
    if GRAPH not in numbers:
        raise ModelError(f"{file}: no ONNX model, there is no graph in it; export it again")


def external_files(file: Path) -> tuple[Path, ...]:
    """Return the files beside an ONNX file that hold its weights; most have none.

    Raises:
        ModelError: one of them is missing or lies outside of the file's directory, or the file
            itself is damaged.
        OSError: it cannot be read.
    """
    try:
        places = {
            place
            for tensor in _tensors("model", _mapped(file))
            for place in [_location(tensor)]
            if place
        }
    except (Malformed, RecursionError, UnicodeDecodeError) as error:
        raise _damaged(file, error) from None
    return tuple(_inside(file, place) for place in sorted(places))


def fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and the content of each field of a message; a varint's content is empty.

    Raises:
        Malformed: a field does not end within the message, or is none.
    """
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        size = FIXED_SIZE.get(kind, 0)
        if kind in (VARINT, BYTES):
            value, place = _varint(data, place)
            size = value if kind == BYTES else 0
        elif kind not in FIXED_SIZE:
            raise Malformed(f"field {number} is of no known type")
        if place + size > len(data):
            raise Malformed(f"{place + size - len(data)} bytes are missing at its end")
        yield number, data[place : place + size]
        place += size


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{file}: a truncated or damaged ONNX file ({error}); copy or export it again"
    )


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Read a number of seven bits a byte; return it and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if place == len(data):
            raise Malformed("it ends within a number")
        value |= (data[place] & 127) << shift
        place += 1
        if data[place - 1] < 128:
            return value, place
    raise Malformed("a number is too long")


def _tensors(kind: str, data: memoryview) -> Iterator[memoryview]:
    if kind == "tensor":
        yield data
        return
    for number, content in fields(data):
        if number in PARTS[kind]:
            yield from _tensors(PARTS[kind][number], content)


def _location(tensor: memoryview) -> str:
    """Return the file that holds a tensor's values; empty where the tensor itself does."""
    entries = [dict(fields(content)) for n, content in fields(tensor) if n == EXTERNAL_DATA]
    named = {bytes(it.get(1, b"")): str(it.get(2, b""), "utf-8") for it in entries}
    return named.get(b"location", "")


def _inside(file: Path, place: str) -> Path:
    """Return the path of a file of external data, which must lie beside or below the model."""
    path, relative = file.parent / place, PurePosixPath(place)
    problem = ""
    if relative.is_absolute() or ".." in relative.parts or "\0" in place:
        problem = "leads out of the model's directory"
    elif not path.is_file():
        problem = "is not a file there"
    # The model may itself be a link into a store, whose other files are then beside it.
    elif not any(path.resolve().is_relative_to(it) for it in _homes(file)):
        problem = "is a link out of the model's directory"
    if problem:
        raise ModelError(
            f"{file}: its external data {show(place)} {problem}; put the file beside the model, or "
            "export the model with its weights inside"
        )
    return path


def _homes(file: Path) -> tuple[Path, Path]:
    return file.parent.resolve(), file.resolve().parent


def _mapped(file: Path) -> memoryview:
    with open(file, "rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
