"""The files of videos, opened to be read from any place."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, BinaryIO

from evmp.errors import DownloadError
from evmp.payload import open_regular

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.video.task import Footage


class FootageOpener:
    """Opens videos of one process."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def open(self, footage: Footage) -> BinaryIO:
        """Open a video's file; the caller closes it.

        Raises:
            FetchError, DownloadError: it cannot be had.
        """
        if footage.url:
            raise DownloadError("videos of other machines cannot be read by this version")
        if not footage.path:
            return io.BytesIO(footage.data)
        fd, _ = open_regular(footage.path, self._job.max_video_bytes, "max_video_bytes")
        return os.fdopen(fd, "rb", buffering=0)
