"""Parquet outputs: a single file, or a directory of them for `output_table`.

Columns: the reserved columns with their types, then the result column, JSON text. For a file list,
the line comes first, as `image`; so does the URL of a table of URLs where the output is a file and
not a table. What stands in the output's path as `column=value` is no column of the files.

Stage files hold frames of Arrow record batches (`evmp.sink.frame`). `merge` cuts the stream of
their rows anew into row groups and files, by rows and bytes alone, so that the result's bytes do
not depend on how the rows were spread over blocks, batches and workers.
"""

from __future__ import annotations

import bisect
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evmp.errors import SinkError
from evmp.key import KeyField, arrow_field
from evmp.sink import Record, Recovered, check_amended, reading, sync, write_whole, writing
from evmp.sink.frame import Frame, frame_header, frames

if TYPE_CHECKING:
    from evmp.job import Job

FRAME_BYTES = 64 << 20  # of text in a frame, unless a single row has more
GROUP_BYTES = 64 << 20  # of text in a row group, likewise
GROUP_ROWS = 1 << 17
PART_BYTES = 256 << 20  # a file of a table is full after the row group that passes this
ERROR_START = '{"error_stage":'
JOIN_ROWS, JOIN_BYTES = 1024, 4 << 20
OPTIONS: dict[str, Any] = {
    "compression": "zstd",  # measured on results: as fast as snappy at level 1, and 0.6 of its size
    "compression_level": 1,
    "use_dictionary": False,
    "write_batch_size": 64,  # rows between two looks at a page's size: readers hold whole pages
}


class ParquetSink:
    """Rows of the key columns and the result.

    Attributes:
        schema: of the output's rows.
    """

    is_joining = False

    def __init__(self, job: Job, keys: Sequence[KeyField]) -> None:
        self._is_table = bool(job.output_table) and not job.output_table.endswith(".parquet")
        kept = [
            (place, key)
            for place, key in enumerate(keys)
            if not job.output_table or key.is_line or key.name in job.reserved_columns
        ]
        self._places = [place for place, _ in kept]
        fields = [arrow_field(key) for _, key in kept]
        self.schema = pa.schema([*fields, pa.field(job.result_column, pa.string())])
        self._options = {**OPTIONS, "write_statistics": [key.name for _, key in kept]}
        self._crc32 = zlib.crc32(self.schema.serialize().to_pybytes())

    def append(self, file: BinaryIO, records: Sequence[Record]) -> None:
        """Append the records as frames; see Sink."""
        for part in _by_size(records):
            body = self._batch(part).serialize()
            n_failed = sum(record.failed for record in part)
            header = frame_header(self._crc32, len(part), n_failed, body.size)
            if body.size <= FRAME_BYTES:
                write_whole(file, b"".join((header, memoryview(body))))
            else:  # a single row
                write_whole(file, header)
                write_whole(file, memoryview(body))

    def recover(self, path: Path) -> Recovered:
        """Cut off a frame that is not whole; see Sink."""
        with writing(path):
            if not path.exists():
                return Recovered(0, 0)
            with open(path, "r+b") as file:
                whole = [self._checked(path, frame) for frame in frames(file)]
                file.truncate(whole[-1].stop if whole else 0)
        n_rows = sum(frame.n_rows for frame in whole)
        return Recovered(n_rows, sum(frame.n_failed for frame in whole))

    def merge(self, stages: Iterable[Path], out: Path) -> int:
        """Write Parquet files; see Sink."""
        return self._write_out(self.rows(stages), out)

    def rows(self, stages: Iterable[Path]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of whole stage files, in order.

        Raises:
            SinkError: when a stage file is missing or torn.
        """
        return _joined(batch for stage in stages for batch in self._batches(stage))

    def _write_out(self, batches: Iterable[pa.RecordBatch], out: Path) -> int:
        groups = _row_groups(batches)
        with writing(out):
            if self._is_table:
                out.mkdir()
                parts = (out / f"part-{number:05d}.parquet" for number in count())
                n_rows = self._write(groups, parts, full_bytes=PART_BYTES)
                sync(out)
            else:
                n_rows = self._write(groups, iter((out,)), full_bytes=None)
            sync(out.parent)
        return n_rows

    def failures(self, result: Path) -> array[int]:
        """Look at the result column; see Sink."""
        rows, start = array("q"), 0
        for batch in self._published(result):
            failed = pc.starts_with(batch.columns[-1], ERROR_START)
            rows.extend(start + int(place) for place in np.flatnonzero(failed))
            start += batch.num_rows
        return rows

    def amend(self, result: Path, rows: Sequence[int], stages: Iterable[Path], out: Path) -> int:
        """Replace the results, not the keys; see Sink."""
        new = (batch for stage in stages for batch in self._batches(stage))
        return self._write_out(_joined(_amended(self._published(result), rows, new)), out)

    def _published(self, result: Path) -> Iterator[pa.RecordBatch]:
        """Yield the rows of Parquet files that this sink has written."""
        paths = sorted(result.glob("part-*.parquet")) if result.is_dir() else [result]
        for path in paths:
            try:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(JOIN_ROWS, use_threads=False):
                        table = pa.Table.from_batches([batch]).cast(self.schema)
                        yield from table.to_batches()
            except (pa.ArrowException, OSError, ValueError) as error:
                raise SinkError(f"cannot read {path}: {error}; start over with --fresh") from error

    def _batch(self, records: Sequence[Record]) -> pa.RecordBatch:
        columns: list[list[Any]] = [
            [record.keys[place] for record in records] for place in self._places
        ]
        arrays = [
            pa.array(values, type=field.type)
            for values, field in zip(columns, self.schema, strict=False)
        ]
        return pa.RecordBatch.from_arrays([*arrays, _texts(records)], schema=self.schema)

    def _checked(self, path: Path, frame: Frame) -> Frame:
        if frame.schema_crc32 != self._crc32:
            raise SinkError(
                f"stage file {path} has other columns than this job's output; start over with "
                "--fresh"
            )
        return frame

    def _batches(self, stage: Path) -> Iterator[pa.RecordBatch]:
        with reading(stage), open(stage, "rb") as file:
            stop = 0
            for frame in frames(file):
                self._checked(stage, frame)
                file.seek(frame.start)
                body = file.read(frame.stop - frame.start)
                yield self._decoded(stage, frame, body)
                stop = frame.stop
            if stop != file.seek(0, 2):
                raise SinkError(
                    f"stage file {stage} is torn after {stop} bytes: it was changed after it had "
                    "been committed; start over with --fresh"
                )

    def _decoded(self, stage: Path, frame: Frame, body: bytes) -> pa.RecordBatch:
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(body), self.schema)
            batch.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise SinkError(
                f"stage file {stage} is damaged at byte {frame.start}: {error}; start over with "
                "--fresh"
            ) from None
        return batch

    def _write(
        self, groups: Iterator[pa.Table], paths: Iterator[Path], *, full_bytes: int | None
    ) -> int:
        """Write row groups into one file after another, at least one, for its columns."""
        n_rows = 0
        group = next(groups, None)
        for path in paths:
            with (
                open(path, "xb") as file,
                pq.ParquetWriter(file, self.schema, **self._options) as writer,
            ):
                while group is not None and (full_bytes is None or file.tell() < full_bytes):
                    writer.write_table(group, row_group_size=group.num_rows)
                    n_rows += group.num_rows
                    group = next(groups, None)
            sync(path)
            if group is None:
                break
        return n_rows


def _texts(records: Sequence[Record]) -> pa.StringArray:
    """Return the results as a column; a single one is not copied."""
    if len(records) > 1:
        return pa.array([bytes(record.result) for record in records], type=pa.string())
    text = pa.py_buffer(records[0].result)
    ends = pa.py_buffer(np.array([0, text.size], np.int32).tobytes())
    return pa.StringArray.from_buffers(1, ends, text)


def _by_size(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Cut records into runs of at most FRAME_BYTES of text, or of one row."""
    start = size = 0
    for place, record in enumerate(records):
        n_bytes = len(record.result)
        n_bytes += sum(len(value) for value in record.keys if isinstance(value, (str, bytes)))
        if size + n_bytes > FRAME_BYTES and place > start:
            yield records[start:place]
            start, size = place, 0
        size += n_bytes
    if len(records) > start:
        yield records[start:]


def _row_groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Cut the rows of `batches` into tables, each as long as GROUP_BYTES and GROUP_ROWS let it."""
    held: list[pa.RecordBatch] = []
    n_rows = n_bytes = 0
    for batch in batches:
        start = 0
        ends = np.cumsum(_text_bytes(batch))  # of the rows' text, from the batch's start
        while start < batch.num_rows:
            before = int(ends[start - 1]) if start else 0
            fits = int(np.searchsorted(ends, before + GROUP_BYTES - n_bytes, side="right"))
            stop = min(max(fits, start if n_rows else start + 1), start + GROUP_ROWS - n_rows)
            if stop > start:
                held.append(batch.slice(start, stop - start))
                n_rows += stop - start
                n_bytes += int(ends[stop - 1]) - before
            if stop < batch.num_rows:
                yield pa.Table.from_batches(held).combine_chunks()
                held, n_rows, n_bytes = [], 0, 0
            start = stop
    if held:
        yield pa.Table.from_batches(held).combine_chunks()


def _amended(
    batches: Iterable[pa.RecordBatch], rows: Sequence[int], new: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Replace the last column of some rows by that of the batches `new`, row for row."""
    results = (result.as_py() for batch in new for result in batch.columns[-1])
    start = 0
    for batch in batches:
        stop = start + batch.num_rows
        first, last = bisect.bisect_left(rows, start), bisect.bisect_left(rows, stop)
        if first < last:
            mask = np.zeros(batch.num_rows, bool)
            mask[np.asarray(rows[first:last]) - start] = True
            there = pa.array(list(islice(results, last - first)), batch.schema.types[-1])
            check_amended(len(there) == last - first)
            column = pc.replace_with_mask(batch.columns[-1], pa.array(mask), there)
            batch = pa.RecordBatch.from_arrays([*batch.columns[:-1], column], schema=batch.schema)
        yield batch
        start = stop
    check_amended(len(rows) == bisect.bisect_left(rows, start) and next(results, None) is None)


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Join small batches: with `batch_size: 1` a frame has one row, and each step has its price."""
    held: list[pa.RecordBatch] = []
    n_rows = n_bytes = 0
    for batch in batches:
        held.append(batch)
        n_rows, n_bytes = n_rows + batch.num_rows, n_bytes + batch.nbytes
        if n_rows >= JOIN_ROWS or n_bytes >= JOIN_BYTES:
            yield from pa.Table.from_batches(held).combine_chunks().to_batches()
            held, n_rows, n_bytes = [], 0, 0
    if held:
        yield from pa.Table.from_batches(held).combine_chunks().to_batches()


def _text_bytes(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """Return the bytes of text or binary in each row, those nested in other types left out."""
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        if isinstance(
            column, (pa.StringArray, pa.LargeStringArray, pa.BinaryArray, pa.LargeBinaryArray)
        ):
            lengths: Any = pc.binary_length(column)
            sizes += lengths.fill_null(0).to_numpy()
    return sizes
