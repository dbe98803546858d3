"""Files on OSS: an object, or the objects below a prefix, read as `evmp.storage.oss` reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from evmp.errors import ConfigError, DownloadError
from evmp.fetch import MAX_FILES, Item
from evmp.remote.retry import Deadline
from evmp.storage.oss import OssStorage

if TYPE_CHECKING:
    from evmp.job import Job


class BucketOrigin:
    """An object, or a folder of them; see Origin."""

    def __init__(self, uri: str, job: Job, deadline: Deadline, *, is_folder: bool) -> None:
        folder, _, self._name = uri.rpartition("/")
        self._is_folder, self._deadline = is_folder, deadline
        with _told():
            self._around = OssStorage(folder, job, Path())
            self._within = OssStorage(uri.removesuffix("/"), job, Path())
        self._storage = self._around

    def look(self) -> dict[str, Item]:
        """Ask for the object, or list the folder; see Origin."""
        with _told():
            if self._name:
                try:
                    status = self._around.stat(self._name)
                    return {self._name: Item(status.size, status.etag)}
                except FileNotFoundError:
                    if not self._is_folder:
                        raise
            self._storage = self._within
            if found := self._tree():
                return found
            raise FileNotFoundError

    def save(self, name: str, file: BinaryIO) -> None:
        """Get it range by range; see Origin."""
        with _told():
            self._storage.save(name, file, self._deadline.check)

    def close(self) -> None:
        """Close both storages; see Origin."""
        self._around.close()
        self._within.close()

    def _tree(self) -> dict[str, Item]:
        if not self._is_folder:
            return {}
        files = (
            (name, Item(status.size, status.etag))
            for name, status in self._within.tree()
            if name and not name.endswith("/")  # which some tools make for folders
        )
        return dict(islice(files, MAX_FILES + 1))


@contextmanager
def _told() -> Iterator[None]:
    """Turn what a storage raises into DownloadError."""
    try:
        yield
    except FileNotFoundError:
        raise DownloadError("404 NoSuchKey: there is nothing of that name") from None
    except OSError as error:
        raise DownloadError(error.strerror or str(error)) from None
    except ConfigError as error:
        raise DownloadError(str(error)) from None
