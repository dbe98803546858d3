"""A file behind http:// or https://, however large: what breaks off goes on where it was.

The job names it, so that its host may be a private one; where that redirects is another matter.
"""

from __future__ import annotations

from http import HTTPStatus
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote, urlsplit

from evmp.fetch import Item
from evmp.remote.body import size_of, stream_body
from evmp.remote.http import HttpRemote, check_status
from evmp.remote.retry import Again, Deadline

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

    from evmp.job import Job


class WebOrigin:
    """One file; see Origin."""

    def __init__(self, url: str, job: Job, deadline: Deadline) -> None:
        self._url, self._job, self._deadline = url, job, deadline
        self._remote = HttpRemote(job, known=url)
        name = PurePosixPath(unquote(urlsplit(url).path)).name
        self._name = name if name not in ("", "..") else "file"
        self._etag, self._may_go_on = "", False

    def look(self) -> dict[str, Item]:
        """Ask for it, and take the head of the answer alone; see Origin."""
        return {self._name: self._remote.ask(self._url, dict, _item, self._deadline)}

    def save(self, name: str, file: BinaryIO) -> None:
        """Get it, and the rest of it after a break; see Origin."""
        self._may_go_on = False

        def take(response: BaseHTTPResponse, deadline: Deadline) -> None:
            self._begin(response, file)
            left = self._job.fetch_limit_bytes - file.tell()
            for piece in stream_body(response, "fetch_limit_bytes", left, deadline):
                file.write(piece)

        self._remote.ask(self._url, lambda: self._rest_of(file), take, self._deadline)

    def close(self) -> None:
        """Close the connections; see Origin."""
        self._remote.close()

    def _rest_of(self, file: BinaryIO) -> dict[str, str]:
        if not self._may_go_on or not file.tell():
            return {}
        return {"Range": f"bytes={file.tell()}-", "If-Range": self._etag}

    def _begin(self, response: BaseHTTPResponse, file: BinaryIO) -> None:
        """Go to where in the file the answer begins."""
        if response.status == HTTPStatus.PARTIAL_CONTENT and self._may_go_on:
            size_of(response.headers, file.tell())
            return
        if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and self._may_go_on:
            self._may_go_on = False
            raise Again("the rest of the file is not to be had")
        check_status(response, HTTPStatus.OK)
        file.seek(0)
        file.truncate()
        self._etag = response.headers.get("etag", "")
        is_packed = "content-encoding" in response.headers
        self._may_go_on = self._etag.startswith('"') and not is_packed


def _item(response: BaseHTTPResponse, deadline: Deadline) -> Item:
    check_status(response, HTTPStatus.OK)
    length = response.headers.get("content-length", "")
    is_told = length.isdecimal() and "content-encoding" not in response.headers
    return Item(int(length) if is_told else None, response.headers.get("etag", ""))
