"""H.264 whose pictures are fields, one packet each, which no encoder at hand makes.

All is put into the stream as it is (I_PCM): the samples of a field have one value.
"""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BLOCKS = 2  # of 16 x 16 samples, high and wide, in a field


class Bits:
    """Writes a payload, bit by bit."""

    def __init__(self) -> None:
        self._bits: list[int] = []

    def fixed(self, size: int, *values: int) -> Bits:
        for value in values:
            self._bits += [value >> i & 1 for i in reversed(range(size))]
        return self

    def golomb(self, *values: int) -> Bits:
        for value in values:
            size = (value + 1).bit_length()
            self.fixed(2 * size - 1, value + 1)
        return self

    def align(self) -> Bits:
        return self.fixed(-len(self._bits) % 8, 0)

    def unit(self, head: int) -> bytes:
        self.fixed(1, 1).align()
        unit = bytearray()
        for byte in np.packbits(self._bits).tolist():
            if byte <= 3 and unit[-2:] == b"\0\0":
                unit.append(3)
            unit.append(byte)
        return b"\0\0\0\1" + bytes([head, *unit])


def parameters() -> bytes:
    main, level = 77, 30
    sequence = Bits().fixed(8, main, 0, level).golomb(0, 0, 0, 4, 1).fixed(1, 0)
    sequence.golomb(BLOCKS - 1, BLOCKS - 1).fixed(1, 0, 0, 1, 0, 0)
    picture = Bits().golomb(0, 0).fixed(1, 0, 0).golomb(0, 0, 0).fixed(3, 0)
    picture.golomb(0, 0, 0).fixed(1, 1, 0, 0)
    return sequence.unit(0x67) + picture.unit(0x68)


def field(frame: int, is_bottom: bool) -> bytes:
    is_first = frame == 0 and not is_bottom
    bits = Bits().golomb(0, 7, 0).fixed(4, frame % 16).fixed(1, 1, is_bottom)
    if is_first:
        bits.golomb(0)
    bits.fixed(8, (2 * frame + is_bottom) % 256).fixed(1, *([0, 0] if is_first else [0]))
    bits.golomb(0, 1)
    for _ in range(BLOCKS * BLOCKS):
        bits.golomb(25).align().fixed(8, *[20 + 5 * frame + is_bottom] * 256, *[128] * 128)
    return bits.unit(0x65 if is_first else 0x61)


def make_field_clip(n_frames: int, format: str) -> bytes:
    """Return a file of 25 frames, 50 fields a second."""
    with (
        tempfile.NamedTemporaryFile() as file,
        av.open(file.name, "w", format=format) as container,
    ):
        stream: Any = container.add_stream("libx264", rate=25)
        stream.height, stream.width = 32 * BLOCKS, 16 * BLOCKS
        for number in range(2 * n_frames):
            data = field(number // 2, number % 2 == 1)
            packet = av.Packet(data if number else parameters() + data)
            packet.stream, packet.time_base = stream, Fraction(1, 50)
            packet.pts = packet.dts = number
            packet.is_keyframe = number == 0
            container.mux(packet)
        container.close()
        return Path(file.name).read_bytes()
