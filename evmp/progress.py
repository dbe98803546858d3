"""How far the job is, on the terminal: a live display there, one plain line now and then elsewhere.

Numbers come from the board and the ledger alone; nothing here slows a stage down. The bottleneck is
the stage whose processes are busy for the largest part of the time: the others wait for it.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from evmp.logs import say
from evmp.metrics import Counter, Reading, Seat, State

if TYPE_CHECKING:
    from rich.console import Console, Group

STAGES: Final = ("reader", "scout", "decoder", "process", "predictor", "writer")
QUEUES: Final = ("payloads", "pixels", "results")
LINE_SECONDS: Final = 5.0
FRAME_SECONDS: Final = 0.25
WINDOW_SECONDS: Final = 10.0  # over which the rate is taken
BUSY_ENOUGH: Final = 0.7  # a stage below this is nobody's bottleneck


@dataclass(frozen=True, slots=True)
class Footage:
    """How far the videos are.

    Attributes:
        items: frames or clips that are done, in this run.
        rate: of them per second.
        left: seconds of video to come; those that nobody has looked at count as long as others.
        speed: seconds of video per second.
    """

    items: int
    rate: float
    left: float
    speed: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The job at one moment.

    Attributes:
        done, total, failed: rows, those of earlier runs included.
        rate: rows per second over the last seconds; 0 until rows come.
        fill: share of each queue that is full, 0 to 1, over all workers.
        busy: share of the time that the processes of each stage worked, 0 to 1.
        restarts: processes that were started again.
        state: what the job does when no rows come.
        footage: how far a job over videos is within them; None for any other.
    """

    done: int
    total: int
    failed: int
    rate: float
    fill: dict[str, float]
    busy: dict[str, float]
    restarts: int
    state: str = ""
    footage: Footage | None = None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last row, or None."""
        if self.footage:
            return self.footage.left / self.footage.speed if self.footage.speed > 0 else None
        return (self.total - self.done) / self.rate if self.rate > 0 else None

    @property
    def bottleneck(self) -> str:
        """The stage that the others wait for; empty where none is clearly it."""
        stage = max(self.busy, key=self.busy.__getitem__, default="")
        return stage if stage and self.busy[stage] >= BUSY_ENOUGH else ""


class Meter:
    """Makes snapshots out of the board.

    Args:
        workers: the seats of each worker.
        total: rows of the input.
        elsewhere: rows done, and failed, that belong to none of these workers.
        queues: names of a worker's rings, in the order of the flow.
    """

    def __init__(
        self,
        workers: Sequence[Sequence[Seat]],
        total: int,
        elsewhere: tuple[int, int],
        queues: Sequence[str] = QUEUES,
    ) -> None:
        roles = {seat.role for seats in workers for seat in seats}
        self._stages: list[str] = [stage for stage in STAGES if stage in roles]
        self._queues = queues
        self.workers, self._total, self._elsewhere = workers, total, elsewhere
        self._base = [(0, 0)] * len(workers)
        self._has_videos = "scout" in roles
        self._history: deque[tuple[float, int, dict[str, tuple[float, float]]]] = deque()
        self._footage: deque[tuple[float, int, float]] = deque()

    def rebase(self, worker: int, done: int, failed: int) -> None:
        """Count a worker's rows on from what its shard has committed, before it starts."""
        self._base[worker] = (done, failed)
        counters = self.workers[worker][-1].counters
        counters[Counter.ROWS] = counters[Counter.FAILED] = counters[Counter.BLOCK] = 0
        for seat in self.workers[worker]:
            if seat.role in ("scout", "writer"):
                seat.counters[Counter.MILLISECONDS] = seat.counters[Counter.ITEMS] = 0
            if seat.role == "scout":
                seat.counters[Counter.ROWS] = 0

    def rows(self) -> tuple[int, int]:
        """Return how many rows are done, and how many of them failed."""
        done, failed = self._elsewhere
        for (base_done, base_failed), seats in zip(self._base, self.workers, strict=True):
            done += base_done + seats[-1].counters[Counter.ROWS]
            failed += base_failed + seats[-1].counters[Counter.FAILED]
        return done, failed

    def read(self) -> Snapshot:
        """Return the job as it stands now."""
        done, failed = self.rows()
        times = {stage: self._times(stage) for stage in self._stages}
        now = time.monotonic()
        self._history.append((now, done, times))
        while now - self._history[0][0] > WINDOW_SECONDS and len(self._history) > 2:
            self._history.popleft()
        then, done_then, times_then = self._history[0]
        return Snapshot(
            done=done,
            total=self._total,
            failed=failed,
            rate=max(0, done - done_then) / (now - then) if now > then else 0.0,
            fill=self._fill(),
            busy={s: _share(times[s], times_then[s]) for s in self._stages},
            restarts=sum(reading.restarts for reading in self.readings()),
            state=self._state(),
            footage=self._read_footage(done) if self._has_videos else None,
        )

    def _read_footage(self, done: int) -> Footage:
        """Return how far the videos are."""
        items = self._sum("writer", Counter.ITEMS)
        gone = self._sum("writer", Counter.MILLISECONDS) / 1000
        seen = self._sum("scout", Counter.MILLISECONDS) / 1000
        n_seen = self._sum("scout", Counter.ROWS)
        now = time.monotonic()
        self._footage.append((now, items, gone))
        while now - self._footage[0][0] > WINDOW_SECONDS and len(self._footage) > 2:
            self._footage.popleft()
        then, items_then, gone_then = self._footage[0]
        n_done = sum(seats[-1].counters[Counter.ROWS] for seats in self.workers)
        n_unseen = max(0, self._total - (done - n_done) - n_seen)
        left = max(0.0, seen - gone) + n_unseen * seen / max(1, n_seen)
        span = now - then or 1.0
        rate, speed = (items - items_then) / span, (gone - gone_then) / span
        return Footage(items, max(0.0, rate), left, max(0.0, speed))

    def _sum(self, role: str, counter: Counter) -> int:
        seats = (seat for seats in self.workers for seat in seats if seat.role == role)
        return sum(seat.counters[counter] for seat in seats)

    def _state(self) -> str:
        before = (State.EMPTY, State.STARTING)
        starting = [r.state in before for r in self.readings() if r.role == "predictor"]
        return "starting: loading the model" if starting and all(starting) else ""

    def readings(self) -> list[Reading]:
        """Return the counters of every seat."""
        return [seat.read() for seats in self.workers for seat in seats]

    def _times(self, stage: str) -> tuple[float, float]:
        of_stage = [reading for reading in self.readings() if reading.role == stage]
        busy = sum(r.busy for r in of_stage)
        return busy, busy + sum(r.wait_in + r.wait_out for r in of_stage)

    def _fill(self) -> dict[str, float]:
        own = [seats[0].counters for seats in self.workers]
        return {
            queue: sum(c[Counter.FILL + i] for c in own) / max(1, len(own)) / 1000
            for i, queue in enumerate(self._queues)
        }


def _share(now: tuple[float, float], then: tuple[float, float]) -> float:
    busy, whole = now[0] - then[0], now[1] - then[1]
    return busy / whole if whole > 0 else 0.0


class Display(Protocol):
    """Where progress and log lines go."""

    def emit(self, line: str) -> None:
        """Print a line of the log."""

    def note(self, line: str) -> None:
        """Print a line that only says how the job is getting on."""

    def show(self, snapshot: Snapshot) -> None:
        """Show the job as it stands; called a few times a second."""

    def close(self) -> None:
        """End the display; its last state stays."""


class Quiet:
    """The log only."""

    def emit(self, line: str) -> None:
        """Print the line."""
        say(line)

    def note(self, line: str) -> None:
        """Print nothing."""

    def show(self, snapshot: Snapshot) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing is open."""


class Lines:
    """One plain line every few seconds, for logs of batch systems."""

    def __init__(self) -> None:
        self._next = time.monotonic() + LINE_SECONDS / 2

    def emit(self, line: str) -> None:
        """Print the line."""
        say(line)

    note = emit

    def show(self, snapshot: Snapshot) -> None:
        """Print a line when it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_SECONDS
            self.emit(describe(snapshot))

    def close(self) -> None:
        """Nothing is open."""


class Live:
    """A display that is redrawn in place, with log lines above it. Starts no thread."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live as RichLive

        self._console = console
        self._live = RichLive(console=console, auto_refresh=False)
        self._live.start()
        self._next = 0.0

    def emit(self, line: str) -> None:
        """Print the line above the display."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    note = emit

    def show(self, snapshot: Snapshot) -> None:
        """Redraw, at most a few times a second."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + FRAME_SECONDS
            self._live.update(_panel(snapshot), refresh=True)

    def close(self) -> None:
        """Leave the last picture standing."""
        self._live.stop()


def open_display(*, quiet: bool) -> Display:
    """Return the display that fits where stderr goes."""
    if quiet:
        return Quiet()
    if not sys.stderr.isatty():
        return Lines()
    from rich.console import Console

    return Live(Console(stderr=True))


def describe(snapshot: Snapshot) -> str:
    """Return a snapshot as one line."""
    percent, footage = 100 * snapshot.done / max(1, snapshot.total), snapshot.footage
    parts = [
        f"{snapshot.done}/{snapshot.total} {_noun(snapshot)} ({percent:.1f} %)",
        f"{footage.items} frames or clips" if footage else "",
        _rate(snapshot),
        f"ETA {clock(snapshot.eta_seconds)}",
        f"{snapshot.failed} failed",
        "queues " + " ".join(f"{name} {100 * fill:.0f} %" for name, fill in snapshot.fill.items()),
    ]
    if snapshot.restarts:
        parts.append(f"{snapshot.restarts} restarts")
    parts.append(snapshot.state or f"bottleneck: {snapshot.bottleneck or 'none'}")
    return ", ".join(filter(None, parts))


def _noun(snapshot: Snapshot) -> str:
    return "videos" if snapshot.footage else "rows"


def _rate(snapshot: Snapshot) -> str:
    footage = snapshot.footage
    if footage is None:
        return f"{snapshot.rate:.1f} rows/s"
    return f"{footage.rate:.1f}/s, {footage.speed:.1f} x as fast as they run"


def _panel(snapshot: Snapshot) -> Group:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2))
    head.add_row(
        ProgressBar(total=max(1, snapshot.total), completed=snapshot.done, width=40),
        f"{snapshot.done} of {snapshot.total} {_noun(snapshot)}",
        _rate(snapshot),
        f"ETA {clock(snapshot.eta_seconds)}",
        Text(f"{snapshot.failed} failed", style="red" if snapshot.failed else "dim"),
    )
    flow = Table.grid(padding=(0, 1), pad_edge=False)
    cells: list[Text] = []
    fills = list(snapshot.fill.values())
    behind = {"reader": fills[:1], "decoder": fills[1:2], "process": fills[2:-1]}
    if snapshot.footage:
        behind.update(scout=fills[1:2], decoder=fills[2:3], process=fills[3:-1])
    behind["predictor"] = fills[-1:]
    for stage, busy in snapshot.busy.items():
        style = "bold yellow" if stage == snapshot.bottleneck else ""
        cells.append(Text(f"{stage} {100 * busy:.0f} %", style=style))
        cells += [Text(f"→{_bar(fill)}→", style="dim") for fill in behind.get(stage, ())]
    flow.add_row(*cells)
    slow = f"bottleneck: {snapshot.bottleneck}" if snapshot.bottleneck else "no bottleneck yet"
    return Group(head, flow, Text(snapshot.state or slow, style="dim"))


def _bar(fill: float, width: int = 4) -> str:
    full = round(max(0.0, min(1.0, fill)) * width)
    return "█" * full + "·" * (width - full)


def clock(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
