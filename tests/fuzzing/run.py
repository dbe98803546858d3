"""One scenario in a process of its own: a worker under its supervisor, and who kills.

A fork takes the longer the more its process has loaded, so tests ask a process that has loaded only
this (`Server`).
"""

from __future__ import annotations

import mmap
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import IntEnum
from functools import partial
from importlib import import_module, util
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any, Final

from evmp import _native
from evmp.child import call_in_child
from evmp.errors import EvmpError, WorkerDied
from evmp.grid import Block, Grid
from evmp.job import Job
from evmp.layout import plan_layout
from evmp.ledger import Ledger
from evmp.metrics import Board, Counter, Leave
from evmp.pipeline import Worker
from evmp.source import SourceInfo
from evmp.stage import Stage
from evmp.supervisor import Post, Supervisor
from fuzzing import custom, world
from fuzzing.armed import Armed
from fuzzing.judge import judge
from fuzzing.killer import Killer
from fuzzing.scenario import Scenario, Verdict
from fuzzing.world import KEYS, SIDE, loaded

# The stages import these when they open; here once, before any fork.
for _module in ("evmp.head", "evmp.model", "evmp.sink.lines"):
    import_module(_module)

ROOT: Final = Path(__file__).resolve().parents[2]
QUIET_SECONDS: Final = 1.0  # without a row, then the killing stops


def fuzz(scenario: Scenario, folder: Path) -> Verdict:
    """Run a scenario with its ledger in `folder`, which must be empty."""
    return call_in_child(lambda: _run(scenario, folder))


class Server:
    """A small process that runs scenarios, one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzzing.run"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process as process:
            process.kill()

    def fuzz(self, scenario: Scenario, folder: Path) -> Verdict:
        """Run a scenario there; see `fuzz`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump((scenario, folder), self._process.stdin)
        self._process.stdin.flush()
        verdict: Verdict = pickle.load(self._process.stdout)
        return verdict


def _serve() -> None:
    _native.die_with_parent()
    while True:
        scenario, folder = pickle.load(sys.stdin.buffer)
        pickle.dump(fuzz(scenario, folder), sys.stdout.buffer)
        sys.stdout.flush()


def _run(scenario: Scenario, folder: Path) -> Verdict:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _native.adopt_orphans()
    _patch({"evmp.supervisor.MAX_DEATHS": 1000, "evmp.ring.MAX_ATTEMPTS": scenario.max_attempts})
    _patch(loaded(scenario.world))
    _patch(scenario.patches)
    if scenario.native:
        _patch({"evmp.ring._native": _load(scenario.native)})
    run = _Run(scenario, Ledger(folder))
    verdict = Verdict()
    started = time.monotonic()
    try:
        run.work()
    except EvmpError as error:
        verdict.error = f"{type(error).__name__}: {error}"
    verdict.seconds = time.monotonic() - started
    run.count(verdict)
    try:
        result = custom.result if scenario.is_custom else world.result
        judge(Ledger(folder), scenario.n_rows, verdict, result)
    except EvmpError as error:  # the ledger contradicts itself
        verdict.error = f"{type(error).__name__}: {error}"
    return verdict


def _patch(patches: Mapping[str, Any]) -> None:
    for name, value in patches.items():
        owner, _, attribute = name.rpartition(".")
        setattr(resolve_name(owner), attribute, value)


def _load(path: Path) -> Any:
    spec = util.spec_from_file_location("evmp._native", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _job(scenario: Scenario) -> Job:
    own: dict[str, Any] = {"model_type": "classifier"}
    if scenario.is_custom:
        own = {"model_type": "self_define", "user_predictor_cls": custom.PREDICTOR}
        own["user_process_config"] = custom.LINKS
    return Job(
        **own,
        model_path="none",
        input_oss_file="rows.txt",
        output_oss_file="result.jsonl",
        num_worker=1,
        batch_size=scenario.batch_rows,
        stall_timeout_seconds=scenario.stall_seconds,
    )


class Shared(IntEnum):
    """Index of a number that all processes of a run share."""

    CEASEFIRE = 0
    REQUEUED = 1
    CRASHES = 2
    PROCESSES = 3  # of the swept role


class _Run:
    """One worker under its supervisor, and the killer."""

    def __init__(self, scenario: Scenario, ledger: Ledger) -> None:
        self._scenario, self._ledger = scenario, ledger
        package: Any = SimpleNamespace(
            input=SimpleNamespace(height=SIDE, width=SIDE, size="fixed"), files=(Path(os.devnull),)
        )
        package = None if scenario.is_custom else package
        job = _job(scenario)
        layout = plan_layout(job, package)
        payloads, *between, results = layout.hops
        layout = replace(
            layout,
            n_decoders=scenario.n_decoders,
            n_predictors=scenario.n_predictors,
            hops=(
                replace(payloads, n_batches=scenario.n_payloads, row_bytes=32 << 10),
                *(
                    replace(it, n_batches=scenario.n_batches, row_bytes=min(it.row_bytes, 64 << 10))
                    for it in between
                ),
                replace(results, n_batches=scenario.n_batches + 2, row_bytes=64 << 10),
            ),
        )
        (self._seats,) = Board(layout.roles, 1).workers
        self._own = self._seats[0].counters
        self._shared = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._log: list[str] = []
        self._progress = (-1, time.monotonic())
        self._stops, self._rows_at_stop = 0, 0
        self._worker = _Worker(
            index=0,
            job=job,
            package=package,
            layout=layout,
            ledger=ledger,
            source=SourceInfo(scenario.n_rows, {}, KEYS),
            seats=self._seats,
            todo=self._todo,
        ).disturbed(scenario, self._shared)

    def work(self) -> None:
        """Work until every row is done.

        Raises:
            EvmpError: as the supervisor does, and when no row comes any more.
        """
        self._ledger.open({})
        killer = Killer(self._scenario, lambda: bool(self._shared[Shared.CEASEFIRE]))
        with killer.at_work():
            while self._todo():
                self._own[Counter.LEAVE] = Leave.NOT
                self._rows_at_stop, self._progress = self._rows(), (-1, time.monotonic())
                self._ledger.sweep()
                try:
                    self._supervise()
                except _Stopped:
                    self._stops += 1

    def count(self, verdict: Verdict) -> None:
        """Say what has happened on the way."""
        for seat in self._seats:
            verdict.deaths[seat.role] += seat.counters[Counter.RESTARTS]
        verdict.requeued = self._shared[Shared.REQUEUED]
        verdict.crashes = self._shared[Shared.CRASHES]
        verdict.stops = self._stops
        verdict.log = self._log[-40:]

    def _supervise(self) -> None:
        Supervisor(
            [Post(self._seats[0], self._worker.run, self._settle, is_group=True)],
            stall_seconds=self._scenario.stall_seconds,
            progress=self._rows,
            drain=lambda: None,
            stop=lambda: None,
            tick=self._tick,
            grace_seconds=0.0,
            emit=self._log.append,
        ).run()

    def _todo(self) -> list[Block]:
        n_rows, commits = self._scenario.n_rows, self._ledger.commits()
        return Grid(n_rows, 1, self._scenario.block_rows).cut(commits, Block(0, n_rows))

    def _rows(self) -> int:
        return self._seats[-1].counters[Counter.ROWS]

    def _settle(self, cause: str) -> None:
        self._shared[Shared.CRASHES] += cause.startswith("exit")

    def _tick(self) -> None:
        rows, now = self._rows() + self._shared[Shared.PROCESSES], time.monotonic()
        if rows != self._progress[0]:
            self._progress = (rows, now)
        quiet = now - self._progress[1]
        self._shared[Shared.CEASEFIRE] = quiet > QUIET_SECONDS
        if self._shared[Shared.CRASHES]:
            raise WorkerDied("a stage has failed by itself")
        if self._rows() > 2 * self._scenario.n_rows:  # written again and again
            raise WorkerDied(f"{self._rows()} rows of {self._scenario.n_rows} were written")
        if quiet > self._scenario.patience_seconds:
            raise WorkerDied(f"no row for {quiet:.1f} s, {self._rows()} rows were written")
        if self._scenario.stop_rows and not self._own[Counter.LEAVE]:
            self._maybe_stop()

    def _maybe_stop(self) -> None:
        if self._rows() - self._rows_at_stop >= self._scenario.stop_rows:
            if self._stops % 2:
                raise _Stopped
            self._own[Counter.LEAVE] = Leave.DRAINED
            self._stops += 1


class _Stopped(Exception):
    """The job process has gone, at once."""


class _Worker(Worker):
    """A worker whose stages are armed against themselves."""

    def disturbed(self, scenario: Scenario, shared: memoryview) -> _Worker:
        """Say how, before it runs."""
        self._scenario, self._shared = scenario, shared
        return self

    def _make_rings(self) -> None:
        super()._make_rings()
        for ring in self._rings:
            ring.reopen = partial(self._reopen, ring.reopen)

    def _reopen(self, reopen: Callable[..., None], *arguments: int) -> None:
        self._shared[Shared.REQUEUED] += 1
        reopen(*arguments)

    def _post(self, number: int, make: Callable[[int], Stage]) -> Post:
        role = self._seats[number].role
        return super()._post(number, lambda number: self._arm(make(number), role))

    def _arm(self, stage: Stage, role: str) -> Stage:
        """Arm a stage, in its own process."""
        scenario, n_lines = self._scenario, None
        if self._shared[Shared.CEASEFIRE]:
            return stage
        if scenario.sweep == role:
            self._shared[Shared.PROCESSES] += 1
            n_lines = scenario.first_line + self._shared[Shared.PROCESSES] * scenario.stride
        return Armed(stage, scenario, n_lines)

    def _settle(self, number: int, cause: str) -> None:
        self._shared[Shared.CRASHES] += cause.startswith("exit")
        super()._settle(number, cause)


if __name__ == "__main__":
    # Under its own name, so that what is pickled here can be read there.
    import_module("fuzzing.run")._serve()
