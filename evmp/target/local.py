"""A result as a file of this machine, or as a table: a Parquet file or a directory of them.

    out/result.jsonl             the result; it appears in one step, whole
    out/result.jsonl.evmp/       the staging place, while the job is unfinished
    out/result.jsonl.evmp.json   the record of the run that made the result

For a partition, `out/table/pt=1`, the two others stand beside the table, not within it, where every
reader of the table would see them: `out/table.pt=1.evmp`. The ledger may lie elsewhere, by the key
`staging`; what a publish needs next to the result stays there.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import uuid
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from evmp import _native
from evmp.errors import ConfigError, SinkError
from evmp.ledger import Commit, Ledger
from evmp.storage.local import LocalStorage
from evmp.target import open_ledger, probe
from evmp.target.part import remove_parts, write_part
from evmp.value import scheme

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.publish import Merge
    from evmp.sink import Sink

log = logging.getLogger(__name__)

SPARE_COPIES: Final = 8  # of a part must fit on the disk for it to be written


class LocalTarget:
    """A file or a directory; see Target.

    Args:
        path: of the result, a file or, for a table, a directory or a file.
        is_table: whether `name=value` parts of the path are partitions.
        ledger: by default in the staging place beside the result.
    """

    def __init__(self, path: Path, *, is_table: bool = False, ledger: Ledger | None = None) -> None:
        self.path, self._is_table = path, is_table
        self.staging = _beside(path, "evmp", is_table=is_table)
        self.record = _beside(path, "evmp.json", is_table=is_table)
        self.ledger = ledger or Ledger(self.staging)
        self._folder = LocalStorage(path.parent, self.staging / "tmp")
        self._is_apart = self.ledger.root != self.staging
        self._made: list[Path] = []

    @classmethod
    def of(cls, job: Job) -> LocalTarget:
        """Return the place that a job names.

        Raises:
            ConfigError: when it is, holds, or lies within what the job reads.
        """
        is_table = bool(job.output_table)
        key = "output_table" if is_table else "output_oss_file"
        path = Path(getattr(job, key)).absolute()
        for other in ("input_table", "input_oss_file", "model_path"):
            read = getattr(job, other)
            if read and not scheme(read) and _overlap(path, Path(read), other):
                raise ConfigError(f"{key}: {path} is not apart from {other}; name another")
        for table in filter(None, (job.input_table, job.output_table)):
            files, root = Path(job.output_dir).resolve(), Path(table).resolve()
            if (
                job.output_dir
                and not scheme(job.output_dir)
                and (files == root or root in files.parents)
            ):
                raise ConfigError(
                    f"output_dir: {job.output_dir} lies within the table {table}, which holds "
                    "nothing but its own files; name another"
                )
        ledger = open_ledger(job, str(_beside(path, "evmp", is_table=is_table)))
        return cls(path, is_table=is_table, ledger=ledger)

    @property
    def uri(self) -> str:
        """The path; see Target."""
        return str(self.path)

    def is_begun(self) -> bool:
        """Look for the staging places; see Target."""
        return self.staging.exists() or self.ledger.exists()

    def finished(self) -> dict[str, Any] | None:
        """Compare what stands here with its record; see Target."""
        if not os.path.lexists(self.path) or self._is_empty_table():
            return None
        if self.is_to_be_replaced() or self._draft():
            return None
        if (record := self._record_in(self.record)) is not None:
            return record
        raise SinkError(
            f"output {self.path} exists and was not made by a run of this job; move it away, "
            "name another output, or replace it with --fresh"
        )

    def standing(self) -> dict[str, Any] | None:
        """Return the record if it is that of what stands here; see Target."""
        return self._record_in(self.record)

    def check_replaceable(self) -> None:
        """Make sure that --fresh replaces nothing but a result.

        Raises:
            SinkError: when a directory stands here that holds more than a table.
        """
        if not self.path.is_dir() or self._is_empty_table():
            return
        alien = [p for p in self.path.iterdir() if p.is_dir() or p.suffix != ".parquet"]
        if alien or not self._is_table:
            found = f"holds {alien[0].name}" if alien else "is a directory"
            raise SinkError(
                f"output {self.path} {found}, which no run of evmp has made; --fresh does not "
                "replace it: move it away or name another output"
            )

    def check_writable(self) -> None:
        """Look at the folder, or at where it would be made; see Target."""
        if self.path.is_dir() and not self._is_table:
            raise SinkError(f"output {self.path} is a directory, expected the name of a file")
        place = next(p for p in self.path.parents if p.exists())
        if not place.is_dir():
            reason = "Not a directory"
        elif os.statvfs(place).f_flag & os.ST_RDONLY:
            reason = "Read-only file system"
        elif not os.access(place, os.W_OK | os.X_OK):
            reason = "Permission denied"
        else:
            return
        raise SinkError(f"output {self.path} cannot be written: {reason}: {place}")

    def prepare(self) -> None:
        """Make the folders, and write a file; see Target."""
        self.check_writable()
        places = (*self.path.parents, self.ledger.root, self.staging)
        self._made = [p for p in places if not p.exists()]
        own = self.staging / f"probe-{uuid.uuid4().hex}"
        try:
            (self.staging / "tmp").mkdir(parents=True, exist_ok=True)
            self.ledger.prepare()
            if self._is_apart:
                probe(self.ledger.storage)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(b"x")
        except OSError as error:
            raise SinkError(
                f"output {self.path} cannot be written: {error.strerror}: {error.filename}"
            ) from error
        finally:
            with suppress(OSError):
                own.unlink()

    def start_over(self) -> None:
        """Clear the staging place; see Target."""
        try:
            if self._is_apart:
                delete(self.staging)
                (self.staging / "tmp").mkdir(parents=True)
            self.ledger.clear()
        except OSError as error:
            raise SinkError(f"output {self.path} cannot be begun anew: {error}") from error
        self.replace_standing()

    def replace_standing(self) -> None:
        """Note what stands here; see Target."""
        standing = self._identity()
        if standing is None:
            return
        try:
            (self.staging / "replaces.json").write_text(json.dumps(standing))
        except OSError as error:
            raise SinkError(f"staging place {self.staging} cannot be used: {error}") from error

    def retreat(self) -> None:
        """Remove the folders as well; see Target."""
        self._remove()
        for directory in self._made:
            with suppress(OSError):
                directory.rmdir()

    def failures(self, sink: Sink) -> array[int]:
        """Read the result; see Target."""
        return sink.failures(self.path)

    def publish(self, merge: Merge, record: dict[str, Any]) -> None:
        """Merge beside the result, and rename; see Target."""
        # Of its own name: two that publish at once must not write into one file.
        merged = self.staging / "tmp" / f"merged-{uuid.uuid4().hex}{self.path.suffix}"
        try:
            merge.write(merged, self.path)
            self.put(merged, record)
        finally:
            with suppress(OSError):
                delete(merged)

    def put(self, merged: Path, record: dict[str, Any]) -> None:
        """Make `merged` the result, in one step, and leave the record beside it.

        Args:
            merged: the whole result, in the staging place.
            record: of the run.

        Raises:
            SinkError: when something stands there that start_over has not seen, or the step fails.
        """
        # Of its own name: should two publish at once, each record stays with its result.
        draft = self.staging / f"record-{uuid.uuid4().hex}.json"
        try:
            _sync(merged)
            record = {**record, "result": _identity_of(merged)}
            draft.write_text(json.dumps(record, indent=1) + "\n")
            _sync(draft)
            self._move(merged)
        except FileExistsError as error:
            raise SinkError(self._in_the_way()) from error
        except OSError as error:
            self.restore()
            if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
                raise SinkError(self._in_the_way()) from error
            raise SinkError(
                f"output {self.path} cannot be put in place: {error.strerror}; what was done "
                "is kept: make room or give access, and run the same command again"
            ) from error
        finally:
            with suppress(OSError):
                if self._record_in(draft) is None:
                    draft.unlink()
        self.settle()

    def restore(self) -> None:
        """Do so where a file system cannot exchange the two in one step; see Target."""
        replaced = _read_json(self.staging / "replaces.json")
        if os.path.lexists(self.path) or replaced is None:
            return
        for old in self.staging.glob("replaced-*"):
            if _identity_of(old) == replaced:
                try:
                    os.rename(old, self.path)
                except OSError as error:
                    raise SinkError(
                        f"{old} cannot be put back to {self.path}: {error.strerror}; "
                        "put it there and run the same command again"
                    ) from error

    def write_part(self, worker: int, n_workers: int, commits: Sequence[Commit]) -> None:
        """Copy committed blocks where the disk has room for it; see Target."""
        n_bytes = sum(commit.bytes for commit in commits)
        free = os.statvfs(self.path.parent)
        if free.f_bavail * free.f_frsize < SPARE_COPIES * n_bytes:
            log.info("part %d of %s is left out: the disk has little room", worker, self.path)
            return
        write_part(self._folder, self.path.name, (worker, n_workers), self.ledger, commits)

    def remove_parts(self) -> None:
        """Unlink them; see Target."""
        remove_parts(self._folder, self.path.name)

    def clean_up(self) -> None:
        """Delete both staging places; see Target."""
        self._remove()
        if self.is_begun():
            log.warning("%s cannot be removed wholly; delete it", self.ledger.uri)

    def _remove(self) -> None:
        if self._is_apart:
            with suppress(OSError):
                delete(self.staging)
        self.ledger.remove()

    def settle(self) -> bool:
        """Put the record in place whose result stands here; see Target."""
        draft = self._draft()
        if draft is None:
            return False
        try:
            os.replace(draft, self.record)
            _sync(self.record.parent)
        except OSError as error:
            raise SinkError(
                f"the result is in {self.path}, but its record cannot be put in {self.record}: "
                f"{error.strerror}; run the same command again"
            ) from error
        return True

    def _draft(self) -> Path | None:
        """Return the record, still in the staging place, of the result that stands here."""
        drafts = self.staging.glob("record-*.json")
        return next((draft for draft in drafts if self._record_in(draft) is not None), None)

    def _in_the_way(self) -> str:
        return (
            f"output {self.path} exists and was not made by a run of this job; move it away "
            "and run the same command again: all rows are done"
        )

    def _move(self, merged: Path) -> None:
        if self.is_to_be_replaced():
            self._replace(merged)
        elif merged.is_dir():
            os.rename(merged, self.path)
        else:
            os.link(merged, self.path)
            os.unlink(merged)
        _sync(self.path.parent)

    def _replace(self, merged: Path) -> None:
        """Put `merged` in the place of what stands here, which goes into the staging place."""
        if not merged.is_dir() and not self.path.is_dir():
            os.replace(merged, self.path)
            return
        try:
            _native.exchange(merged, self.path)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            os.rename(self.path, self.staging / f"replaced-{uuid.uuid4().hex}")
            os.rename(merged, self.path)

    def _is_empty_table(self) -> bool:
        return self._is_table and self.path.is_dir() and not any(self.path.iterdir())

    def is_to_be_replaced(self) -> bool:
        """Compare what stands here with what was noted; see Target."""
        standing = self._identity()
        return standing is not None and standing == _read_json(self.staging / "replaces.json")

    def _record_in(self, file: Path) -> dict[str, Any] | None:
        """Return the record in `file` if it is that of what stands here."""
        record, standing = _read_json(file), self._identity()
        if standing is None or not isinstance(record, dict) or record.get("result") != standing:
            return None
        return record

    def _identity(self) -> dict[str, int] | None:
        try:
            return _identity_of(self.path)
        except OSError:
            return None


def _beside(path: Path, suffix: str, *, is_table: bool) -> Path:
    """Return the neighbour of a result; of a partition, that beside its table."""
    parts = list[str]()
    while is_table and "=" in path.name:
        parts.insert(0, path.name)
        path = path.parent
    return path.with_name(".".join([path.name, *parts, suffix]))


def _overlap(output: Path, read: Path, key: str) -> bool:
    """Return whether writing `output` would touch what the job reads; links are followed."""
    output, read = output.resolve(), read.resolve()
    is_within = read in output.parents and key == "input_table"
    return output == read or output in read.parents or is_within


def _read_json(path: Path) -> object:
    """Return what a JSON file holds, or None."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _identity_of(path: Path) -> dict[str, int]:
    """What tells a result from another: renaming keeps it, writing does not."""
    status = os.stat(path)
    size = status.st_size
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"size": size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def delete(path: Path) -> None:
    """Delete a file or a directory that may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
