"""Objects of Alibaba Cloud OSS: those of a bucket whose keys begin with a prefix.

OSS shows an object when all of it is there, and what it has answered is kept. It creates an object
once by `x-oss-forbid-overwrite`. An answer can be lost after the effect, so every object that we
make carries an id of its maker, which tells afterwards whose it is. What is sent goes with its MD5
or is compared by its CRC64, and what comes is compared by CRC64, too.
"""

from __future__ import annotations

import errno
import os
import sys
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from oss2.exceptions import OssError
from oss2.utils import content_md5

from evmp.errors import ConfigError, DownloadError, MissingError
from evmp.remote.ossclient import CRC_HEADER, OssClient, Places, new_crc64
from evmp.remote.retry import Again, Deadline, persist
from evmp.storage import Readable, Status, save
from evmp.storage.upload import PART_BYTES, Once, Upload, forbidding, never

if TYPE_CHECKING:
    from evmp.job import Job

T = TypeVar("T")

N_CONNECTIONS: Final = 8
MAX_RETRIES: Final = 1000  # time is over before
PAGE_KEYS: Final = 1000  # what OSS lists, and deletes, at once
MAKER: Final = "x-oss-meta-evmp-maker"


class Head(NamedTuple):
    """What OSS tells of an object."""

    size: int
    modified: float
    etag: str
    crc64: int | None
    """None where OSS has none: of objects that are older than that, or of another server."""
    maker: str
    """The id that its maker has left with it; empty if that was not evmp."""
    packing: str
    """Its Content-Encoding; empty where it has none."""


class OssStorage:
    """The objects below `oss://<bucket>[.<oss_host>]/<prefix>`; see Storage.

    Args:
        uri: without the `/` behind the prefix.
        job: says how to reach it.
        drafts: a folder of this machine for objects that are wanted as files.

    Attributes:
        place: where it is.

    Raises:
        ConfigError: when the path leads to no host of OSS.
    """

    def __init__(self, uri: str, job: Job, drafts: Path) -> None:
        self._uri, self._job, self._drafts = uri, job, drafts
        try:
            self.place = Places(job).find(f"{uri}/-")
        except DownloadError as error:
            raise ConfigError(f"{uri}: {error}") from None
        self._prefix = self.place.key[:-1]
        self._client: OssClient | None = None
        self._pid = 0

    def uri(self, name: str = "") -> str:
        """Return the URI; see Storage."""
        return f"{self._uri}/{name}" if name else self._uri

    def create(self, name: str, data: bytes) -> bool:
        """Put it where there is none; see Storage."""
        try:
            self.put(name, data, once=lambda: True)
        except FileExistsError:
            return False
        return True

    def write(self, name: str, data: bytes) -> None:
        """Put it; see Storage."""
        self.put(name, data)

    def adopt(self, file: Path, name: str) -> None:
        """Send it, in parts where it is large; see Storage."""
        with self.upload(name) as upload:
            upload.add_file(file)
            upload.complete()

    def copy(self, source: Readable, names: Sequence[str], name: str) -> None:
        """Have OSS copy what it has, and send the rest; see Storage."""
        with self.upload(name) as upload:
            for it in names:
                if isinstance(source, OssStorage):
                    upload.add_object(source, it)
                else:
                    for chunk in source.stream(it):
                        upload.add(chunk)
            upload.complete()

    def read(self, name: str) -> bytes:
        """Get it in one request; see Storage."""
        return self._get(name, None)

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        """Get several at once; see Storage."""
        if len(names) > 1:
            with ThreadPoolExecutor(N_CONNECTIONS) as pool:
                yield from pool.map(self.read, names)
        else:
            yield from map(self.read, names)

    def stream(self, name: str) -> Generator[bytes, None, None]:
        """Get ranges, one after the other, all of the same object; see Storage."""
        head, crc, at = self.head(name), new_crc64(), 0
        if head.packing not in ("", "identity"):
            packed = f"it is stored with Content-Encoding: {head.packing:.40}, expected none"
            raise OSError(errno.EIO, packed, self.uri(name))
        while at < head.size:
            end = min(at + PART_BYTES, head.size)
            # What comes whole is compared, and asked for again.
            chunk = self._get(name, (at, end) if end - at < head.size else None, head.etag)
            if len(chunk) != end - at:
                raise OSError(errno.EIO, "a range has come with another length", self.uri(name))
            crc.update(chunk)
            yield chunk
            at = end
        if head.crc64 not in (None, crc.crcValue):
            raise OSError(errno.EBADMSG, "the object has come with another CRC64", self.uri(name))

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Fetch it to a file, which is deleted at the end; see Storage."""
        draft = self._drafts / uuid.uuid4().hex
        try:
            with open(draft, "wb") as opened:
                save(self, name, opened)
            yield draft
        finally:
            with suppress(FileNotFoundError):
                os.unlink(draft)

    def stat(self, name: str) -> Status:
        """Ask for its head; see Storage."""
        head = self.head(name)
        return Status(head.size, head.modified, head.etag)

    def tree(self, folder: str) -> Iterator[tuple[str, Status]]:
        """List the keys with a prefix, whatever is behind it; see Storage."""
        for page in self._pages(self.key(f"{folder}/" if folder else ""), ""):
            for it in page:
                yield self._name(it.key), Status(it.size, float(it.last_modified), it.etag)

    def names(self, folder: str, start: str = "") -> list[str]:
        """List the keys with a prefix; see Storage."""
        prefix = self.key(f"{folder}/{start}" if folder else start)
        return sorted(self._name(it.key) for page in self._pages(prefix, "/") for it in page)

    def delete(self, name: str) -> None:
        """Delete it; see Storage."""
        self.ask(lambda bucket: bucket.delete_object(self.key(name)), name)

    def clear(self, folder: str) -> None:
        """Delete many at a time, and abort what is being sent there; see Storage."""
        for page in self._pages(self.key(f"{folder}/"), ""):
            if page:
                self.ask(partial(_delete_all, keys=[it.key for it in page]), folder)
        for name, upload in self.uploads(f"{folder}/"):
            self.abort(name, upload)

    def close(self) -> None:
        """Close the session; see Storage."""
        if self._client is not None and self._pid == os.getpid():
            self._client.close()

    def now(self) -> float:
        """Ask for an object, and look at the date of the answer; see Storage."""

        def attempt(bucket: Any) -> str:
            try:
                return str(bucket.head_object(self.key("now")).headers["Date"])
            except OssError as error:
                if error.status != 404:
                    raise
                return str(error.headers["Date"])

        return parsedate_to_datetime(self.ask(attempt, "now")).timestamp()

    # --- what only OSS has --------------------------------------------------------------------

    def key(self, name: str) -> str:
        """Return the key of an object, or what the keys of several begin with."""
        return f"{self._prefix}{name}"

    def put(self, name: str, data: bytes, *, maker: str = "", once: Once = never) -> None:
        """Make an object in one request.

        Args:
            maker: the id that tells whose it is; by default a new one.
            once: see Once.

        Raises:
            FileExistsError: there is one, of another maker.
        """
        maker = maker or uuid.uuid4().hex
        headers = {MAKER: maker, "Content-MD5": content_md5(data)}

        def attempt(bucket: Any) -> None:
            try:
                bucket.put_object(self.key(name), data, headers={**headers, **forbidding(once)})
            except OssError as error:
                if error.code != "FileAlreadyExists":
                    raise
                if self.maker_in(bucket, name) != maker:
                    strerror = os.strerror(errno.EEXIST)
                    raise FileExistsError(errno.EEXIST, strerror, self.uri(name)) from None

        self.ask(attempt, name)

    def head(self, name: str) -> Head:
        """Return what OSS tells of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        return self.ask(lambda bucket: _head(bucket.head_object(self.key(name))), name)

    def maker_in(self, bucket: Any, name: str) -> str:
        """Return whose an object is, within `ask`.

        Raises:
            Again: there is none any more.
        """
        try:
            return str(bucket.head_object(self.key(name)).headers.get(MAKER, ""))
        except OssError as error:
            if error.status != 404:
                raise
            raise Again("the object has gone meanwhile") from None

    @contextmanager
    def upload(
        self, name: str, maker: str = "", note: Callable[[str], object] = lambda upload: None
    ) -> Iterator[Upload]:
        """Provide what an object is sent by; without `Upload.complete` there will be none.

        Args:
            maker: the id that tells whose it is; by default a new one.
            note: see Upload.
        """
        upload = Upload(self, name, maker or uuid.uuid4().hex, note)
        try:
            yield upload
        finally:
            upload.close()

    def begin(self, name: str, maker: str) -> str:
        """Begin to send an object in parts. Returns the upload's id; see Upload."""
        headers = {MAKER: maker}
        return self.ask(
            lambda bucket: str(bucket.init_multipart_upload(self.key(name), headers).upload_id),
            name,
        )

    def uploads(self, start: str) -> list[tuple[str, str]]:
        """Return the names, and the uploads' ids, of what is being sent in parts.

        Args:
            start: what the names begin with.
        """
        found: list[tuple[str, str]] = []
        marker: dict[str, str] = {}
        while True:
            page = self.ask(partial(_list_uploads, prefix=self.key(start), **marker), start)
            found.extend((self._name(it.key), it.upload_id) for it in page.upload_list)
            if not page.is_truncated:
                return found
            marker = {
                "key_marker": page.next_key_marker,
                "upload_id_marker": page.next_upload_id_marker,
            }

    def abort(self, name: str, upload: str) -> None:
        """End what is being sent in parts, which are deleted; it may be over already."""

        def attempt(bucket: Any) -> None:
            try:
                bucket.abort_multipart_upload(self.key(name), upload)
            except OssError as error:
                if error.code != "NoSuchUpload":
                    raise

        self.ask(attempt, name)

    def ask(self, attempt: Callable[[Any], T], name: str) -> T:
        """Return what `attempt` does with oss2's bucket; it is called again where that may help.

        Raises:
            FileNotFoundError: there is no object of that name.
            OSError: says what was refused, and why.
        """
        seconds = self._job.storage_timeout_seconds
        try:
            client = self._own_client()
            deadline = Deadline("storage_timeout_seconds", seconds)
            bucket = client.bucket(self.place, enable_crc=True)

            def once() -> T:
                with client.asking(deadline):
                    return attempt(bucket)

            with client.guard.keeping(deadline):
                return persist(once, deadline, MAX_RETRIES)
        except MissingError:
            message = "404 NoSuchKey: there is nothing of that name"
            raise FileNotFoundError(errno.ENOENT, message, self.uri(name)) from None
        except DownloadError as error:
            raise OSError(errno.EIO, str(error), self.uri(name)) from None

    def _own_client(self) -> OssClient:
        """Return this process's client: connections must not be shared with a parent."""
        if self._client is None or self._pid != os.getpid():
            self._client, self._pid = OssClient(self._job, N_CONNECTIONS), os.getpid()
        return self._client

    def _get(self, name: str, span: tuple[int, int] | None, etag: str = "") -> bytes:
        def attempt(bucket: Any) -> bytes:
            client = self._own_client()
            return client.get(bucket, self.key(name), sys.maxsize, span, etag).data

        return self.ask(attempt, name)

    def _name(self, key: str) -> str:
        return key[len(self._prefix) :]

    def _pages(self, prefix: str, delimiter: str) -> Iterator[list[Any]]:
        """Yield what begins with a prefix, as oss2 tells of it, as much as OSS lists at once."""
        token = ""
        while True:
            page = self.ask(partial(_list, prefix=prefix, delimiter=delimiter, token=token), "")
            yield page.object_list
            if not page.is_truncated:
                return
            token = page.next_continuation_token


def _head(answer: Any) -> Head:
    return Head(
        answer.content_length,
        float(answer.last_modified),
        answer.etag,
        int(crc64) if (crc64 := answer.headers.get(CRC_HEADER)) else None,
        answer.headers.get(MAKER, ""),
        answer.headers.get("content-encoding", ""),
    )


def _list(bucket: Any, *, prefix: str, delimiter: str, token: str) -> Any:
    return bucket.list_objects_v2(prefix, delimiter, token, max_keys=PAGE_KEYS)


def _list_uploads(bucket: Any, **options: str) -> Any:
    return bucket.list_multipart_uploads(max_uploads=PAGE_KEYS, **options)


def _delete_all(bucket: Any, *, keys: Sequence[str]) -> None:
    bucket.batch_delete_objects(keys)
