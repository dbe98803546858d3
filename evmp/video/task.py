"""What the decoders of videos are given: segments, or what is wrong with a video as a whole.

header    row: of the input, next: the first row behind the task's own in the later rings,
          width: how many those are, kind: the task's place among those of its video, from 0,
          height: 1 with the last of them
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from evmp.errors import DecodeError, DownloadError
from evmp.payload import FetchError
from evmp.ring import Header, Ring

if TYPE_CHECKING:
    from evmp.video.segment import Segment

PIECE_BYTES: Final = 2 << 20
TROUBLES: Final = (FetchError, DownloadError, DecodeError)
"""What may be wrong with a video."""
FAILURE_BYTES: Final = 1 << 12  # of a row, that a task leaves for what give_up adds


@dataclass(frozen=True, slots=True)
class Footage:
    """Where a video is.

    Attributes:
        path: of a local file.
        url: of one elsewhere.
        cell: its number in the spool.
        n_bytes: of one in the spool.
        piece_bytes: of one elsewhere, to fetch at once.
    """

    path: str = ""
    url: str = ""
    cell: int = -1
    n_bytes: int = 0
    piece_bytes: int = PIECE_BYTES


@dataclass(frozen=True, slots=True)
class Task:
    """A segment of a video; of a failed one, or of rows that only fill a batch up, there is none.

    Attributes:
        n: the video's number in the ring of rows.
        keys: of the row.
        footage: where the video is.
        members: of a JSON line, which samples get as well.
        failure: the stage that failed and why; of a segment, that it has killed its decoders.
    """

    n: int
    keys: tuple[object, ...]
    footage: Footage = Footage()
    members: Mapping[str, Any] | None = None
    segment: Segment | None = None
    failure: tuple[str, str] | None = None


def failure_of(trouble: Exception) -> tuple[str, str]:
    """Return the stage that has failed, and why."""
    match trouble:
        case FetchError():
            return "read", str(trouble)
        case DownloadError():
            return "download", str(trouble)
        case _:
            return "decode", str(trouble)


def rows_of(header: Header) -> range:
    """Return the rows of the later rings that a task is to fill."""
    return range(header.next - header.width, header.next)


def give_up(segments: Ring, m: int, stage: str, message: str) -> None:
    """Make task m, whose last decoder has died, one that fails. For the supervisor."""
    task: Task = pickle.loads(segments.data(m))
    data = pickle.dumps(replace(task, failure=(stage, message)), protocol=pickle.HIGHEST_PROTOCOL)
    segments.payload(m)[: len(data)] = data
    segments.set_header(m, segments.header(m)._replace(length=len(data)))
