"""The report: why rows failed, counted alike, and what a run says of itself."""

from __future__ import annotations

import io
import json

import orjson
from rich.console import Console

from evmp import __version__
from evmp.metrics import Board, Counter
from evmp.report import MAX_REASONS, Reasons, Report
from evmp.stage import error_result


def reasons_of(*messages: str) -> Reasons:
    reasons = Reasons()
    for row, message in enumerate(messages):
        reasons.add(row, error_result("decode", message))
    return reasons


def report() -> Report:
    board = Board(["worker", "reader", "decoder", "decoder", "predictor", "writer"], 2)
    for seats in board.workers:
        for seat in seats[2:4]:
            seat.add(Counter.ROWS, 10)
            seat.add(Counter.BUSY_NS, 3_000_000_000)
            seat.add(Counter.WAIT_IN_NS, 1_000_000_000)
    readings = [seat.read() for seats in board.workers for seat in seats]
    reasons = reasons_of("not an image", "not an image").as_dict()
    return Report(40, 2, 30, 2.0, reasons, readings)


def test_alike_failures_are_one_reason_with_its_first_row() -> None:
    reasons = reasons_of(
        "/a/'1'.jpg: truncated JPEG: the data ends (17 bytes)",
        "empty image",
        "/a/'2'.jpg: truncated JPEG: the data ends (19 bytes)",
    )

    (first, second) = reasons.as_dict().values()
    assert first == [2, 0, "/a/'1'.jpg: truncated JPEG: the data ends (17 bytes)"]
    assert second == [1, 1, "empty image"]


def test_reasons_of_blocks_add_up() -> None:
    total = Reasons()
    for block in (["a", "b"], ["b"], ["b", "c"]):
        total.merge([reasons_of(*block).as_dict()])

    assert [reason[0] for reason in total.as_dict().values()] == [3, 1, 1]


def test_words_tell_the_three_commonest() -> None:
    lines = reasons_of("d", "a", "a", "a", "b", "b", "c", "c").in_words()

    assert lines == [
        "3 x a (first in row 1; decode)",
        "2 x b (first in row 4; decode)",
        "2 x c (first in row 6; decode)",
    ]


def test_kinds_of_reasons_are_bounded() -> None:
    reasons = reasons_of(*(chr(97 + i % 26) * (i + 1) for i in range(1000)))

    assert len(reasons.as_dict()) == MAX_REASONS


def test_rows_that_nobody_counted_are_told() -> None:
    reasons = Reasons()
    reasons.add_unknown(40, 0)
    assert reasons.as_dict() == {}

    reasons.add_unknown(40, 3)

    assert reasons.in_words() == ["3 x see the result (first in row 40; unknown)"]


def test_stages_are_summed_over_workers() -> None:
    stages = report().stages()

    assert list(stages) == ["reader", "decoder", "predictor", "writer"]
    decoder = stages["decoder"]
    assert (decoder["processes"], decoder["rows"], decoder["busy"]) == (4, 40, 12.0)


def test_record_is_json_with_all_that_counts() -> None:
    record = report().record({"batch_size": 8}, {"input": {}})

    assert json.loads(orjson.dumps(record)) == record
    assert record["evmp"] == __version__
    assert (record["state"], record["rows"], record["failed"]) == ("done", 40, 2)
    assert record["failures"] == [
        {"reason": "decode: not an image", "count": 2, "first_row": 0, "example": "not an image"}
    ]
    assert record["run"]["rows_per_second"] == 15.0
    assert record["job"] == {"batch_size": 8}


def test_table_has_a_line_for_each_stage() -> None:
    screen = io.StringIO()
    Console(file=screen, width=80).print(report().table())

    header, *lines = screen.getvalue().splitlines()
    assert header.split() == ["stage", "n", "rows", "failed", "MB", "busy", "waited", "restarts"]
    assert lines[1].split() == ["decoder", "4", "40", "0", "0.0", "75", "%", "25", "%", "0"]
