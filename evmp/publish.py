"""From staged blocks to the result: checked, merged in input order, visible in one step.

Runs in a process of its own once every block is committed. It can die at any point and be done
again: the result appears last, by a rename, and everything before can be made anew from the ledger.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from evmp.errors import SinkError
from evmp.ledger import Block, Commit
from evmp.sink import open_sink
from evmp.target import Target, delete

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.key import KeyField

log = logging.getLogger(__name__)

SPARE_COPIES: Final = 8  # of a part must fit on the disk for it to be written
COPY_BYTES: Final = 1 << 20


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
        n_rows: of the whole result.
        record: of the run.
        failed: the rows that the blocks hold, which take the place of those in the result that
            stands there; None where the blocks hold all rows.

    Raises:
        SinkError: when a block is missing or has changed, the rows do not add up, or the output
            cannot be written. The staged blocks stay.
    """
    sink = open_sink(job, keys)
    commits = target.ledger.commits()
    check_cover(commits, n_rows if failed is None else len(failed))
    # Of its own name: two that publish at once must not write into one file.
    merged = target.staging / "tmp" / f"merged-{uuid.uuid4().hex}{target.path.suffix}"
    try:
        if failed is None:
            found = sink.merge(_stages(target, commits), merged)
        else:
            found = sink.amend(target.path, failed, _stages(target, commits), merged)
        if found != n_rows:
            raise SinkError(f"the merged result holds {found} rows, expected {n_rows}")
        target.publish(merged, record)
    except OSError as error:
        raise SinkError(
            f"the result cannot be merged in {target.staging}: {error.strerror}; "
            "make room and run the same command again"
        ) from error
    finally:
        with suppress(OSError):
            delete(merged)


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


def part_path(target: Target, worker: int, n_workers: int) -> Path:
    """Return where worker `worker` leaves its part of the result."""
    return target.path.with_name(f"{target.path.name}.part-{worker:05d}-of-{n_workers:05d}")


def write_part(job: Job, target: Target, worker: int, n_workers: int, own: Block) -> None:
    """Leave a worker's part of a text result beside it: the specification's part file.

    Args:
        own: the worker's shard, whose blocks are committed.

    Of a table, and of a Parquet file, there are no parts. Nothing depends on them: where the disk
    has little room they are left out.

    Parts are for people who look into a running job. They are plain copies of committed blocks; the
    result is merged from the blocks themselves, and the parts are then removed.
    """
    if not job.output_oss_file or target.path.suffix == ".parquet":
        return
    commits = [c for c in target.ledger.commits() if own.start <= c.start < own.stop]
    draft = target.staging / "tmp" / f"part-{worker:05d}"
    part = part_path(target, worker, n_workers)
    try:
        if shutil.disk_usage(target.staging).free < SPARE_COPIES * sum(c.bytes for c in commits):
            log.info("%s is left out: the disk has little room", part.name)
            return
        with open(draft, "wb") as out:
            for commit in commits:
                with open(target.ledger.data(commit), "rb") as file:
                    shutil.copyfileobj(file, out, COPY_BYTES)
        os.replace(draft, part)
    except OSError as error:
        log.warning("%s is left out: %s", part.name, error)
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def remove_parts(target: Target) -> None:
    """Remove the part files, those of runs with another number of workers included."""
    for path in target.path.parent.glob(f"{glob.escape(target.path.name)}.part-*"):
        if re.fullmatch(r"part-\d{5}-of-\d{5}", path.name[len(target.path.name) + 1 :]):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s is left behind: %s", path, error.strerror)


def _stages(target: Target, commits: Sequence[Commit]) -> Iterator[Path]:
    for commit in commits:
        target.ledger.verify(commit)
        yield target.ledger.data(commit)
