"""An object of OSS that is sent in parts, several at once, or put together there from others.

Nobody sees it before it is complete. OSS wants parts of 100 KB at least, the last one aside, and
10,000 of them at most, so pieces are gathered to parts, which grow with their number.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from oss2.exceptions import OssError
from oss2.models import PartInfo

from evmp.remote.ossclient import new_crc64

if TYPE_CHECKING:
    from evmp.storage.oss import Head, OssStorage

N_THREADS: Final = 8
N_AHEAD: Final = 2 * N_THREADS  # parts in memory
PART_BYTES: Final = 8 << 20
MIN_PART_BYTES: Final = 100 << 10
SMALL_PARTS: Final = 5000  # of an upload may be small ones
FASTER_PARTS: Final = 1000  # after so many parts the next ones are larger

Once = Callable[[], bool]
"""Asked before each attempt at an object: whether it is to be made only where there is none."""


def never() -> bool:
    """Let an object take the place of any other."""
    return False


def forbidding(once: Once) -> dict[str, str]:
    """Return the headers of an attempt."""
    return {"x-oss-forbid-overwrite": "true"} if once() else {}


class Upload:
    """One object that is sent. Not for use by several threads.

    Args:
        storage, name: what it is to become.
        maker: the id that tells whose it is.
        note: called with the upload's id, if it gets one, before any part is sent.
    """

    def __init__(
        self, storage: OssStorage, name: str, maker: str, note: Callable[[str], object]
    ) -> None:
        self._storage, self._name, self._maker, self._note = storage, name, maker, note
        self._buffer, self._size = bytearray(), 0
        self._crc: Any = new_crc64()
        self._id = ""
        self._pool = ThreadPoolExecutor(N_THREADS)
        self._parts: list[Future[PartInfo]] = []

    def add(self, data: bytes) -> None:
        """Add bytes; blocks while many are on their way.

        Raises:
            OSError: when a part cannot be sent.
        """
        self._buffer += data
        self._size += len(data)
        if self._crc is not None:
            self._crc.update(data)
        n_bytes = PART_BYTES * (1 + len(self._parts) // FASTER_PARTS)
        while len(self._buffer) >= n_bytes:
            self._send(bytes(self._buffer[:n_bytes]))
            del self._buffer[:n_bytes]

    def add_file(self, path: Path) -> None:
        """Add the bytes of a file; see add."""
        with open(path, "rb") as file:
            while chunk := file.read(PART_BYTES):
                self.add(chunk)

    def add_object(self, source: OssStorage, name: str, size: int | None = None) -> None:
        """Add an object; where it can be a part by itself, OSS copies it.

        Args:
            size: that it must have, if that is known.

        Raises:
            OSError: when it is no object that evmp has made so, or a part cannot be sent.
        """
        size = source.head(name).size if size is None else size
        is_near = source.place.endpoint == self._storage.place.endpoint
        least = MIN_PART_BYTES if len(self._parts) < SMALL_PARTS else PART_BYTES
        if is_near and size >= least and not 0 < len(self._buffer) < MIN_PART_BYTES:
            self._flush()
            self._size += size
            self._crc = None
            self._submit(lambda number: self._copy_part(number, source, name, size))
        else:
            _head_of(source, name, size)
            with source.file(name) as file:  # which is whole, before anything of it is sent
                self.add_file(file)

    def complete(self, once: Once = never) -> None:
        """Let the object appear.

        Args:
            once: see Once.

        Raises:
            FileExistsError: there is one, of another maker.
            OSError: it cannot be made; there may be one all the same.
        """
        if not self._parts:
            data = bytes(self._buffer)
            self._storage.put(self._name, data, maker=self._maker, once=once)
            return
        self._flush()
        parts = [part.result() for part in self._parts]
        self._storage.ask(lambda bucket: self._complete(bucket, parts, once), self._name)
        self._id = ""
        head = self._storage.head(self._name)
        crc64 = self._crc.crcValue if self._crc is not None else head.crc64
        is_whole = head.size == self._size and head.crc64 in (None, crc64)
        if head.maker == self._maker and not is_whole:
            uri = self._storage.uri(self._name)
            raise OSError(errno.EIO, "the object has become another than was sent", uri)

    @property
    def is_over(self) -> bool:
        """Whether OSS keeps no parts of it that are not an object's."""
        return not self._id

    def close(self) -> None:
        """End the threads; what is not complete is aborted, if OSS can be reached."""
        self._pool.shutdown(cancel_futures=True)
        if self._id:
            with suppress(OSError):
                self._storage.abort(self._name, self._id)
                self._id = ""

    def _flush(self) -> None:
        if self._buffer:
            self._send(bytes(self._buffer))
            self._buffer.clear()

    def _send(self, data: bytes) -> None:
        self._submit(lambda number: self._send_part(number, data))

    def _submit(self, work: Callable[[int], PartInfo]) -> None:
        if not self._id:
            self._id = self._storage.begin(self._name, self._maker)
            self._note(self._id)
        if len(self._parts) >= N_AHEAD:
            self._parts[-N_AHEAD].result()
        self._parts.append(self._pool.submit(work, len(self._parts) + 1))

    def _send_part(self, number: int, data: bytes) -> PartInfo:
        answer = self._storage.ask(
            lambda bucket: bucket.upload_part(self._key, self._id, number, data), self._name
        )
        return PartInfo(number, answer.etag)

    def _copy_part(self, number: int, source: OssStorage, name: str, size: int) -> PartInfo:
        place, key = source.place, source.key(name)
        headers = {"x-oss-copy-source-if-match": _head_of(source, name, size).etag}
        answer = self._storage.ask(
            lambda bucket: bucket.upload_part_copy(
                place.bucket, key, None, self._key, self._id, number, headers
            ),
            self._name,
        )
        return PartInfo(number, answer.etag)

    def _complete(self, bucket: Any, parts: list[PartInfo], once: Once) -> None:
        bucket.enable_crc = False  # oss2 would want the CRC of parts that were copied, too
        try:
            bucket.complete_multipart_upload(self._key, self._id, parts, headers=forbidding(once))
        except OssError as error:
            if error.code not in ("FileAlreadyExists", "NoSuchUpload"):
                raise
            # It may be ours, and the answer to an earlier attempt was lost.
            if self._storage.maker_in(bucket, self._name) == self._maker:
                return
            if error.code == "NoSuchUpload":
                raise
            uri = self._storage.uri(self._name)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), uri) from None

    @property
    def _key(self) -> str:
        return self._storage.key(self._name)


def _head_of(source: OssStorage, name: str, size: int) -> Head:
    """Look at an object that is to be added.

    Raises:
        OSError: when it is none that evmp has made, or of another size.
    """
    head = source.head(name)
    if not head.maker or head.size != size:
        raise OSError(errno.EIO, "somebody else has changed the object", source.uri(name))
    return head
