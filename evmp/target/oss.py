"""A result as an object of OSS.

    oss://bucket/result.jsonl             the result; it appears in one step, whole
    oss://bucket/result.jsonl.evmp/...    the staging place, while the job is unfinished
    oss://bucket/result.jsonl.evmp.json   the record of the run that made the result

What tells a result from another is the id that its maker has left with it. The ledger may lie
elsewhere, by the key `staging`; what a publish needs is kept there, too:

    replaces.json      what the result may replace
    record-<id>.json   the record of the result that carries this id, be it there or not
    upload-<id>        an upload of parts; what of it is left over costs money until it is aborted
"""

from __future__ import annotations

import errno
import json
import logging
import os
import uuid
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evmp.errors import ConfigError, SinkError
from evmp.ledger import Commit, Ledger
from evmp.remote.ossclient import Place, Places
from evmp.storage.oss import OssStorage
from evmp.storage.upload import Upload
from evmp.target import open_ledger, probe, read_note
from evmp.target.part import remove_parts, write_part
from evmp.value import scheme

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.publish import Merge
    from evmp.sink import Sink

log = logging.getLogger(__name__)


class OssTarget:
    """One object; see Target.

    Args:
        uri: of the result.
        job: says how to reach it.
        ledger: anywhere.
    """

    def __init__(self, uri: str, job: Job, ledger: Ledger) -> None:
        self.uri, self.ledger = uri, ledger
        folder, _, self._name = uri.rpartition("/")
        self._folder = OssStorage(folder, job, ledger.tmp)
        self._record = f"{self._name}.evmp.json"

    @classmethod
    def of(cls, job: Job) -> OssTarget:
        """Return the place that a job names.

        Raises:
            ConfigError: when it is, or lies within, what the job reads, or leads nowhere.
        """
        uri = job.output_oss_file
        if uri.endswith("/"):
            raise ConfigError(f"output_oss_file: {uri} is a folder, expected the name of an object")
        target = cls(uri, job, open_ledger(job, f"{uri}.evmp"))
        own = Places(job).find(uri)
        for other in ("input_oss_file", "model_path"):
            read = getattr(job, other)
            if scheme(read) == "oss" and _is_within(own, Places(job).find(read)):
                raise ConfigError(f"output_oss_file: {uri} is not apart from {other}; name another")
        return target

    def is_begun(self) -> bool:
        """Look for the staging place; see Target."""
        return self.ledger.exists()

    def finished(self) -> dict[str, Any] | None:
        """Compare what stands here with its record; see Target."""
        with self._asking("looked at"):
            standing = self._identity()
            if standing is None or self._is_to_be_replaced(standing) or self._draft(standing):
                return None
            if (record := self._standing(standing)) is not None:
                return record
        raise SinkError(
            f"output {self.uri} exists and was not made by a run of this job; move it away, "
            "name another output, or replace it with --fresh"
        )

    def standing(self) -> dict[str, Any] | None:
        """Return the record if it is that of what stands here; see Target."""
        with self._asking("looked at"):
            return self._standing(self._identity())

    def is_to_be_replaced(self) -> bool:
        """Compare what stands here with what was noted; see Target."""
        with self._asking("looked at"):
            return self._is_to_be_replaced(self._identity())

    def failures(self, sink: Sink) -> array[int]:
        """Fetch the result and read it; see Target."""
        with self._asking("read"), self._folder.file(self._name) as file:
            return sink.failures(file)

    def check_replaceable(self) -> None:
        """An object can be replaced; see Target."""

    def check_writable(self) -> None:
        """Ask for what stands there; see Target."""
        with self._asking("written"):
            self._identity()

    def prepare(self) -> None:
        """Begin to send the result, and put something into the staging place; see Target."""
        self.ledger.prepare()
        with self._asking("written"):
            upload = self._folder.begin(self._name, "probe")
            self._folder.abort(self._name, upload)
            probe(self.ledger.storage)

    def restore(self) -> None:
        """Abort what publishes have left over that have died; see Target."""
        with self._asking("restored"):
            for note in self.ledger.storage.names("", "upload-"):
                self._folder.abort(self._name, note.removeprefix("upload-"))
                self.ledger.storage.delete(note)

    def start_over(self) -> None:
        """Clear the staging place; see Target."""
        with self._asking("begun anew"):
            self.ledger.clear()
        self.replace_standing()

    def replace_standing(self) -> None:
        """Note what stands here; see Target."""
        with self._asking("begun anew"):
            if (standing := self._identity()) is not None:
                self.ledger.storage.write("replaces.json", json.dumps(standing).encode())

    def retreat(self) -> None:
        """Remove the staging place; see Target."""
        self.ledger.remove()
        self.close()

    def close(self) -> None:
        """Close the connections of this process."""
        self._folder.close()
        self.ledger.storage.close()

    def publish(self, merge: Merge, record: dict[str, Any]) -> None:
        """Send the result in parts, or have OSS join the blocks; see Target."""
        maker, storage = uuid.uuid4().hex, self.ledger.storage
        draft = f"record-{maker}.json"
        record = {**record, "result": {"maker": maker}}
        storage.write(draft, json.dumps(record, indent=1).encode() + b"\n")
        notes: list[str] = []

        def note(upload: str) -> None:
            notes.append(f"upload-{upload}")
            storage.write(notes[-1], b"")

        try:
            with self._folder.upload(self._name, maker, note) as upload:
                self._add(upload, merge)
                upload.complete(lambda: self._must_be_new(maker))
        except FileExistsError as error:
            raise SinkError(
                f"output {self.uri} exists and was not made by a run of this job; move it away "
                "and run the same command again: all rows are done"
            ) from error
        finally:
            with suppress(OSError):
                if notes and upload.is_over:  # or who goes on aborts it
                    storage.delete(notes[0])
                if self._identity() != {"maker": maker}:
                    storage.delete(draft)
        self.settle()

    def settle(self) -> bool:
        """Put the record in place whose result stands here; see Target."""
        with self._asking("settled"):
            standing = self._identity()
            draft = self._draft(standing)
            if draft is None:
                return False
            self._folder.write(self._record, self.ledger.storage.read(draft))
            self.ledger.storage.delete(draft)
        return True

    def write_part(self, worker: int, n_workers: int, commits: Sequence[Commit]) -> None:
        """Have OSS join committed blocks; see Target."""
        write_part(self._folder, self._name, (worker, n_workers), self.ledger, commits)

    def remove_parts(self) -> None:
        """Delete them, and abort those that are being sent; see Target."""
        remove_parts(self._folder, self._name)
        with suppress(OSError):
            for name, upload in self._folder.uploads(f"{self._name}.part-"):
                self._folder.abort(name, upload)

    def clean_up(self) -> None:
        """Delete the staging place; see Target."""
        self.ledger.remove()
        with suppress(SinkError):  # the result is there, whatever can be seen of the rest
            if self.is_begun():
                log.warning("%s cannot be removed wholly; delete it", self.ledger.uri)
        self.close()

    def _add(self, upload: Upload, merge: Merge) -> None:
        """Add the bytes of the result, or the objects that it is made of."""
        source = self.ledger.storage
        if merge.is_joined and isinstance(source, OssStorage):
            for commit in merge.commits:
                upload.add_object(source, f"data/{commit.data}", commit.bytes)
        elif merge.is_joined:
            for stage in merge.stages():
                upload.add_file(stage)
        else:
            with self._merged(merge) as merged:
                upload.add_file(merged)

    @contextmanager
    def _merged(self, merge: Merge) -> Iterator[Path]:
        """Provide the result as a file of this machine."""
        merged = self.ledger.tmp / f"merged-{uuid.uuid4().hex}"
        try:
            if merge.failed is None:
                merge.write(merged, merged)
            else:
                with self._folder.file(self._name) as standing:
                    merge.write(merged, standing)
            yield merged
        finally:
            merged.unlink(missing_ok=True)

    def _identity(self) -> dict[str, Any] | None:
        """Return what tells the object that stands here from another, None without one."""
        try:
            head = self._folder.head(self._name)
        except FileNotFoundError:
            return None
        if head.maker:
            return {"maker": head.maker}
        return {"etag": head.etag, "size": head.size, "modified": head.modified}

    def _must_be_new(self, maker: str) -> bool:
        """Return whether the result may be made only where nothing stands.

        Raises:
            FileExistsError: something stands here, of another maker, that it does not replace.
        """
        standing = self._identity()
        if self._is_to_be_replaced(standing):
            return False
        if standing not in (None, {"maker": maker}):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.uri)
        return True

    def _is_to_be_replaced(self, standing: object) -> bool:
        return standing is not None and standing == read_note(self.ledger.storage, "replaces.json")

    def _standing(self, standing: object) -> dict[str, Any] | None:
        record = read_note(self._folder, self._record)
        return record if record and standing and record.get("result") == standing else None

    def _draft(self, standing: dict[str, Any] | None) -> str | None:
        """Return the name of the record, in the staging place, of the result that stands here."""
        if standing is None or "maker" not in standing:
            return None
        name = f"record-{standing['maker']}.json"
        with suppress(FileNotFoundError):
            self.ledger.storage.stat(name)
            return name
        return None

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise SinkError(
                f"output {self.uri} cannot be {what}: {error.strerror or error}{where}; "
                "what was committed is kept: mend that, and run the same command again"
            ) from error


def _is_within(place: Place, other: Place) -> bool:
    is_below = place.key.startswith(f"{other.key.rstrip('/')}/")
    return place[:2] == other[:2] and (place.key == other.key or is_below)
