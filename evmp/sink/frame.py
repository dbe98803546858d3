"""Frames: how a stage file of a Parquet output holds record batches, so that a torn one is found.

    header   magic, crc32 of the schema, rows, failed rows, bytes of the body    (24 bytes)
    body     one Arrow IPC record batch message

A frame counts when its body ends within the file: one writer appends, front to back. Walking the
headers reads no body, and needs no pyarrow.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

HEADER = struct.Struct("<4sIIIQ")
MAGIC = b"evmb"


class Frame(NamedTuple):
    """One frame; the body is at [start, stop) of the file."""

    schema_crc32: int
    n_rows: int
    n_failed: int
    start: int
    stop: int


def frame_header(schema_crc32: int, n_rows: int, n_failed: int, n_bytes: int) -> bytes:
    """Return what precedes a body of `n_bytes`."""
    return HEADER.pack(MAGIC, schema_crc32, n_rows, n_failed, n_bytes)


def frames(file: BinaryIO) -> Iterator[Frame]:
    """Yield the whole frames of `file`, up to its end or the first bytes that start none."""
    size = os.fstat(file.fileno()).st_size
    start = HEADER.size
    while start <= size:
        file.seek(start - HEADER.size)
        magic, crc32, n_rows, n_failed, n_bytes = HEADER.unpack(file.read(HEADER.size))
        stop = start + n_bytes
        if magic != MAGIC or stop > size:
            return
        yield Frame(crc32, n_rows, n_failed, start, stop)
        start = stop + HEADER.size
