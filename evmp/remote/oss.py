"""Objects of Alibaba Cloud OSS; see `ossclient`.

oss2 neither tries again nor compares the CRC of what is read in pieces, so that is done here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar

from oss2.utils import Crc64

from evmp.remote import Piece
from evmp.remote.body import read_body, size_of, version_of
from evmp.remote.connection import Until
from evmp.remote.failure import dismiss, told
from evmp.remote.ossclient import OssClient
from evmp.remote.retry import Again, Deadline, persist

if TYPE_CHECKING:
    from evmp.job import Job

T = TypeVar("T")

CRC_HEADER: Final = "x-oss-hash-crc64ecma"


class OssRemote:
    """Objects behind `oss://` paths; see Remote."""

    def __init__(self, job: Job) -> None:
        self._job, self._client = job, OssClient(job, job.download_concurrency)

    def fetch(self, location: str) -> bytes:
        """Get the object; see Remote."""
        return self._persist(location, self._whole, self._client.until)

    def fetch_piece(self, location: str, start: int, stop: int) -> Piece:
        """Get a range; see Remote."""
        return self._persist(location, partial(self._part, start, stop), self._client.keeping)

    def _persist(self, location: str, get: Callable[[Any, str, Deadline], T], until: Until) -> T:
        place = self._client.places.find(location)
        bucket = self._client.bucket(place)
        deadline = Deadline("download_timeout_seconds", self._job.download_timeout_seconds)
        with until(deadline):
            return persist(
                lambda: get(bucket, place.key, deadline),
                deadline,
                self._job.download_retries,
            )

    def cut_overdue(self) -> None:
        """Shut sockets down; see Remote."""
        self._client.cut_overdue()

    def close(self) -> None:
        """Close the session; see Remote."""
        self._client.close()

    def _part(self, start: int, stop: int, bucket: Any, key: str, deadline: Deadline) -> Piece:
        with self._client.asking(deadline):
            answer = bucket.get_object(key, headers={"Range": f"bytes={start}-{stop - 1}"})
        response, version = answer.resp.response.raw, version_of(answer.headers)
        is_part = answer.status == HTTPStatus.PARTIAL_CONTENT
        with told(deadline, self._job.read_timeout_seconds):
            try:
                limit = stop - start if is_part else self._job.max_row_bytes
                data = read_body(response, limit, deadline)
            finally:
                dismiss(response)
        if is_part:
            return Piece(start, data, size_of(answer.headers, start), version)
        return Piece(0, data, len(data), version)  # of an empty object there is no part

    def _whole(self, bucket: Any, key: str, deadline: Deadline) -> bytes:
        with self._client.asking(deadline):
            answer = bucket.get_object(key)
        response, crc = answer.resp.response.raw, Crc64(0)
        with told(deadline, self._job.read_timeout_seconds):
            try:
                body = read_body(response, self._job.max_row_bytes, deadline, crc.update)
            finally:
                dismiss(response)
        expected = answer.headers.get(CRC_HEADER)
        if expected is not None and int(expected) != crc.crc:
            raise Again("the object has come with another CRC64 than it has")
        return body
