"""Objects of Alibaba Cloud OSS; see `ossclient`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evmp.remote import Piece
from evmp.remote.connection import Until
from evmp.remote.ossclient import OssClient
from evmp.remote.retry import Deadline, persist

if TYPE_CHECKING:
    from evmp.job import Job


class OssRemote:
    """Objects behind `oss://` paths; see Remote."""

    def __init__(self, job: Job) -> None:
        self._job, self._client = job, OssClient(job, job.download_concurrency)

    def fetch(self, location: str) -> bytes:
        """Get the object; see Remote."""
        return self._get(location, None, self._client.guard.until).data

    def fetch_piece(self, location: str, start: int, stop: int) -> Piece:
        """Get a range; see Remote."""
        return self._get(location, (start, stop), self._client.guard.keeping)

    def cut_overdue(self) -> None:
        """Shut sockets down; see Remote."""
        self._client.guard.cut_overdue()

    def close(self) -> None:
        """Close the session; see Remote."""
        self._client.close()

    def _get(self, location: str, span: tuple[int, int] | None, until: Until) -> Piece:
        place = self._client.places.find(location)
        bucket = self._client.bucket(place)
        deadline = Deadline("download_timeout_seconds", self._job.download_timeout_seconds)
        with until(deadline):
            return persist(
                lambda: self._client.get(bucket, place.key, self._job.max_row_bytes, span),
                deadline,
                self._job.download_retries,
            )
