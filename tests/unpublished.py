"""The output's place of a job at its end: every row is committed, the result is to be published."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pyarrow as pa

from evmp.grid import Block
from evmp.job import Job
from evmp.key import table_field
from evmp.layout import plan_layout
from evmp.ledger import Commit, Ledger
from evmp.plan import Plan
from evmp.progress import Quiet
from evmp.publish import publish
from evmp.run import Run
from evmp.sink import Record, open_sink
from evmp.source import SourceInfo
from evmp.stage import error_result
from evmp.target import Target
from evmp.target.local import LocalTarget

KEYS = (table_field("id", pa.string()),)
N_ROWS = 40
BLOCKS = (Block(0, 16), Block(16, 30), Block(30, N_ROWS))
FAILED = (7, 33)
FINGERPRINT: dict[str, Any] = {"input": {"rows": N_ROWS}}
RECORD = {"rows": N_ROWS, "failed": len(FAILED), "fingerprint": FINGERPRINT}
MENDED = {**RECORD, "failed": 0}
SETTINGS: dict[str, Any] = {
    "model_path": "none",
    "model_type": "classifier",
    "input_table": "in.parquet",
    "reserved_columns": ["id"],
    "device": "cpu",
}
OUTPUTS = {"lines": ("output_oss_file", "out.jsonl"), "table": ("output_table", "out")}
OLD = b"an older result"
Files = dict[str, bytes]


@dataclass(frozen=True)
class Place:
    """Where the result of a job goes, all of whose rows are committed.

    Attributes:
        form: of the output, by OUTPUTS.
        committed: a staging place with the rows, to be copied.
        kind: `new`, `fresh` where something else stands there that is to be replaced, or `retry`
            where the result stands there, and what is committed are its failed rows.
    """

    folder: Path
    form: str
    committed: Path
    kind: str = "new"

    @property
    def job(self) -> Job:
        key, name = OUTPUTS[self.form]
        return Job(**{**SETTINGS, key: str(self.folder / name)})

    @property
    def target(self) -> LocalTarget:
        """A new one each time, as each run has its own."""
        return LocalTarget.of(self.job)

    @property
    def record(self) -> dict[str, Any]:
        """The record that is published."""
        return MENDED if self.kind == "retry" else RECORD

    def filled(self) -> Place:
        """Put there what is there before the publish."""
        self.folder.mkdir()
        self.target.prepare()
        if self.kind == "fresh":
            self.put_old()
            self.target.start_over()
        self.commit_all()
        if self.kind == "retry":
            self.publish_first()
            self.retry()
        return self

    def put_old(self) -> None:
        """Put something else there."""
        path = self.target.path
        if self.form == "table":
            path.mkdir()
            path = path / "part-00000.parquet"
        path.write_bytes(OLD)

    def commit_all(self) -> None:
        """Have all rows committed."""
        shutil.copytree(self.committed, self.target.staging, dirs_exist_ok=True)

    def publish_first(self) -> None:
        """Publish all rows."""
        publish(self.job, KEYS, N_ROWS, self.target, RECORD)
        self.target.ledger.remove()

    def retry(self) -> None:
        """Have the failed rows committed again, without failures."""
        target = self.target
        target.prepare()
        target.start_over()
        standing = target.standing()
        assert standing is not None
        target.ledger.open({**FINGERPRINT, "retry": standing["result"]})
        stage_block(self.job, target.ledger, Block(0, len(FAILED)), FAILED, is_mended=True)

    def publish(self) -> Callable[[], None]:
        """Return what publishes, as the job's helper does."""
        failed = FAILED if self.kind == "retry" else None
        return partial(publish, self.job, KEYS, N_ROWS, self.target, self.record, failed)

    def go_on(self) -> None:
        """Do what a run does that finds every row committed, under the same record."""
        target = self.target
        target.prepare()
        with target.ledger.lock():
            target.restore()
            if not target.settle() and not target.finished():
                target.ledger.sweep()
                self.publish()()
        target.remove_parts()
        target.clean_up()

    def run(self) -> Callable[[], object]:
        """Return what runs the job, which finds every row committed."""
        return run_of(self.job, self.target, is_retry=self.kind == "retry")

    def result(self) -> Files:
        """Return the files of the result by name, none where it is not there."""
        path = self.target.path
        paths = path.iterdir() if path.is_dir() else [path]
        return {it.name: it.read_bytes() for it in paths if it.exists()}

    def check_visible(self, old: Files, new: Files) -> None:
        """A result is there whole or not at all; an old one is until its successor is there."""
        assert self.result() in (old, new)

    def check(self, new: Files) -> dict[str, Any]:
        """At the end there are the result and its record, and nothing else. Returns the record."""
        assert self.result() == new
        names = [self.target.path.name, self.target.record.name]
        assert sorted(it.name for it in self.folder.iterdir()) == names
        record = self.target.finished()
        assert record is not None
        return record


def run_of(job: Job, target: Target, *, is_retry: bool) -> Callable[[], object]:
    """Return what runs a job, all of whose rows are committed."""
    package: Any = SimpleNamespace(
        input=SimpleNamespace(height=32, width=32), files=[Path(os.devnull)]
    )
    plan = Plan(
        job=job,
        package=package,
        layout=plan_layout(job, package),
        source=SourceInfo(N_ROWS, FINGERPRINT["input"], KEYS),
        target=target,
        block_rows=16,
        fingerprint=FINGERPRINT,
    )
    return Run(plan, Quiet(), retry=is_retry).run


def stage_block(
    job: Job, ledger: Ledger, block: Block, rows: Sequence[int], *, is_mended: bool = False
) -> None:
    """Commit a block."""
    file = ledger.stage("run", block.start)
    records = [record_of(row, is_failed=row in FAILED and not is_mended) for row in rows]
    with open(file, "ab", buffering=0) as stage:
        open_sink(job, KEYS).append(cast(Any, stage), records)
    assert ledger.commit(file, block, sum(it.failed for it in records), {})


def staged(ledger: Ledger, commit: Commit) -> bytes:
    """Return a committed stage file, which is compared with its record."""
    with ledger.data(commit) as file:
        return file.read_bytes()


def record_of(row: int, *, is_failed: bool) -> Record:
    result = error_result("decode", f"row {row}") if is_failed else orjson.dumps({"class": row})
    return Record(row, (f"row {row}",), result, is_failed)


def make_committed(folder: Path, form: str, is_mended: bool) -> Path:
    place = Place(folder, form, Path())
    ledger = place.target.ledger
    ledger.open(FINGERPRINT)
    for block in BLOCKS:
        rows = range(block.start, block.stop)
        stage_block(place.job, ledger, block, rows, is_mended=is_mended)
    return ledger.root
