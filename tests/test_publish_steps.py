"""Commit, publish and clean-up die before any line: who comes next makes of it what it would be.

Each step in the file system is a line of its own, so that a death before each line of the modules
that take them is one between any two steps. Every line is for `--slow`; otherwise it is every few
lines, the commit's aside.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from forked import die_before_line, fork, wait
from unpublished import FINGERPRINT, N_ROWS, OUTPUTS, Files, Place, make_committed, staged

import evmp
from evmp.grid import Block
from evmp.ledger import Ledger

EVMP = Path(evmp.__file__).parent
MODULES = ("child.py", "ledger.py", "publish.py", "run.py", "supervisor.py")
SOURCES = (*(str(EVMP / name) for name in (*MODULES, "sink", "storage", "target")), shutil.__file__)
PlaceOf = Callable[[object, str], Place]


# --- a job at its end -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=OUTPUTS)
def form(request: pytest.FixtureRequest) -> str:
    form: str = request.param
    return form


@pytest.fixture(scope="module")
def committed(form: str, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Two staging places with every row committed: with the failures, and without."""
    return {it: make_committed(tmp_path_factory.mktemp("ledger"), form, it) for it in (False, True)}


@pytest.fixture
def place_of(form: str, committed: dict[bool, Path], tmp_path: Path) -> PlaceOf:
    """`place_of(3, "fresh")`: the place with this name, not filled."""
    return lambda name, kind: Place(tmp_path / str(name), form, committed[False], kind)


@pytest.fixture
def undisturbed(form: str, committed: dict[bool, Path], tmp_path: Path) -> dict[str, Files]:
    """What stands there, by kind, before and (`whole`, `mended`) after an undisturbed publish."""
    found: dict[str, Files] = {"new": {}}
    old = Place(tmp_path / "old", form, Path())
    old.folder.mkdir()
    old.put_old()
    found["fresh"] = old.result()
    for name, is_mended in (("whole", False), ("mended", True)):
        place = Place(tmp_path / name, form, committed[is_mended]).filled()
        place.publish()()
        found[name] = place.result()
    return {**found, "retry": found["whole"]}


# --- dying ----------------------------------------------------------------------------------------


def deaths(start: Callable[[int], Callable[[], object]], stride: int = 1) -> Iterator[int]:
    """Do some work again and again, in a child that dies `stride` lines later each time.

    Args:
        start: returns what to do, given how many lines of SOURCES it does before it dies.

    Yields: that number, after the death; at last after the work that was done to its end.
    """
    for n_lines in count(0, stride):
        code = wait(fork(partial(do_lines, start(n_lines), n_lines)))
        assert code in (0, -signal.SIGKILL)
        yield n_lines
        if code == 0:
            return


def do_lines(work: Callable[[], object], n_lines: int = 1 << 60) -> None:
    """Do some work, and die after so many lines of it; its children do not."""
    os.register_at_fork(after_in_child=partial(sys.settrace, None))
    die_before_line(iter(range(n_lines)), SOURCES)
    work()


def strides(every: int) -> pytest.MarkDecorator:
    """Run a test with a death at every few lines, and at every single one if --slow."""
    marks = [pytest.mark.slow, pytest.mark.timeout(900)]
    each = pytest.param(1, id="at every line", marks=marks)
    return pytest.mark.parametrize("stride", [pytest.param(every, id="at some lines"), each])


every_kind = pytest.mark.parametrize("kind", ["new", "fresh", "retry"])


# --- commit ---------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "out.evmp")
    ledger.open(FINGERPRINT)
    return ledger


def block_of(n_lines: int) -> Block:
    """The block of the commit that dies after so many lines."""
    return Block(4 * n_lines, 4 * n_lines + 4)


def begin_commit(ledger: Ledger, n_lines: int) -> Callable[[], bool]:
    file = ledger.stage("run", block_of(n_lines).start)
    file.write_bytes(b"rows %d" % n_lines)
    return partial(ledger.commit, file, block_of(n_lines), 0, {})


def test_commit_that_dies_is_done_by_who_takes_over(ledger: Ledger) -> None:
    for n_lines in deaths(partial(begin_commit, ledger)):
        block = block_of(n_lines)
        file = ledger.stage("run", block.start)
        if ledger.stop_of(block.start) is None:
            assert file.read_bytes() == b"rows %d" % n_lines
            assert ledger.commit(file, block, 0, {})
        ledger.sweep()  # as the next run does

        *_, found = commits = ledger.commits()
        assert (found.start, found.stop, len(commits)) == (block.start, block.stop, n_lines + 1)
        assert staged(ledger, found) == b"rows %d" % n_lines
        assert len(list((ledger.root / "data").iterdir())) == len(commits)
        assert list((ledger.root / "tmp").iterdir()) == []
    assert n_lines > 20


def test_commit_that_dies_has_the_block_or_leaves_it_to_another(ledger: Ledger) -> None:
    for n_lines in deaths(partial(begin_commit, ledger)):
        block = block_of(n_lines)
        is_there = ledger.stop_of(block.start) is not None
        other = ledger.stage("other", block.start)
        other.write_bytes(b"another's")

        assert ledger.commit(other, block, 0, {}) != is_there

        found = ledger.commits()[-1]
        expected = b"rows %d" % n_lines if is_there else b"another's"
        assert staged(ledger, found) == expected
    assert n_lines > 20


# --- publish --------------------------------------------------------------------------------------


@strides(23)
@every_kind
def test_publish_that_dies_is_done_again(
    place_of: PlaceOf, undisturbed: dict[str, Files], kind: str, stride: int
) -> None:
    old, new = undisturbed[kind], undisturbed["mended" if kind == "retry" else "whole"]
    for n_lines in deaths(lambda n: place_of(n, kind).filled().publish(), stride):
        place = place_of(n_lines, kind)
        place.check_visible(old, new)

        place.go_on()

        record = place.check(new)
        assert {name: record[name] for name in place.record} == place.record
    assert n_lines > 100


@strides(131)
@every_kind
def test_job_that_dies_at_its_end_is_brought_there(
    place_of: PlaceOf, undisturbed: dict[str, Files], kind: str, stride: int
) -> None:
    old, new = undisturbed[kind], undisturbed["mended" if kind == "retry" else "whole"]
    for n_lines in deaths(lambda n: place_of(n, kind).filled().run(), stride):
        place = place_of(n_lines, kind)
        place.check_visible(old, new)

        assert wait(fork(partial(do_lines, place.run()))) == 0

        record = place.check(new)
        assert (record["rows"], record["failed"]) == (N_ROWS, place.record["failed"])
    assert n_lines > 100


@strides(17)
def test_start_over_that_dies_keeps_the_result_and_can_be_done_again(
    place_of: PlaceOf, undisturbed: dict[str, Files], stride: int
) -> None:
    def begin(n_lines: int) -> Callable[[], object]:
        place = place_of(n_lines, "new").filled()
        place.put_old()
        return place.target.start_over

    for n_lines in deaths(begin, stride):
        place = place_of(n_lines, "new")
        assert place.result() == undisturbed["fresh"]

        place.target.start_over()
        place.commit_all()
        place.go_on()

        place.check(undisturbed["whole"])
    assert n_lines > 10
