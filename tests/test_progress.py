"""Progress: the right numbers off the board, and each display's manners."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from evmp import progress
from evmp.metrics import Board, Counter
from evmp.progress import Lines, Live, Meter, Quiet, Snapshot, describe, open_display

ROLES = ["worker", "reader", "decoder", "decoder", "predictor", "writer"]
SECOND_NS = 1_000_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that progress.py sees, in seconds; a test sets its one element."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def snapshot(**fields: object) -> Snapshot:
    base = {
        "done": 250,
        "total": 1000,
        "failed": 3,
        "rate": 50.0,
        "fill": {"payloads": 0.5, "pixels": 1.0, "results": 0.0},
        "busy": {"reader": 0.1, "decoder": 0.99, "predictor": 0.2, "writer": 0.0},
        "restarts": 0,
    }
    return Snapshot(**{**base, **fields})  # type: ignore[arg-type]


def test_rows_are_those_written_before_and_now() -> None:
    board = Board(ROLES, 2)
    meter = Meter(board.workers, total=100, elsewhere=(10, 1))
    meter.rebase(0, 20, 2)
    board.workers[0][-1].add(Counter.ROWS, 5)
    board.workers[1][-1].add(Counter.ROWS, 3)
    board.workers[1][-1].add(Counter.FAILED, 1)

    assert meter.rows() == (38, 4)
    assert (meter.read().done, meter.read().failed, meter.read().total) == (38, 4, 100)


def test_rows_of_a_dead_worker_count_from_its_last_commit() -> None:
    board = Board(ROLES, 1)
    meter = Meter(board.workers, total=100, elsewhere=(0, 0))
    board.workers[0][-1].add(Counter.ROWS, 50)

    meter.rebase(0, 40, 0)

    assert meter.rows() == (40, 0)


def test_rate_and_eta_are_those_of_the_last_seconds(clock: list[float]) -> None:
    board = Board(ROLES, 1)
    meter = Meter(board.workers, total=1000, elsewhere=(0, 0))
    assert meter.read().rate == 0.0
    assert meter.read().eta_seconds is None

    for rows in (100, 20, 20, 20):  # fast once, long ago
        clock[0] += 10.0
        board.workers[0][-1].add(Counter.ROWS, rows)
        last = meter.read()

    assert last.rate == pytest.approx(2.0)
    assert last.eta_seconds == pytest.approx((1000 - 160) / 2.0)


def test_fill_is_the_mean_over_workers() -> None:
    board = Board(ROLES, 2)
    board.workers[0][0].counters[Counter.FILL + 1] = 1000
    meter = Meter(board.workers, total=1, elsewhere=(0, 0))

    assert meter.read().fill == {"payloads": 0.0, "pixels": 0.5, "results": 0.0}


def test_bottleneck_is_the_stage_that_is_always_busy(clock: list[float]) -> None:
    board = Board(ROLES, 1)
    meter = Meter(board.workers, total=1, elsewhere=(0, 0))
    meter.read()
    clock[0] += 1.0
    for seat in board.workers[0][2:4]:
        seat.add(Counter.BUSY_NS, SECOND_NS)
    board.workers[0][4].add(Counter.BUSY_NS, SECOND_NS // 4)
    board.workers[0][4].add(Counter.WAIT_IN_NS, 3 * SECOND_NS // 4)

    last = meter.read()

    assert last.busy["decoder"] == 1.0
    assert last.busy["predictor"] == pytest.approx(0.25)
    assert last.bottleneck == "decoder"


def test_no_stage_that_also_waits_is_the_bottleneck() -> None:
    assert snapshot(busy={"reader": 0.5, "decoder": 0.6}).bottleneck == ""
    assert snapshot(busy={}).bottleneck == ""


def test_line_says_everything() -> None:
    assert describe(snapshot()) == (
        "250/1000 rows (25.0 %), 50.0 rows/s, ETA 00:15, 3 failed, "
        "queues payloads 50 % pixels 100 % results 0 %, bottleneck: decoder"
    )


def test_line_of_a_job_of_hours_with_restarts() -> None:
    line = describe(snapshot(rate=0.1, restarts=2))

    assert "ETA 2:05:00" in line
    assert "2 restarts" in line


def test_line_before_the_first_row() -> None:
    line = describe(snapshot(done=0, total=0, rate=0.0))

    assert line.startswith("0/0 rows (0.0 %), 0.0 rows/s, ETA --:--")


def test_lines_come_every_few_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines()
    for _ in range(120):
        clock[0] += 0.1
        lines.show(snapshot())

    assert capsys.readouterr().err.count("250/1000") == 2


def test_quiet_shows_nothing_but_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Quiet()
    quiet.show(snapshot())
    quiet.note("resuming: 5 of 10 rows are done")
    quiet.close()
    assert capsys.readouterr().err == ""

    quiet.emit("warning: decoder[0] died")

    assert capsys.readouterr().err == "warning: decoder[0] died\n"


def test_live_display_shows_the_flow_and_the_log_above_it(clock: list[float]) -> None:
    screen = io.StringIO()
    live = Live(Console(file=screen, force_terminal=True, width=120, color_system=None))
    live.show(snapshot())
    live.emit("warning: decoder[0] died [and] is started again")
    live.show(snapshot(done=999))  # too early to be drawn
    live.close()

    shown = screen.getvalue()
    assert "250 of 1000 rows" in shown
    assert "decoder 99 % →████→ predictor 20 % →····→ writer 0 %" in shown
    assert "bottleneck: decoder" in shown
    assert "warning: decoder[0] died [and] is started again" in shown
    assert "999 of 1000" not in shown


def test_display_fits_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False)

    assert isinstance(open_display(quiet=True), Quiet)
    assert isinstance(open_display(quiet=False), Lines)


def test_videos_end_when_what_is_left_of_them_has_run() -> None:
    board = Board(["worker", "reader", "scout", "decoder", "predictor", "writer"], 1)
    seats = {seat.role: seat for seat in board.workers[0]}
    meter = Meter(board.workers, 10, (0, 0), ["videos", "segments", "pixels", "results"])
    meter.read()
    seats["scout"].add(Counter.ROWS, 4)
    seats["scout"].add(Counter.MILLISECONDS, 400_000)
    seats["writer"].add(Counter.ROWS, 2)
    seats["writer"].add(Counter.ITEMS, 1100)
    seats["writer"].add(Counter.MILLISECONDS, 220_000)

    snapshot = meter.read()

    assert snapshot.footage is not None
    assert snapshot.footage.items == 1100
    assert snapshot.footage.left == pytest.approx(180 + 600)
    assert snapshot.eta_seconds == pytest.approx(780 / snapshot.footage.speed)
    assert describe(snapshot).startswith("2/10 videos (20.0 %), 1100 frames or clips, ")
