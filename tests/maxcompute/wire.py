"""The tunnel's two formats of rows: records, each with its checksum, and Arrow in checked chunks.

    records   fields in front of a checksum of theirs, row by row; a footer of rows and checksums
    Arrow     record batch messages, cut into chunks of CHUNK_BYTES, a checksum behind each

Both are written here from the format's description, and share nothing with pyodps but the CRC-32C.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from odps.tunnel.checksum import Checksum

CHUNK_BYTES = 64 << 10
BATCH_ROWS = 32
END_RECORD, META_COUNT, META_CHECKSUM = 33553408, 33554430, 33554431
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def records(table: pa.Table) -> Iterator[bytes]:
    """Yield the rows of a table as records, their columns in the table's order, and the footer."""
    sums = Checksum()
    for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
        body, crc = bytearray(), Checksum()
        for number, (value, field) in enumerate(zip(row, table.schema, strict=True), 1):
            if value is not None:
                crc.update(struct.pack("<i", number))
                kind, text = _field(value, field.type, crc)
                body += _varint(number << 3 | kind) + text
        total = crc.getvalue() & 0xFFFFFFFF
        sums.update(struct.pack("<I", total))
        yield bytes(body + _varint(END_RECORD << 3) + _varint(total))
    footer = _varint(META_COUNT << 3) + _varint(_zigzag(table.num_rows))
    yield footer + _varint(META_CHECKSUM << 3) + _varint(sums.getvalue() & 0xFFFFFFFF)


def arrow(table: pa.Table) -> Iterator[bytes]:
    """Yield the rows of a table as record batches in checked chunks."""
    yield struct.pack(">I", CHUNK_BYTES)
    total, held = Checksum(), bytearray()
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        held += batch.serialize().to_pybytes()
        while len(held) >= CHUNK_BYTES:
            chunk = bytes(held[:CHUNK_BYTES])
            del held[:CHUNK_BYTES]
            total.update(chunk)
            yield chunk + _crc(chunk)
    total.update(bytes(held))
    yield bytes(held) + struct.pack(">I", total.getvalue() & 0xFFFFFFFF)


def _field(value: Any, dtype: pa.DataType, crc: Checksum) -> tuple[int, bytes]:
    """Return the wire type and the bytes of a value, whose checksum goes on in `crc`."""
    if pa.types.is_boolean(dtype):
        crc.update(bytes([value]))
        return VARINT, _varint(value)
    if pa.types.is_integer(dtype):
        crc.update(struct.pack("<q", value))
        return VARINT, _varint(_zigzag(value))
    if pa.types.is_float32(dtype):
        crc.update(struct.pack("<f", value))
        return FIXED32, struct.pack("<f", value)
    if pa.types.is_float64(dtype):
        crc.update(struct.pack("<d", value))
        return FIXED64, struct.pack("<d", value)
    assert pa.types.is_string(dtype) or pa.types.is_binary(dtype), f"no records of {dtype} here"
    text = value.encode() if isinstance(value, str) else value
    crc.update(text)
    return BYTES, _varint(len(text)) + text


def _crc(data: bytes) -> bytes:
    crc = Checksum()
    crc.update(data)
    return struct.pack(">I", crc.getvalue() & 0xFFFFFFFF)


def _zigzag(value: int) -> int:
    return (value << 1) ^ (value >> 63)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
