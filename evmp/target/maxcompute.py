"""A result as a MaxCompute table, or as one partition of it.

    odps://shop/tables/results/pt=1   the result; it appears in one step, whole
    ./shop.results.pt=1.evmp/         the staging place, while the job is unfinished
    ./shop.results.pt=1.evmp.json     the record of the run that made the result

The two others stand in the working directory, or where the key `staging` says. A result is known
again by its number of rows and the time of the table's last change: nothing can be attached to rows
there. Whoever dies between the commit and the record finds out from the session of the upload,
whose name is noted before the commit.

What asks the service takes libraries that shall not stay: all but a publish, which has a process of
its own anyway, does so in a child.
"""

from __future__ import annotations

import json
import logging
import os
import re
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from evmp.child import call_in_child
from evmp.errors import ConfigError, SinkError
from evmp.ledger import Commit
from evmp.storage import Storage, open_storage
from evmp.target import open_ledger, probe, read_note
from evmp.value import TableName, scheme, table_of

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.key import KeyField
    from evmp.publish import Merge
    from evmp.sink import Sink
    from evmp.target.table import OutputTable

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

UPLOAD: Final = "upload.json"  # the session whose rows may have become the result, and its record
REPLACES: Final = "replaces.json"
_NAME: Final = re.compile(r"\w+", re.ASCII)
_VALUE: Final = re.compile(r"[^'\",/\\\x00-\x1f]+")


class MaxComputeTarget:
    """A table or a partition; see Target.

    Args:
        keys: the input's key columns.

    Raises:
        ConfigError: when it is what the job reads, or its name is none of MaxCompute's.
    """

    def __init__(self, job: Job, keys: tuple[KeyField, ...]) -> None:
        self._job, self._keys = job, keys
        self._table = table_of(job.output_table)
        _check_name(self._table)
        if scheme(job.input_table) == "odps" and _same(table_of(job.input_table), self._table):
            raise ConfigError("output_table: the same as input_table, expected another")
        parts = job.output_table.rstrip("/").split("/")[5:]
        name = ".".join([self._table.project, self._table.name, *parts])
        self.ledger = open_ledger(job, f"{name}.evmp")
        self._record = f"{name}.evmp.json"
        folder = os.path.dirname(os.path.join(job.staging, self._record)) or str(Path.cwd())
        self._folder = open_storage(folder, job, self.ledger.tmp)

    @property
    def uri(self) -> str:
        """The table's, as the job has it; see Target."""
        return self._job.output_table

    def is_begun(self) -> bool:
        """Look for the staging place; see Target."""
        return self.ledger.exists()

    def finished(self) -> dict[str, Any] | None:
        """Compare what stands here with its record; see Target. A table without rows is nothing."""
        return self._ask(self._finished)

    def standing(self) -> dict[str, Any] | None:
        """Return the record if it is that of what stands here; see Target."""
        return self._record_of(self._standing())

    def is_to_be_replaced(self) -> bool:
        """Compare what stands here with what was noted; see Target."""
        return self._is_noted(self._standing())

    def failures(self, sink: Sink) -> array[int]:
        """Refuse: the rows have no order there; see Target."""
        raise SinkError(
            f"output_table: --retry-failed cannot find the failed rows of {self.uri} again, since "
            "MaxCompute keeps no order of rows; do all rows again, with --fresh"
        )

    def check_replaceable(self) -> None:
        """Let --fresh replace rows, be they whose they may; see Target."""

    def check_writable(self) -> None:
        """Compare the columns, if the table is there; see Target."""
        self._ask(lambda table: table.check())

    def prepare(self) -> None:
        """Make the staging place, and the table, but not the partition; see Target."""
        try:
            self.ledger.tmp.mkdir(parents=True, exist_ok=True)
            probe(self.ledger.storage)
        except OSError as error:
            raise SinkError(f"staging place {self.ledger.uri} cannot be made: {error}") from error
        self._ask(lambda table: table.prepare())

    def restore(self) -> None:
        """Do nothing: what stands here is never away; see Target."""

    def start_over(self) -> None:
        """Clear the staging place; see Target."""
        try:
            self.ledger.clear()
            self.ledger.tmp.mkdir(exist_ok=True)
        except OSError as error:
            raise SinkError(f"output {self.uri} cannot be begun anew: {error}") from error
        self.replace_standing()

    def replace_standing(self) -> None:
        """Note what stands here; see Target."""
        if standing := self._standing():
            self._note(REPLACES, standing)

    def retreat(self) -> None:
        """Remove the staging place; a table that was made stays, without rows; see Target."""
        self.ledger.remove()

    def publish(self, merge: Merge, record: dict[str, Any]) -> None:
        """Upload the blocks; see Target."""
        table = _open(self._job, self._keys)
        standing = table.standing()
        if standing and standing["rows"] and not self._is_noted(standing):
            raise SinkError(self._in_the_way(standing, "empty it, and run the same command again"))
        table.upload(
            merge, lambda session: self._note(UPLOAD, {"session": session, "record": record})
        )
        if not self._settle(table):
            raise SinkError(
                f"output {self.uri} was changed by somebody else at the same time; look at what it "
                "holds, and start over with --fresh"
            )

    def settle(self) -> bool:
        """Leave the record if the upload that was noted has become the result; see Target."""
        return self._noted(UPLOAD) is not None and self._ask(self._settle)

    def write_part(self, worker: int, n_workers: int, commits: Sequence[Commit]) -> None:
        """Do nothing: a table has no parts; see Target."""

    def remove_parts(self) -> None:
        """Do nothing: a table has no parts; see Target."""

    def clean_up(self) -> None:
        """Delete the staging place; see Target."""
        self.ledger.remove()
        if self.is_begun():
            log.warning("%s cannot be removed wholly; delete it", self.ledger.uri)

    def _finished(self, table: OutputTable) -> dict[str, Any] | None:
        standing, note = table.standing(), self._noted(UPLOAD)
        if standing is None or self._is_noted(standing):
            return None
        if note is not None and table.is_committed(note["session"]):
            return None
        if (record := self._record_of(standing)) is not None:
            return record
        if standing["rows"] == 0:
            return None
        raise SinkError(self._in_the_way(standing, "replace its rows with --fresh"))

    def _settle(self, table: OutputTable) -> bool:
        note = self._noted(UPLOAD)
        if note is None or not table.is_committed(note["session"]):
            return False
        record, standing = note["record"], table.standing()
        if standing is None or standing["rows"] != record["rows"]:
            return False
        try:
            text = json.dumps({**record, "result": standing}, indent=1) + "\n"
            self._folder.write(self._record, text.encode())
            self.ledger.storage.delete(UPLOAD)
        except OSError as error:
            raise SinkError(
                f"the result is in {self.uri}, but its record cannot be put in "
                f"{self._folder.uri(self._record)}: {error}; run the same command again"
            ) from error
        return True

    def _ask(self, question: Callable[[OutputTable], Answer]) -> Answer:
        """Ask in a process of its own."""
        return call_in_child(lambda: question(_open(self._job, self._keys)))

    def _standing(self) -> dict[str, Any] | None:
        """Return what tells the rows that stand here from others; None without table."""
        return self._ask(lambda table: table.standing())

    def _is_noted(self, standing: dict[str, Any] | None) -> bool:
        return standing is not None and standing == self._noted(REPLACES)

    def _record_of(self, standing: dict[str, Any] | None) -> dict[str, Any] | None:
        record = self._read(self._folder, self._record)
        return record if record and standing and record.get("result") == standing else None

    def _noted(self, name: str) -> dict[str, Any] | None:
        return self._read(self.ledger.storage, name)

    def _read(self, storage: Storage, name: str) -> dict[str, Any] | None:
        """Return what was noted; what cannot be read is not taken for what is not there."""
        try:
            return read_note(storage, name)
        except OSError as error:
            raise SinkError(
                f"{storage.uri(name)}, which tells whose rows are in {self.uri}, cannot be read: "
                f"{error.strerror or error}; give access, and run the same command again"
            ) from error

    def _note(self, name: str, what: dict[str, Any]) -> None:
        try:
            self.ledger.storage.write(name, json.dumps(what).encode())
        except OSError as error:
            raise SinkError(f"staging place {self.ledger.uri} cannot be used: {error}") from error

    def _in_the_way(self, standing: dict[str, Any], remedy: str) -> str:
        return (
            f"output {self.uri} holds {standing['rows']} rows that no run of this job has put "
            f"there, or that were changed; name another output, or {remedy}"
        )


def _open(job: Job, keys: tuple[KeyField, ...]) -> OutputTable:
    try:
        from evmp.target.table import OutputTable
    except ImportError as error:
        raise SinkError(
            f"output_table: an odps:// table needs pyodps, which cannot be imported ({error}); "
            "install evmp[odps]"
        ) from error
    return OutputTable(job, keys)


def _check_name(table: TableName) -> None:
    """Refuse names that would not stay what they are in the statements that make a table.

    Raises:
        ConfigError: when there is one.
    """
    for name in (table.project, table.name, *table.partition):
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"output_table: {name!r} in {table.uri}, expected letters, digits and underscores"
            )
    for value in table.partition.values():
        if not _VALUE.fullmatch(value):
            raise ConfigError(
                f"output_table: the partition {value!r} in {table.uri}, expected a value without "
                "quotes, commas, slashes and control characters"
            )


def _same(one: TableName, other: TableName) -> bool:
    names = [(it.project.lower(), it.name.lower(), it.spec.lower()) for it in (one, other)]
    return names[0] == names[1]
