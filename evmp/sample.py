"""Samples: what the stages hand on where users' code takes part, or a model wants whole images.

A sample is a dict as the user's code sees it: images as (H, W, 3) uint8 RGB at their own size, file
objects, numbers, text. A row holds the list of its samples, one at first; a process of the user may
make more of them. In the ring it is a pickle whose large buffers lie beside it:

    u64 n | u64 bytes of the pickle, of each of n buffers | pickle | buffers, each at 64 bytes

so that pixels are copied once on their way in, and once on their way out: what comes out is the
reader's own, and writable.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

Sample: TypeAlias = "dict[Any, Any]"

KEEP_BYTES: Final = 4 << 20  # memory that a row may keep after a large sample
ALIGNMENT: Final = 64
_WORD: Final = struct.Struct("<Q")


class SampleTooLarge(Exception):
    """A row's samples do not fit the place that a row has."""


def pack(samples: Sequence[Sample], place: memoryview) -> int:
    """Write the samples of a row to its place. Returns how many bytes that took.

    Raises:
        SampleTooLarge: they need more; what the place holds then is undefined.
        Exception: whatever pickling raises where a sample holds what cannot be pickled.
    """
    buffers: list[memoryview] = []
    body = pickle.dumps(list(samples), protocol=5, buffer_callback=lambda it: _keep(it, buffers))
    parts: list[bytes | memoryview] = [body, *buffers]
    sizes = [len(part) for part in parts]
    head = _WORD.pack(len(buffers)) + b"".join(map(_WORD.pack, sizes))
    *starts, end = _places(len(head), sizes)
    if end > len(place):
        raise SampleTooLarge(
            f"a sample of {end} bytes exceeds the {len(place)} that a row may have"
        )
    place[: len(head)] = head
    for start, part in zip(starts, parts, strict=True):
        place[start : start + len(part)] = part
    return end


def unpack(data: memoryview) -> list[Sample]:
    """Return the samples of a row; nothing of them is the ring's memory any more.

    Raises:
        Exception: whatever unpickling raises, of a class of the user's, say.
    """
    (n_buffers,) = _WORD.unpack_from(data)
    head = (n_buffers + 2) * _WORD.size
    sizes = [_WORD.unpack_from(data, (i + 1) * _WORD.size)[0] for i in range(n_buffers + 1)]
    *starts, _ = _places(head, sizes)
    body, *buffers = (data[start : start + size] for start, size in zip(starts, sizes, strict=True))
    samples: list[Sample] = pickle.loads(body, buffers=[bytearray(it) for it in buffers])
    return samples


def _keep(buffer: pickle.PickleBuffer, buffers: list[memoryview]) -> bool:
    """Take a buffer out of the pickle; True leaves one that is not contiguous in it."""
    try:
        buffers.append(buffer.raw())
    except BufferError:
        return True
    return False


def _places(head: int, sizes: Sequence[int]) -> Iterator[int]:
    """Yield where each part starts, and where the last one ends."""
    end = head
    for size in sizes:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        yield start
        end = start + size
    yield end
