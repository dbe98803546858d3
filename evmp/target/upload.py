"""Rows into a MaxCompute table or partition, in the place of those that are there, in one step.

Blocks of rows go up side by side, within one session; nothing of them can be seen before the
session is committed. A block that is refused, damaged or cut on its way is sent again under its
number, which replaces what has come of it. The service drops a session after a day: then another
one begins, and everything is sent again. An answer to the commit that is lost, or is an error, says
nothing: the session tells whether it is closed.

Rows go as Arrow, as they lie in the stage files: messages cut into chunks, a checksum behind each.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pyarrow as pa
from odps.errors import ODPSError
from odps.tunnel import TableUploadSession
from odps.tunnel.checksum import Checksum

from evmp.errors import SinkError
from evmp.maxcompute import OUTAGE, Patience, Service, Unavailable, Unreachable, arrow_type, persist
from evmp.target.column import Kind

if TYPE_CHECKING:
    from evmp.value import TableName

Batches = Callable[[], Iterator[pa.RecordBatch]]
"""Yields the rows of a block; called again where they have to be sent again."""
N_STREAMS: Final = 4
REFUSED: Final = (401, 403)
CHUNK_BYTES: Final = 64 << 10
MAX_SESSIONS: Final = 3
MAX_REFUSALS: Final = 3  # of one block: a checksum that was wrong may be right the next time
PIECE_BYTES: Final = 4 << 20  # of a message; each is copied a few times on its way


class _Over(Exception):
    """The session has ended without a commit."""


class Upload:
    """Rows on their way into a table or a partition, which is there.

    Args:
        kinds: of the columns.
        blocks: the rows, at least one block, if one without rows.
        seconds: for how long the service may be out of order.
    """

    def __init__(
        self,
        service: Service,
        table: TableName,
        kinds: Mapping[str, Kind],
        blocks: Sequence[Batches],
        seconds: float,
    ) -> None:
        self._service, self._table, self._kinds = service, table, kinds
        self._blocks, self._seconds = blocks, seconds
        self._session: TableUploadSession

    def run(self, begun: Callable[[str], None]) -> None:
        """Replace the rows.

        Args:
            begun: is told the session that may become the table's, before anything is sent.

        Raises:
            SinkError: when a value cannot be one of its column's, or a block cannot be read.
            ODPSError: when the service refuses.
            Exception: one of OUTAGE, when it is out of order for too long.
        """
        for _ in range(MAX_SESSIONS):
            self._session = persist(lambda: self._service.upload(self._table), self._seconds)
            begun(self._session.id)
            try:
                self._send_all()
                self._commit()
                return
            except _Over:
                continue
        raise Unavailable(f"{MAX_SESSIONS} sessions have ended before their time")

    def _send_all(self) -> None:
        with ThreadPoolExecutor(N_STREAMS) as pool:
            sent = [pool.submit(self._send, number) for number in range(len(self._blocks))]
            try:
                for block in sent:
                    block.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _send(self, number: int) -> None:
        """Send a block until all of it is there."""
        patience, n_refusals = Patience(self._seconds), 0
        columns = self._session.schema.simple_columns
        schema = pa.schema([(column.name, arrow_type(column.type)) for column in columns])
        while True:
            try:
                batches = self._blocks[number]()
                pieces = (
                    fitted(piece, self._kinds, schema) for it in batches for piece in _pieces(it)
                )
                self._service.put(self._table, self._session, number, stream(pieces))
                return
            except OUTAGE:
                if not patience.wait():
                    raise
            except ODPSError:
                n_refusals += 1
                self._check()
                if n_refusals == MAX_REFUSALS:
                    raise

    def _commit(self) -> None:
        patience, n_refusals = Patience(self._seconds), 0
        while True:
            error: Exception = Unavailable("the commit has not ended")
            try:
                self._session.commit(list(range(len(self._blocks))))
            except OUTAGE as outage:
                error = outage
            except ODPSError as refusal:
                error, n_refusals = refusal, n_refusals + 1
            status = self._check()
            if status == "CLOSED":
                return
            is_final = status == "NORMAL" and n_refusals == MAX_REFUSALS
            if is_final or not patience.wait():
                raise error

    def _check(self) -> str:
        """Return the status of the session.

        Raises:
            _Over: when nothing can become of it.
        """
        status = status_of(self._service, self._table, self._session.id, self._seconds)
        if status not in ("NORMAL", "CLOSING", "CLOSED"):
            raise _Over
        return status


def status_of(service: Service, table: TableName, session: str, seconds: float) -> str:
    """Return how it is with a session; empty where the service does not know it any more.

    Raises:
        ODPSError: when nobody may ask.
        Exception: one of OUTAGE, when the service is out of order for too long.
    """
    try:
        return str(persist(lambda: service.upload(table, session), seconds).status.value)
    except ODPSError as error:
        if isinstance(error, Unreachable) or error.status_code in REFUSED:
            raise
        return ""


def stream(batches: Iterable[pa.RecordBatch]) -> Iterator[bytes]:
    """Yield the body of a block: of all chunks the size, each with its CRC-32C, then that of all.

    pyodps' own writer takes pandas and a thread more for each block.
    """
    yield struct.pack(">I", CHUNK_BYTES)
    total, held = Checksum(), bytearray()
    for batch in batches:
        held += batch.serialize()
        n_whole = len(held) // CHUNK_BYTES * CHUNK_BYTES
        for start in range(0, n_whole, CHUNK_BYTES):
            chunk = bytes(held[start : start + CHUNK_BYTES])
            own = Checksum()
            own.update(chunk)
            total.update(chunk)
            yield chunk + _crc(own)
        del held[:n_whole]
    total.update(bytes(held))
    yield bytes(held) + _crc(total)


def _crc(checksum: Checksum) -> bytes:
    return struct.pack(">I", checksum.getvalue() & 0xFFFFFFFF)


def fitted(batch: pa.RecordBatch, kinds: Mapping[str, Kind], schema: pa.Schema) -> pa.RecordBatch:
    """Return rows as the columns of a table, in its order and with its names.

    Args:
        schema: the table's; its types are those of `kinds` but for the names within them.

    Raises:
        SinkError: when a value has no place there.
    """
    columns = dict(zip((name.lower() for name in batch.schema.names), batch.columns, strict=True))
    arrays = []
    for name in schema.names:
        try:
            arrays.append(columns[name.lower()].cast(kinds[name.lower()].dtype))
        except pa.ArrowException as error:
            raise SinkError(
                f"output_table: a value of column {name!r} cannot be one of MaxCompute's type "
                f"{kinds[name.lower()].name}: {error}; leave it out of reserved_columns, and "
                "start over with --fresh"
            ) from None
    body = pa.RecordBatch.from_arrays(arrays, names=schema.names).serialize()
    # Casts match fields of structs by their names, whose case the service does not keep.
    return pa.ipc.read_record_batch(body, schema)


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    n_rows = max(1, batch.num_rows * PIECE_BYTES // max(batch.nbytes, 1))
    for start in range(0, max(batch.num_rows, 1), n_rows):
        yield batch.slice(start, n_rows)
