"""Whether a file has been cut, by what its bytes say; FFmpeg takes the end of some for their own.

A duration in a header proves nothing, for many are wrong. What is told here no whole file has.
"""

from __future__ import annotations

import os
from typing import BinaryIO, Final

SEGMENT: Final = 0x18538067  # of Matroska, which holds all but the head
MAX_ELEMENTS: Final = 8  # ahead of it
SYNC: Final = 0x47  # each packet of a transport stream begins with it
LAST_BYTES: Final = {188: 188, 192: 188, 204: 204}
"""By the size of its packets, how many bytes of the last one follow from that byte on."""
TAIL_PACKETS: Final = 16
TAG_HEAD: Final = 11  # bytes of FLV's; each tag is followed by how many it has


def missing_end(file: BinaryIO, format: str) -> str:
    """Say how a file falls short; nothing where it does not, or its format says nothing of that.

    Args:
        file: stays where it is.
        format: FFmpeg's name of it.
    """
    position = file.tell()
    try:
        size = file.seek(0, os.SEEK_END)
        if format.startswith("matroska"):
            claimed = _end_of_segment(file)
            return f"with {size} of {claimed} bytes" if claimed > size else ""
        if format == "mpegts":
            n_bytes = min(size, TAIL_PACKETS * max(LAST_BYTES))
            tail = _read(file, size - n_bytes, n_bytes)
            return "within a packet" if _ends_within_packet(tail) else ""
        return "within a tag" if format == "flv" and _ends_within_tag(file, size) else ""
    finally:
        file.seek(position)


def _end_of_segment(file: BinaryIO) -> int:
    """Return where it is to end; 0 where that is not said, as in a live stream."""
    start = 0
    for _ in range(MAX_ELEMENTS):
        head = _read(file, start, 12)
        id_bytes = _length(head[:1])
        size_bytes = _length(head[id_bytes : id_bytes + 1])
        n_bytes, unknown = id_bytes + size_bytes, (1 << 7 * size_bytes) - 1
        if not id_bytes or not size_bytes or n_bytes > len(head):
            break
        content = int.from_bytes(head[id_bytes:n_bytes], "big") & unknown
        end = start + n_bytes + content
        if int.from_bytes(head[:id_bytes], "big") == SEGMENT:
            return 0 if content == unknown else end
        start = end
    return 0


def _length(first: bytes) -> int:
    """Return how many bytes a number has, by its first one; 0 where it is none."""
    return 9 - first[0].bit_length() if first and first[0] else 0


def _ends_within_packet(tail: bytes) -> bool:
    def are_packets(size: int, n_last: int) -> bool:
        """Say whether the tail is of packets of a size, the last of them of so many bytes."""
        return set(tail[-n_last::-size]) == {SYNC}

    if len(tail) < TAIL_PACKETS * min(LAST_BYTES):
        return False
    if any(are_packets(size, n_last) for size, n_last in LAST_BYTES.items()):
        return False
    return any(are_packets(size, n_last) for size in LAST_BYTES for n_last in range(1, size))


def _ends_within_tag(file: BinaryIO, size: int) -> bool:
    def number(start: int, n_bytes: int) -> int:
        return int.from_bytes(_read(file, start, n_bytes), "big")

    first = number(5, 4) + 4
    n_bytes = TAG_HEAD + number(first + 1, 3)
    if number(first + n_bytes, 4) != n_bytes:
        return False  # its muxer does not count like that
    n_bytes = number(size - 4, 4)
    last = size - 4 - n_bytes
    return last < first or TAG_HEAD + number(last + 1, 3) != n_bytes


def _read(file: BinaryIO, start: int, n_bytes: int) -> bytes:
    file.seek(start)
    data = b""
    while more := file.read(n_bytes - len(data)):
        data += more
    return data
