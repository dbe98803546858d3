"""The table that a result goes into, as the service has it.

Imports pyodps and pyarrow: for a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pyarrow as pa
from odps.errors import NoSuchPartition, ODPSError

from evmp.errors import SinkError
from evmp.maxcompute import OUTAGE, Service, explain, persist
from evmp.sink import open_sink
from evmp.sink.parquet import ParquetSink
from evmp.target.column import check_columns, kinds_of
from evmp.target.upload import Batches, Upload, status_of
from evmp.value import table_of

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.key import KeyField
    from evmp.ledger import Commit
    from evmp.publish import Merge

Answer = TypeVar("Answer")

BLOCK_BYTES: Final = 64 << 20  # of stage files
MAX_BLOCKS: Final = 10_000  # of the 20,000 that a session takes
START_SECONDS: Final = 30.0  # that the service may take to answer at all


class OutputTable:
    """A table, or one partition of it, that a job writes.

    What asks the service raises SinkError when that refuses, or is out of order for too long.
    """

    def __init__(self, job: Job, keys: Sequence[KeyField]) -> None:
        sink = open_sink(job, keys)
        assert isinstance(sink, ParquetSink)
        self._sink, self._job = sink, job
        self._table = table_of(job.output_table)
        self._service = Service(job, self._table.project)

    def standing(self) -> dict[str, Any] | None:
        """Return what tells the rows that are there from others; None without the place."""
        return self._ask(lambda: self._service.standing(self._table))

    def is_committed(self, session: str) -> bool:
        """Return whether an upload has become the table's rows."""
        return self._ask(
            lambda: status_of(self._service, self._table, session, START_SECONDS) == "CLOSED"
        )

    def check(self) -> bool:
        """Look whether the table is there, and has the columns of the result.

        Raises:
            SinkError: when it has others.
        """
        kinds = kinds_of(self._sink.schema)
        found = self._ask(lambda: self._service.columns(self._table))
        if found is None:
            return False
        expected = tuple(name.lower() for name in self._table.partition)
        if found.partition != expected:
            raise SinkError(
                f"output_table: {self._table.uri} names the partition columns "
                f"{', '.join(expected) or 'none'}, expected {', '.join(found.partition) or 'none'}"
            )
        check_columns(kinds, found.kinds, self._table.uri)
        return True

    def prepare(self) -> None:
        """Make the table, if it is not there, and find out whether it may be written."""
        if not self.check():
            kinds = {name: kind.name for name, kind in kinds_of(self._sink.schema).items()}
            partition = tuple(self._table.partition)
            days = self._job.lifecycle
            self._ask(lambda: self._service.create(self._table, kinds, partition, days))
        self._ask(self._try_upload)

    def upload(self, merge: Merge, begun: Callable[[str], None]) -> None:
        """Replace the rows by those of the committed blocks; the partition is made if need be.

        Args:
            begun: see Upload.
        """
        if self._table.partition:
            self._ask(lambda: self._service.create_partition(self._table))
        kinds, seconds = kinds_of(self._sink.schema), self._job.stall_timeout_seconds
        upload = Upload(self._service, self._table, kinds, self._blocks(merge), seconds)
        self._told(lambda: upload.run(begun))

    def _try_upload(self) -> None:
        try:
            self._service.upload(self._table)
        except NoSuchPartition:  # it is made when there is something to put into it
            return

    def _blocks(self, merge: Merge) -> list[Batches]:
        """Cut the rows into blocks of a few stage files each; at least one."""
        full = max(BLOCK_BYTES, sum(commit.bytes for commit in merge.commits) // MAX_BLOCKS)
        blocks: list[list[Commit]] = [[]]
        for commit in merge.commits:
            if sum(it.bytes for it in blocks[-1]) >= full:
                blocks.append([])
            blocks[-1].append(commit)
        return [partial(self._rows, merge, block) for block in blocks]

    def _rows(self, merge: Merge, commits: Sequence[Commit]) -> Iterator[pa.RecordBatch]:
        if not commits:
            yield pa.RecordBatch.from_pylist([], self._sink.schema)
        for commit in commits:
            n_rows = 0
            with merge.ledger.data(commit) as stage:
                for batch in self._sink.rows([stage]):
                    n_rows += batch.num_rows
                    yield batch
            if n_rows != len(commit):
                raise SinkError(
                    f"stage file {stage} holds {n_rows} rows, expected {len(commit)}; start over "
                    "with --fresh"
                )

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        return self._told(lambda: persist(question, START_SECONDS))

    def _told(self, question: Callable[[], Answer]) -> Answer:
        """Return the answer, or say why there is none."""
        try:
            return question()
        except OUTAGE as error:
            raise SinkError(
                f"output_table: {self._table.uri} cannot be reached: {explain(error)}; what was "
                "committed is kept: run the same command again"
            ) from error
        except ODPSError as error:
            raise SinkError(f"output_table: {self._table.uri}: {explain(error)}") from None
        finally:
            self._service.close()
