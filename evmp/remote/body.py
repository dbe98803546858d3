"""The body of an answer, taken in as it comes: no more than it may be, and no later.

The other side decides what it sends: more than announced, less, without end, or packed so that it
grows a thousandfold. So all is counted as it comes, packed and unpacked.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from evmp.errors import DownloadError
from evmp.remote.retry import Again, Deadline

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

CHUNK_BYTES: Final = 256 << 10
SLICE_BYTES: Final = 16 << 10  # of a chunk; what is behind the end of a stream is copied each time
_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+)")
_PACKED: Final = ("gzip", "x-gzip", "deflate")


def read_body(
    response: BaseHTTPResponse,
    limit: int,
    deadline: Deadline,
    watch: Callable[[bytes], object] = lambda chunk: None,
) -> bytes:
    """Return the body, unpacked; see stream_body. The limit is that of `max_row_bytes`."""
    return b"".join(stream_body(response, "max_row_bytes", limit, deadline, watch))


def stream_body(
    response: BaseHTTPResponse,
    key: str,
    limit: int,
    deadline: Deadline,
    watch: Callable[[bytes], object] = lambda chunk: None,
) -> Iterator[bytes]:
    """Yield the body, unpacked, in pieces.

    Args:
        response: its head has come; opened without preloading or decoding.
        key: of the job, which sets the limit.
        limit: the most bytes.
        deadline: that of the whole download.
        watch: called with each chunk as it comes over the wire.

    Raises:
        DownloadError: when the body is too large or packed in an unknown way, or time is over.
        Again: when it is cut short.
        zlib.error: when what is packed is damaged.
    """
    announced = getattr(response, "length_remaining", None)
    if announced is not None and announced > limit:
        raise DownloadError(f"{announced} bytes exceed {key}, {limit}")
    unpacker = _unpacker(response)
    n_come, n_bytes = 0, 0
    while chunk := response.read1(CHUNK_BYTES, decode_content=False):
        deadline.check()
        watch(chunk)
        n_come += len(chunk)
        piece = unpacker.unpack(chunk, limit + 1 - n_bytes) if unpacker else chunk
        n_bytes += len(piece)
        if max(n_come, n_bytes) > limit:
            raise DownloadError(f"more bytes come than {key}, {limit}")
        yield piece
    deadline.check()  # whoever has cut the connection off, the body ends there
    if not n_bytes and announced is None and not getattr(response, "chunked", False):
        raise Again("the answer is empty")
    if unpacker and not unpacker.is_whole:
        raise Again(f"the {response.headers['content-encoding']} stream is cut short")


def size_of(headers: Mapping[str, str], start: int) -> int:
    """Return the size of the file that a part comes of.

    Raises:
        DownloadError: another part comes than was asked for, or the size is not told.
    """
    told = _RANGE.fullmatch(headers.get("content-range", "").strip())
    if not told or int(told[1]) != start:
        raise DownloadError("another part of the file comes than was asked for")
    return int(told[2])


def version_of(headers: Mapping[str, str]) -> str:
    """Return what tells a version of a file from others."""
    return headers.get("etag", "") or headers.get("last-modified", "")


class _Unpacker:
    """gzip or zlib, told by their first bytes; several streams may stand one behind the other."""

    def __init__(self) -> None:
        self._begin()

    @property
    def is_whole(self) -> bool:
        """Whether the last stream has come to its end."""
        return self._stream.eof

    def unpack(self, chunk: bytes, limit: int) -> bytes:
        """Return what is packed in the next chunk; no more than `limit` bytes, at least 1."""
        pieces = list[bytes]()
        for start in range(0, len(chunk), SLICE_BYTES):
            rest = chunk[start : start + SLICE_BYTES]
            while rest and limit:
                if self._stream.eof:
                    rest = rest.lstrip(b"\0")  # which some put between, or at the end
                    if not rest:
                        break
                    self._begin()
                pieces.append(self._stream.decompress(rest, min(limit, sys.maxsize)))
                limit -= len(pieces[-1])
                rest = self._stream.unused_data
        return b"".join(pieces)

    def _begin(self) -> None:
        self._stream = zlib.decompressobj(zlib.MAX_WBITS | 32)


def _unpacker(response: BaseHTTPResponse) -> _Unpacker | None:
    """Return what unpacks the body, None where it is not packed."""
    packing = response.headers.get("content-encoding", "identity").strip().lower()
    if packing in _PACKED:
        return _Unpacker()
    if packing not in ("", "identity"):
        raise DownloadError(f"packed by {packing!r:.40}, expected {' or '.join(_PACKED)} or none")
    return None
