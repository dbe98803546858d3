"""What travels beside the results of a video, in the notes of the last ring.

A note is the row's key columns, and behind them a Part: so that whoever wants a key finds it where
the notes of images have it.
"""

from __future__ import annotations

import pickle
from enum import IntEnum
from typing import Any, NamedTuple

from evmp.ring import Ring


class Of(IntEnum):
    """What a result is of."""

    ROW = 0  # the video as a whole, which has failed
    ITEM = 1  # a frame or clip
    END = 2  # the video, all of whose frames have come


class Part(NamedTuple):
    """A result's place in the result of its video.

    Attributes:
        n: the video's number in the ring of rows.
        of: what the result is of.
        label: tells the files of one video's frames or clips apart.
        head: the members of a frame or clip that stand before its result, a JSON object without
            its closing brace.
        damage: the stage that has failed first in the video's segment, and why, as far as that is
            known.
        shape: height and width of the frame as it is displayed, or of the clip's last.
    """

    n: int
    of: Of
    label: str = ""
    head: bytes = b""
    damage: tuple[str, str] | None = None
    shape: tuple[int, int] | None = None


def leave_part(results: Ring, n: int, keys: tuple[object, ...], part: Part) -> None:
    """Leave a note with row n of the last ring."""
    results.set_note(n, pickle.dumps((*keys, tuple(part)), protocol=pickle.HIGHEST_PROTOCOL))


def part_of(note: tuple[object, ...]) -> tuple[tuple[object, ...], Part]:
    """Return the key columns and the part of a note."""
    part: Any = note[-1]
    return note[:-1], Part(*part)
