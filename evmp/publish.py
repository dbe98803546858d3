"""From staged blocks to the result: checked, merged in input order, visible in one step.

Runs in a process of its own once every block is committed. It can die at any point and be done
again: the result appears last, in one step, and everything before can be made anew from the ledger.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evmp.errors import SinkError
from evmp.grid import Block
from evmp.ledger import Commit, Ledger
from evmp.sink import Sink, open_sink
from evmp.target import Target

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.key import KeyField


class Merge:
    """The rows of the committed blocks, merged in input order: what is to become the result.

    Args:
        sink: of the job's output.
        ledger: that has the blocks.
        n_rows: of the whole result.
        failed: the rows that the blocks hold, which take the place of those in the result that
            stands there; None where the blocks hold all rows.

    Attributes:
        commits: the blocks, in order; they cover the rows.

    Raises:
        SinkError: when a block is missing.
    """

    def __init__(
        self, sink: Sink, ledger: Ledger, n_rows: int, failed: Sequence[int] | None = None
    ) -> None:
        self.sink, self.ledger = sink, ledger
        self.n_rows, self.failed = n_rows, failed
        n_done = n_rows if failed is None else len(failed)
        self.commits = ledger.commits(n_done)
        check_cover(self.commits, n_done)

    @property
    def is_joined(self) -> bool:
        """Whether the result is the stage files' bytes, one behind the other."""
        return self.sink.is_joining and self.failed is None

    def stages(self) -> Iterator[Path]:
        """Yield the stage files, each compared with its record and there until the next is asked.

        Raises:
            SinkError: when one is missing or has changed.
        """
        for commit in self.commits:
            with self.ledger.data(commit) as stage:
                yield stage

    def write(self, out: Path, standing: Path) -> None:
        """Write the result.

        Args:
            out: what does not exist yet: becomes a file, or a directory for a table.
            standing: the result that stands there, where failed rows of it are replaced.

        Raises:
            SinkError: when a stage file has changed, the rows do not add up, or `out` cannot be
                written.
        """
        if self.failed is None:
            found = self.sink.merge(self.stages(), out)
        else:
            found = self.sink.amend(standing, self.failed, self.stages(), out)
        if found != self.n_rows:
            raise SinkError(f"the merged result holds {found} rows, expected {self.n_rows}")


def publish(
    job: Job,
    keys: tuple[KeyField, ...],
    n_rows: int,
    target: Target,
    record: dict[str, Any],
    failed: Sequence[int] | None = None,
) -> None:
    """Merge the committed blocks into the result, and put it in place with its record.

    Args:
        record: of the run.
        n_rows, failed: see Merge.

    Raises:
        SinkError: when a block is missing or has changed, the rows do not add up, or the output
            cannot be written. The staged blocks stay.
    """
    merge = Merge(open_sink(job, keys), target.ledger, n_rows, failed)
    try:
        target.publish(merge, record)
    except OSError as error:
        what = error.strerror or str(error)
        where = f": {error.filename}" if error.filename else ""
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        raise SinkError(
            f"the result {target.uri} cannot be made: {what}{where}; what was committed is kept: "
            f"{remedy}, and run the same command again"
        ) from error


def check_cover(commits: Sequence[Commit], n_rows: int) -> None:
    """Make sure that the blocks hold every row of the input once.

    Raises:
        SinkError: when rows are missing or there twice.
    """
    at = 0
    for commit in commits:
        if commit.start != at:
            raise SinkError(f"the ledger goes on at row {commit.start}, expected row {at}")
        at = commit.stop
    if at != n_rows:
        raise SinkError(f"the ledger ends at row {at}, expected {n_rows} rows")


def write_part(job: Job, target: Target, worker: int, n_workers: int, own: Block) -> None:
    """Leave a worker's part of a text result beside it; of Parquet and of tables there are none.

    Args:
        own: the worker's shard, whose blocks are committed.
    """
    if job.output_oss_file and not job.output_oss_file.endswith(".parquet"):
        commits = [c for c in target.ledger.commits() if own.start <= c.start < own.stop]
        target.write_part(worker, n_workers, commits)
