"""Objects of Alibaba Cloud OSS; see `ossclient`.

oss2 neither tries again nor compares the CRC of what is read in pieces, so that is done here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from oss2.utils import Crc64

from evmp.remote.body import read_body
from evmp.remote.failure import dismiss, told
from evmp.remote.ossclient import OssClient
from evmp.remote.retry import Again, Deadline, persist

if TYPE_CHECKING:
    from evmp.job import Job

CRC_HEADER: Final = "x-oss-hash-crc64ecma"


class OssRemote:
    """Objects behind `oss://` paths; see Remote."""

    def __init__(self, job: Job) -> None:
        self._job, self._client = job, OssClient(job, job.download_concurrency)

    def fetch(self, location: str) -> bytes:
        """Get the object; see Remote."""
        place = self._client.places.find(location)
        bucket = self._client.bucket(place)
        deadline = Deadline("download_timeout_seconds", self._job.download_timeout_seconds)
        with self._client.until(deadline):
            return persist(
                lambda: self._get(bucket, place.key, deadline),
                deadline,
                self._job.download_retries,
            )

    def cut_overdue(self) -> None:
        """Shut sockets down; see Remote."""
        self._client.cut_overdue()

    def close(self) -> None:
        """Close the session; see Remote."""
        self._client.close()

    def _get(self, bucket: Any, key: str, deadline: Deadline) -> bytes:
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
