"""The writer: rows of the last ring into blocks, once, whoever had begun them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
from unpublished import staged

from evmp import writer
from evmp.agenda import Agenda
from evmp.grid import Block
from evmp.job import Job
from evmp.ledger import Ledger
from evmp.metrics import Board, Counter, Seat
from evmp.ring import Header, Mark, Ring
from evmp.source import KeyField
from evmp.stage import put_failure
from evmp.writer import Writer

KEYS = (KeyField("image"),)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "out.jsonl.evmp")
    ledger.open({})
    return ledger


def filled_ring(rows: Sequence[int], n_rows: int = 2) -> Ring:
    """Return a closed result ring that holds a result for each of `rows`."""
    ring = Ring("results", max(2, -(-len(rows) // n_rows)), n_rows, 4096)
    for n, row in enumerate(rows):
        ring.set_note(n, pickle.dumps((f"{row}.jpg",)))
        ring.put(n, Header(row), b'{"class":%d}' % row)
    n = len(rows)
    while n % n_rows:
        ring.skip(n, 0)
        n += 1
    ring.close(n)
    return ring


def make_writer(
    ledger: Ledger,
    ring: Ring,
    blocks: Sequence[Block],
    output: str = "output_oss_file: o.jsonl",
    seat: Seat | None = None,
) -> Writer:
    key, _, value = output.partition(": ")
    job = Job(model_path="m", model_type="classifier", input_oss_file="l", **{key: value})
    seat = seat or Board(["writer"], 1).workers[0][0]
    agenda = Agenda.of(blocks)
    for number, block in enumerate(blocks):
        agenda.begin(number, block.start)
    made = Writer(job, KEYS, ledger, agenda, range(1 << 20), "run", ring, seat, 0)
    made.open()
    return made


def written(ledger: Ledger) -> dict[tuple[int, int], list[bytes]]:
    return {(c.start, c.stop): staged(ledger, c).splitlines() for c in ledger.commits()}


def line(row: int) -> bytes:
    return b'{"image":"%d.jpg","prediction_result":{"class":%d}}' % (row, row)


def test_blocks_are_committed_as_planned(ledger: Ledger) -> None:
    make_writer(ledger, filled_ring(range(5)), [Block(0, 3), Block(3, 5)]).run()

    assert written(ledger) == {(0, 3): [line(0), line(1), line(2)], (3, 5): [line(3), line(4)]}


def test_block_that_is_stopped_is_committed_as_far_as_it_is(ledger: Ledger) -> None:
    make_writer(ledger, filled_ring(range(3)), [Block(0, 100)]).run()

    assert list(written(ledger)) == [(0, 3)]


def test_failures_are_counted_with_their_reasons(ledger: Ledger) -> None:
    ring = Ring("results", 2, 1, 4096)
    ring.set_note(0, pickle.dumps(("0.jpg",)))
    put_failure(ring, 0, 0, "decode", "not an image")
    ring.close(1)

    make_writer(ledger, ring, [Block(0, 1)]).run()

    (commit,) = ledger.commits()
    assert commit.failed == 1
    assert commit.reasons == {"decode: not an image": [1, 0, "not an image"]}


def test_result_that_fits_into_no_cell_is_a_failure(ledger: Ledger) -> None:
    ring = Ring("results", 2, 1, 9 << 20)
    for n in range(2):
        ring.set_note(n, pickle.dumps((f"{n}.jpg",)))
        ring.put(n, Header(n), b'"%s"' % (b"x" * (n * (8 << 20))))
    ring.close(2)

    make_writer(ledger, ring, [Block(0, 2)], "output_table: odps://shop/tables/results").run()

    (commit,) = ledger.commits()
    assert commit.failed == 1
    reason = "write: a result of … bytes, of which the output takes …"
    assert commit.reasons == {
        reason: [1, 1, "a result of 8388610 bytes, of which the output takes 8388608"]
    }


def test_rows_of_a_large_block_are_committed_in_pieces(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_BLOCK_BYTES", 100)

    make_writer(ledger, filled_ring(range(5)), [Block(0, 5)]).run()

    assert list(written(ledger)) == [(0, 2), (2, 4), (4, 5)]


def test_successor_goes_on_behind_pieces_that_are_committed(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_writer(ledger, filled_ring(range(2)), [Block(0, 5)]).run()

    make_writer(ledger, filled_ring(range(5)), [Block(0, 5)]).run()

    assert list(written(ledger)) == [(0, 2), (2, 5)]
    assert written(ledger)[2, 5] == [line(2), line(3), line(4)]


def test_successor_drops_rows_of_a_block_that_is_committed(ledger: Ledger) -> None:
    blocks = [Block(0, 2), Block(2, 4)]
    make_writer(ledger, filled_ring(range(2)), blocks).run()
    before = written(ledger)

    made = make_writer(ledger, filled_ring(range(4)), blocks)
    made.run()

    assert written(ledger) == {**before, (2, 4): [line(2), line(3)]}
    assert made._seat.counters[Counter.ROWS] == 2


def commit_elsewhere(ledger: Ledger, block: Block) -> None:
    stage = ledger.stage("elsewhere", block.start)
    stage.write_bytes(b"".join(line(row) + b"\n" for row in range(block.start, block.stop)))
    assert ledger.commit(stage, block, 0, {})


def test_large_piece_that_loses_to_a_small_one_leaves_the_rest_to_others(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_BLOCK_BYTES", 100)
    commit_elsewhere(ledger, Block(0, 1))
    made = make_writer(ledger, filled_ring(range(8)), [Block(0, 6), Block(6, 8)])
    # What it has begun before the other commits, it goes on with.
    monkeypatch.setattr(ledger, "stop_of", lambda start, look=ledger.stop_of: None)
    made._open_block(0)
    monkeypatch.undo()
    monkeypatch.setattr(writer, "MAX_BLOCK_BYTES", 100)

    made.run()

    assert list(written(ledger)) == [(0, 1), (6, 8)]
    assert made._seat.counters[Counter.ROWS] == 2


def test_successor_leaves_to_others_what_its_predecessor_wrote_in_vain(ledger: Ledger) -> None:
    ledger.stage("run", 0).write_bytes(b"".join(line(row) + b"\n" for row in range(3)))
    commit_elsewhere(ledger, Block(0, 2))

    made = make_writer(ledger, filled_ring(range(3, 6)), [Block(0, 6)])
    made.run()

    assert list(written(ledger)) == [(0, 2)]
    assert made._agenda.n_done == 1
    assert made._agenda.committed(0) == 2


def test_successor_cuts_a_torn_row_off_and_writes_it_again(ledger: Ledger) -> None:
    stage = ledger.stage("run", 0)
    stage.write_bytes(line(0) + b"\n" + line(1)[:10])

    make_writer(ledger, filled_ring(range(3)), [Block(0, 3)]).run()

    assert written(ledger) == {(0, 3): [line(0), line(1), line(2)]}


def test_rows_that_a_predecessor_had_not_counted_are_counted_once(ledger: Ledger) -> None:
    seat = Board(["writer"], 1).workers[0][0]
    ledger.stage("run", 0).write_bytes(line(0) + b"\n" + line(1) + b"\n")
    blocks = [Block(0, 3), Block(3, 4)]

    make_writer(ledger, filled_ring(range(4)), blocks, seat=seat).run()
    assert seat.counters[Counter.ROWS] == 4

    make_writer(ledger, filled_ring(range(4)), blocks, seat=seat).run()
    assert seat.counters[Counter.ROWS] == 4


def test_rows_that_only_fill_a_batch_up_are_not_written(ledger: Ledger) -> None:
    ring = filled_ring([0], n_rows=4)
    assert ring.header(3).mark == Mark.EMPTY

    make_writer(ledger, ring, [Block(0, 1)]).run()

    assert written(ledger) == {(0, 1): [line(0)]}
