"""The tunnel's two formats of rows: records, each with its checksum, and Arrow in checked chunks.

    records   fields in front of a checksum of theirs, row by row; a footer of rows and checksums
    Arrow     record batch messages, cut into chunks of CHUNK_BYTES, a checksum behind each

Both are written and read here from the format's description, and share nothing with pyodps but the
CRC-32C. What comes in is refused unless all of it is there, with every checksum right.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from odps.tunnel.checksum import Checksum

from maxcompute.signature import Refused

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


def read_arrow(data: bytes, schema: pa.Schema) -> pa.Table:
    """Return the rows that a client has sent as record batches in checked chunks.

    Raises:
        Refused: when something is missing or damaged.
    """
    (size,) = struct.unpack_from(">I", data) if len(data) > 4 else (0,)
    body, total, start = bytearray(), Checksum(), 4 if len(data) > 4 else 0
    while len(data) - 4 - start >= size + 4 and size:
        chunk = data[start : start + size]
        _check(_crc(chunk) == data[start + size : start + size + 4], "The checksum of a chunk")
        body += chunk
        start += size + 4
    body += data[start:-4]
    total.update(bytes(body))
    expected = struct.pack(">I", total.getvalue() & 0xFFFFFFFF)
    _check(expected == data[-4:], "The checksum of the stream")
    with pa.ipc.open_stream(schema.serialize().to_pybytes() + bytes(body)) as stream:
        rows = stream.read_all()
    rows.validate(full=True)
    return rows


def read_records(data: bytes, schema: pa.Schema) -> pa.Table:
    """Return the rows that a client has sent as records.

    Raises:
        Refused: when something is missing or damaged.
    """
    rows: list[dict[str, Any]] = []
    row: dict[str, Any] = {}
    at, crc, sums, is_whole = 0, Checksum(), Checksum(), False
    while at < len(data) and not is_whole:
        tag, at = _read_varint(data, at)
        if tag >> 3 == END_RECORD:
            found, at = _read_varint(data, at)
            total = crc.getvalue() & 0xFFFFFFFF
            _check(found & 0xFFFFFFFF == total, "The checksum of a record")
            sums.update(struct.pack("<I", total))
            rows.append(row)
            row, crc = {}, Checksum()
        elif tag >> 3 == META_COUNT:
            found, at = _read_varint(data, at)
            _check(found == _zigzag(len(rows)), "The number of records")
        elif tag >> 3 == META_CHECKSUM:
            found, at = _read_varint(data, at)
            total = sums.getvalue() & 0xFFFFFFFF
            _check(found & 0xFFFFFFFF == total, "The checksum of all records")
            is_whole = at == len(data)
        else:
            crc.update(struct.pack("<i", tag >> 3))
            _check(0 < tag >> 3 <= len(schema), "The number of a column")
            field = schema[(tag >> 3) - 1]
            row[field.name], at = _read_field(data, at, field.type, crc)
    _check(is_whole, "The stream")
    return pa.Table.from_pylist(rows, schema)


def _check(is_right: bool, what: str) -> None:
    if not is_right:
        raise Refused(400, "DataChecksumError", f"{what} is wrong.")


def _read_field(data: bytes, at: int, dtype: pa.DataType, crc: Checksum) -> tuple[Any, int]:
    """Return a value and where it ends; its checksum goes on in `crc`."""
    if pa.types.is_boolean(dtype) or pa.types.is_integer(dtype):
        number, at = _read_varint(data, at)
        if pa.types.is_boolean(dtype):
            crc.update(bytes([number]))
            return bool(number), at
        number = (number >> 1) ^ -(number & 1)
        crc.update(struct.pack("<q", number))
        return number, at
    if pa.types.is_floating(dtype):
        form = "<f" if pa.types.is_float32(dtype) else "<d"
        text = data[at : at + struct.calcsize(form)]
        _check(len(text) == struct.calcsize(form), "The stream")
        crc.update(text)
        return struct.unpack(form, text)[0], at + len(text)
    size, at = _read_varint(data, at)
    text = data[at : at + size]
    _check(len(text) == size, "The stream")
    crc.update(text)
    return text.decode() if pa.types.is_string(dtype) else text, at + size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        _check(at < len(data), "The stream")
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


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
