"""Every row comes out once, bit by bit, whoever is killed, wherever it is; see `fuzzing`.

The long form is `make soak`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import pytest
from fuzzing import mutants
from fuzzing.run import ROOT, Server
from fuzzing.scenario import Scenario, Verdict
from fuzzing.world import World

from evmp.ring import MAX_ATTEMPTS

Fuzz = Callable[[Scenario], Verdict]

# How many deaths each must see, together 600, and how. What a run sees depends on the machine, so
# it is repeated with other seeds until it has seen enough.
SCENARIOS = {
    "by signals": (120, Scenario(n_rows=4000, kill_seconds=0.004, max_kills=200)),
    "by signals to the worker, too": (
        35,
        Scenario(n_rows=2000, kill_seconds=0.008, max_kills=60, worker_share=0.05),
    ),
    "between steps of the ring": (90, Scenario(n_rows=800, steps=120)),
    "between lines": (130, Scenario(n_rows=1000, lines=1500)),
    "by all, and by stops of the job": (
        70,
        Scenario(n_rows=600, lines=5000, steps=500, kill_seconds=0.01, max_kills=40, stop_rows=150),
    ),
    "at every 40th line of the reader": (20, Scenario(400, sweep="reader", stride=40)),
    "at every 40th line of the decoder": (30, Scenario(800, sweep="decoder", stride=40)),
    "at every 40th line of the zygote": (40, Scenario(800, sweep="zygote", stride=40)),
    "at every 40th line of the predictor": (25, Scenario(800, sweep="predictor", stride=40)),
    "by signals, with samples": (
        60,
        Scenario(n_rows=2500, kill_seconds=0.004, max_kills=100, is_custom=True),
    ),
    "between steps and lines, with samples": (
        90,
        Scenario(n_rows=800, lines=2500, steps=200, is_custom=True),
    ),
    "at every 40th line of the process": (
        30,
        Scenario(800, sweep="process", stride=40, is_custom=True),
    ),
    "at every 40th line of the writer": (40, Scenario(800, sweep="writer", stride=40)),
}
BROKEN = Scenario(n_rows=2000, lines=3000, steps=300, patience_seconds=2.0)
SEEDS = range(1, 9)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def run(server: Server, tmp_path: Path) -> Fuzz:
    """`run(scenario)`: its verdict."""
    return lambda scenario: server.fuzz(scenario, Path(mkdtemp(dir=tmp_path)) / "out.evmp")


@pytest.mark.parametrize(("n_deaths", "scenario"), SCENARIOS.values(), ids=SCENARIOS)
def test_rows_come_out_once_when_killed(run: Fuzz, n_deaths: int, scenario: Scenario) -> None:
    deaths = 0
    for seed in SEEDS:
        verdict = run(replace(scenario, seed=seed))

        assert verdict.is_clean, verdict
        assert verdict.rows == scenario.n_rows
        assert verdict.given_up == {}
        deaths += verdict.deaths.total()
        if deaths >= n_deaths:
            return
    pytest.fail(f"{deaths} deaths in {len(SEEDS)} runs are no fuzz: {verdict}")


@pytest.mark.slow
@pytest.mark.parametrize("role", ["reader", "decoder", "process", "zygote", "predictor", "writer"])
def test_rows_come_out_once_when_a_role_dies_at_every_line(run: Fuzz, role: str) -> None:
    verdict = run(Scenario(n_rows=1500, sweep=role, is_custom=role == "process"))

    assert verdict.is_clean, verdict
    assert verdict.given_up == {}
    assert verdict.deaths[role] > 300, verdict


@pytest.mark.parametrize("name", mutants.PYTHON)
def test_fuzz_sees_that(run: Fuzz, name: str) -> None:
    scenario = replace(BROKEN, patches=mutants.PYTHON[name], **mutants.HINTS.get(name, {}))

    assert any(not run(replace(scenario, seed=seed)).is_clean for seed in SEEDS)


@pytest.mark.parametrize("name", mutants.C)
def test_fuzz_sees_that_in_c(run: Fuzz, tmp_path: Path, name: str) -> None:
    scenario = replace(BROKEN, native=mutants.build(name, tmp_path))

    assert any(not run(replace(scenario, seed=seed)).is_clean for seed in SEEDS)


def test_row_that_kills_becomes_one_error_row(run: Fuzz) -> None:
    world = World(segfaults=frozenset([57]), aborts=frozenset([120]))

    # The first row of its batch: rows in front of it would let it kill once more.
    steady = {"evmp.reader.FLUSH_NS": 1 << 62}
    scenario = Scenario(n_rows=200, max_attempts=MAX_ATTEMPTS, world=world, patches=steady)

    verdict = run(scenario)

    assert verdict.is_clean, verdict
    assert verdict.given_up == {
        57: "the decoder died of this row: SIGSEGV",
        120: "the predictor died of this row: SIGSEGV",
    }
    assert +verdict.deaths == {"decoder": MAX_ATTEMPTS, "predictor": MAX_ATTEMPTS}


def test_row_that_never_ends_becomes_one_error_row(run: Fuzz) -> None:
    world = World(hangs=frozenset([33]))

    verdict = run(Scenario(n_rows=200, max_attempts=2, stall_seconds=1.0, world=world))

    assert verdict.is_clean, verdict
    assert verdict.given_up == {33: "the decoder died of this row: hung"}


def test_paused_processes_are_found_killed_and_replaced(run: Fuzz) -> None:
    pauses = Scenario(n_rows=6000, kill_seconds=0.05, max_kills=6, signal=signal.SIGSTOP)

    verdict = run(replace(pauses, stall_seconds=1.0))

    assert verdict.is_clean, verdict
    assert verdict.deaths.total() >= 1, verdict


def test_paused_worker_is_found_killed_and_replaced(run: Fuzz) -> None:
    pause = Scenario(n_rows=6000, kill_seconds=0.2, max_kills=1, signal=signal.SIGSTOP)

    verdict = run(replace(pause, worker_share=1.0, stall_seconds=1.0))

    assert verdict.is_clean, verdict
    assert verdict.deaths["worker"] == 1


def test_tiny_dev_shm_is_no_problem(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from evmp.ring import Ring\n"
        "from fuzzing.run import fuzz; from fuzzing.scenario import Scenario\n"
        "s = os.statvfs('/dev/shm'); assert s.f_blocks * s.f_frsize == 1 << 20\n"
        "ring = Ring('large', 64, 1, 1 << 20); ring.populate(1 << 20)\n"
        "ring.batch(0)[:] = bytes(1 << 20)\n"
        f"verdict = fuzz(Scenario(200), Path({str(tmp_path / 'out.evmp')!r}))\n"
        "assert verdict.is_clean, verdict; print(verdict.rows)"
    )
    shell = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespace")

    done = subprocess.run(
        [*command, sys.executable, "-c", code],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )

    assert done.stdout == "200\n", done.stderr
