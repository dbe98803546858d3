"""What a row's payload stands for: a file of this machine, or the bytes that Base64 holds."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from evmp import _native
from evmp.errors import DecodeError

if TYPE_CHECKING:
    from evmp.image import Buffer
    from evmp.job import Job


class FetchError(Exception):
    """A row's bytes cannot be had; the message becomes its `error_msg`."""


def open_regular(path: str, limit: int, key: str) -> tuple[int, int]:
    """Open a regular file; a pipe or a device never blocks the stage.

    Args:
        limit: bytes that it may have, as the job's `key` says.

    Returns: its descriptor, and its size in bytes.

    Raises:
        FetchError: it is no file, is too large, or cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check(path, os.fstat(fd), limit, key)
            return fd, os.fstat(fd).st_size
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: str, error: OSError) -> FetchError:
    """Return what to say of a file that the system does not give."""
    return FetchError(f"{path!r}: {os.strerror(error.errno or 0).lower()}")


def _check(path: str, status: os.stat_result, limit: int, key: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise FetchError(f"{path!r}: not a file")
    if status.st_size > limit:
        raise FetchError(f"{path!r}: {status.st_size} bytes exceed {key} {limit}")


def decode_base64(job: Job, payload: memoryview, scratch: bytearray) -> int:
    """Decode a row's Base64 into `scratch`, of base64_room(payload) bytes. Returns how many came.

    Raises:
        DecodeError: it is none.
    """
    try:
        return _native.base64_decode(
            payload,
            scratch,
            url=job.base64_url_alphabet,
            whitespace=job.base64_whitespace,
        )
    except _native.Base64Error as error:
        remedy = _remedy(bytes(payload[error.position : error.position + 1]))
        raise DecodeError(f"not Base64: {error}{remedy}") from None


def base64_room(payload: Buffer) -> int:
    """Return how many bytes are enough for what Base64 holds."""
    return len(payload) // 4 * 3 + 3


def _remedy(character: bytes) -> str:
    """Name the key that lets a character pass that strict Base64 has not, if there is one."""
    if character.isspace():
        return "; base64_whitespace: true skips it"
    if character in (b"-", b"_"):
        return "; base64_url_alphabet: true reads it"
    return ""
