"""The ring: rows in, rows out, in their places, whoever dies in between."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from forked import fork, wait

from evmp import _native
from evmp.ring import MAX_ATTEMPTS, Header, Mark, Ring, RingDrained, RingStopped

PRODUCER, CONSUMER, OTHER = 1, 2, 3


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def put(ring: Ring, n: int) -> None:
    ring.put(n, Header(row=n), b"row %d" % n)


def test_row_comes_out_as_it_went_in() -> None:
    ring = Ring("test", 2, 1, 100)
    ring.put(0, Header(row=7, next=8, mark=Mark.DATA, kind=2, height=3, width=4), b"payload")

    seq = ring.claim(CONSUMER, 0.0)

    assert seq == 0
    assert ring.header(0) == Header(7, 8, 7, Mark.DATA, 2, 3, 4)
    assert bytes(ring.data(0)) == b"payload"


def test_batch_is_claimed_when_its_last_row_is_committed() -> None:
    ring = Ring("test", 2, 3, 100)
    put(ring, 2)
    put(ring, 0)
    assert ring.claim(CONSUMER, 0.0) is None

    put(ring, 1)

    assert ring.claim(CONSUMER, 0.0) == 0
    assert ring.claim(OTHER, 0.0) is None


@pytest.mark.parametrize("n_rows", [1, 63, 64, 65, 200])
def test_laps_reuse_slots_without_clearing(n_rows: int) -> None:
    ring = Ring("test", 2, n_rows, 16)
    for seq in range(7):
        for n in ring.rows(seq):
            assert ring.is_open(n)
            assert not ring.is_done(n)
            put(ring, n)
        assert ring.claim(CONSUMER, 0.0) == seq
        assert [bytes(ring.data(n)) for n in ring.rows(seq)] == [
            b"row %d" % n for n in ring.rows(seq)
        ]
        ring.release(seq, CONSUMER)
        assert all(ring.is_done(n) for n in ring.rows(seq))


def test_full_ring_is_not_open_until_release() -> None:
    ring = Ring("test", 2, 1, 16)
    put(ring, 0)
    put(ring, 1)
    assert not ring.is_open(2)
    assert not ring.wait_open(2, 0.01)

    ring.claim(CONSUMER, 0.0)
    ring.release(0, CONSUMER)

    assert ring.is_open(2)


def test_commit_twice_is_commit_once() -> None:
    ring = Ring("test", 2, 2, 16)
    put(ring, 0)
    put(ring, 0)
    assert ring.claim(CONSUMER, 0.0) is None


def test_commit_without_a_place_is_refused() -> None:
    ring = Ring("test", 2, 1, 16)
    with pytest.raises(RuntimeError, match="no place"):
        ring.commit(2)


def test_release_by_another_seat_is_refused() -> None:
    ring = Ring("test", 2, 1, 16)
    put(ring, 0)
    ring.claim(CONSUMER, 0.0)
    with pytest.raises(RuntimeError, match="does not hold"):
        ring.release(0, OTHER)


def test_ordered_consumer_waits_for_the_oldest_batch() -> None:
    ring = Ring("test", 4, 1, 16)
    put(ring, 1)
    assert ring.claim(CONSUMER, 0.0, ordered=True) is None
    assert ring.claim(OTHER, 0.0) == 1

    put(ring, 0)

    assert ring.claim(CONSUMER, 0.0, ordered=True) == 0


def test_closed_ring_is_drained_when_all_is_released() -> None:
    ring = Ring("test", 2, 1, 16)
    put(ring, 0)
    ring.close(1)
    ring.claim(CONSUMER, 0.0)
    assert ring.claim(OTHER, 0.0) is None

    ring.release(0, CONSUMER)

    with pytest.raises(RingDrained):
        ring.claim(OTHER, 0.0)


def test_stopped_ring_lets_nobody_wait() -> None:
    ring = Ring("test", 2, 1, 16)
    ring.stop()
    with pytest.raises(RingStopped):
        ring.claim(CONSUMER, 60.0)
    with pytest.raises(RingStopped):
        ring.wait_open(5, 60.0)


def test_note_and_data_share_the_payload() -> None:
    ring = Ring("test", 2, 1, 16)
    ring.set_note(0, b"key")
    ring.put(0, Header(row=0), b"value")

    assert bytes(ring.note(0)) == b"key"
    assert bytes(ring.data(0)) == b"value"
    assert ring.room(0) == 13


def test_data_that_do_not_fit_are_refused() -> None:
    ring = Ring("test", 2, 1, 16)
    ring.set_note(0, b"key")
    ring.put(0, Header(row=0), bytes(13))
    ring.set_note(1, b"key")

    with pytest.raises(ValueError, match="data of 14 bytes do not fit the 13 behind the note"):
        ring.put(1, Header(row=1), bytes(14))
    with pytest.raises(ValueError, match="note of 17 bytes does not fit the 16 of a row"):
        ring.set_note(1, bytes(17))

    assert not ring.is_done(1)


def test_row_without_a_place_is_not_written() -> None:
    ring = Ring("test", 2, 1, 16)
    put(ring, 0)

    with pytest.raises(RuntimeError, match="row 2 has no place"):
        put(ring, 2)

    assert bytes(ring.data(0)) == b"row 0"


def test_views_are_of_the_rings_own_memory() -> None:
    ring = Ring("test", 2, 2, 16)
    ring.payload(3)[:] = b"0123456789abcdef"

    assert bytes(ring.batch(1)) == bytes(16) + b"0123456789abcdef"
    assert ring.payload(7).obj is ring.payload(3).obj


@pytest.mark.parametrize("header", [(1, 2, 3), [0] * 7, (0, 0, 0, 1 << 32, 0, 0, 0), (-1,) * 7])
def test_what_is_no_header_is_refused(header: Any) -> None:
    ring = Ring("test", 2, 1, 16)
    with pytest.raises((TypeError, ValueError, OverflowError)):
        ring.set_header(0, header)


def test_memory_of_a_large_row_goes_back() -> None:
    ring = Ring("test", 2, 1, 64 << 20)
    ring.put(0, Header(row=0), bytes(range(256)) * (128 << 10))
    ring.claim(CONSUMER, 0.0)

    ring.release(0, CONSUMER, keep_bytes=4096)

    assert bytes(ring.payload(0)[: 1 << 20]).count(0) > (1 << 20) - 3 * 4096


def test_row_whose_memory_went_back_before_a_death_is_empty() -> None:
    ring = Ring("test", 2, 1, 64 << 10)
    ring.put(0, Header(row=0), bytes(64 << 10))
    pid = os.fork()
    if pid == 0:
        seq = ring.claim(CONSUMER, 0.0)
        native: Any = SimpleNamespace(used=ring._ring.used, release=die)
        ring._ring = native
        ring.release(seq or 0, CONSUMER, keep_bytes=4096)
    os.waitpid(pid, 0)

    ring.recover(CONSUMER, is_done=lambda n: False, fail=None)

    assert ring.claim(OTHER, 0.0) == 0
    assert ring.header(0).mark == Mark.EMPTY


def test_batch_of_the_dead_goes_to_the_next() -> None:
    ring = Ring("test", 2, 1, 16)
    put(ring, 0)
    ring.claim(CONSUMER, 0.0)

    ring.recover(CONSUMER, is_done=lambda n: False, fail=pytest.fail)

    assert ring.claim(OTHER, 0.0) == 0
    assert ring.peek(0)[2] == 1


def test_death_that_no_row_is_to_blame_for_does_not_count() -> None:
    ring = Ring("test", 2, 1, 16)
    put(ring, 0)
    for _ in range(MAX_ATTEMPTS):
        assert ring.claim(CONSUMER, 0.0) == 0
        ring.recover(CONSUMER, is_done=lambda n: False, fail=None)
    for _ in range(MAX_ATTEMPTS - 1):
        assert ring.claim(CONSUMER, 0.0) == 0
        assert ring.recover(CONSUMER, lambda n: False, pytest.fail) == 0

    assert ring.claim(CONSUMER, 0.0) == 0
    assert ring.peek(0)[2] == MAX_ATTEMPTS - 1


def test_row_that_the_dead_was_at_is_to_blame() -> None:
    ring = Ring("test", 4, 1, 16)
    for n in range(3):
        put(ring, n)
    failed: list[int] = []

    for _ in range(MAX_ATTEMPTS):
        for n in range(3):
            assert ring.claim(CONSUMER, 0.0) == n
        ring.recover(CONSUMER, lambda n: n in failed, failed.append, at=1)

    assert failed == [1]
    assert [ring.claim(OTHER, 0.0) for _ in range(3)] == [0, 2, None]


def test_batch_that_was_done_before_the_death_is_released() -> None:
    ring = Ring("test", 2, 1, 16)
    put(ring, 0)
    ring.claim(CONSUMER, 0.0)

    ring.recover(CONSUMER, is_done=lambda n: True, fail=None)

    assert ring.is_open(2)


def test_only_the_row_that_kills_is_given_up() -> None:
    ring = Ring("test", 2, 4, 16)
    for n in range(4):
        put(ring, n)
    done = {0}
    given_up = []

    def fail(n: int) -> None:
        given_up.append(n)
        done.add(n)

    for _ in range(MAX_ATTEMPTS):
        assert ring.claim(CONSUMER, 0.0) == 0
        ring.recover(CONSUMER, done.__contains__, fail)

    assert given_up == [1]
    assert ring.claim(CONSUMER, 0.0) == 0
    assert ring.peek(0)[2] == 1


def test_rows_that_got_further_each_time_are_not_given_up() -> None:
    ring = Ring("test", 2, 4, 16)
    for n in range(4):
        put(ring, n)
    done: set[int] = set()

    for n in range(4):
        for _ in range(MAX_ATTEMPTS - 1):
            assert ring.claim(CONSUMER, 0.0) == 0
            assert ring.recover(CONSUMER, done.__contains__, done.add) == 0
        done.add(n)
    assert ring.claim(CONSUMER, 0.0) == 0
    ring.recover(CONSUMER, done.__contains__, None)

    assert ring.is_open(8)


def test_waiting_consumer_is_woken_by_another_process() -> None:
    ring = Ring("test", 2, 1, 16)
    pid = os.fork()
    if pid == 0:
        time.sleep(0.05)
        put(ring, 0)
        os._exit(0)

    assert ring.claim(CONSUMER, 30.0) == 0
    os.waitpid(pid, 0)


def wait_open(ring: Ring, n: int) -> int:
    return not ring.wait_open(n, 30.0)


def test_waiting_producers_are_woken_for_the_rows_they_want() -> None:
    ring = Ring("test", 4, 1, 16)
    for n in range(4):
        put(ring, n)
        ring.claim(CONSUMER, 0.0)
    pids = [fork(partial(wait_open, ring, n)) for n in (7, 4)]

    for seq in (1, 3, 2, 0):
        ring.release(seq, CONSUMER)

    assert [wait(pid) for pid in pids] == [0, 0]


def test_claim_survives_sigkill_of_its_process() -> None:
    ring = Ring("test", 2, 1, 16)
    put(ring, 0)
    pid = os.fork()
    if pid == 0:
        ring.claim(CONSUMER, 0.0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert ring.claim(OTHER, 0.0) is None

    ring.recover(CONSUMER, is_done=lambda n: False, fail=None)

    assert ring.claim(OTHER, 0.0) == 0


@pytest.mark.parametrize(
    "geometry", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1 << 33, 1, 1), (1 << 16, 1 << 16, 1 << 40)]
)
def test_impossible_geometry_is_refused(geometry: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no ring of"):
        Ring("test", *geometry)


def formatted(n_bytes: int = 1 << 16) -> mmap.mmap:
    memory = mmap.mmap(-1, n_bytes)
    _native.Ring.format(memory, 4, 2, 64)
    return memory


@pytest.mark.parametrize("value", [0, 1 << 20, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("field", range(1, 8))
def test_geometry_that_contradicts_itself_is_refused(field: int, value: int) -> None:
    memory = formatted()
    struct.pack_into("Q", memory, field * 8, value)  # magic, then the geometry

    with pytest.raises(ValueError, match="65536 bytes of memory hold no ring"):
        _native.Ring(memory, Header)


def test_ring_that_was_cut_off_is_refused() -> None:
    n_bytes = _native.Ring.measure(4, 2, 64)
    memory = memoryview(formatted())
    _native.Ring(memory[:n_bytes], Header)

    for n in (0, 1, 63, 64, n_bytes - 1):
        with pytest.raises(ValueError, match="hold no ring"):
            _native.Ring(memory[:n], Header)


@pytest.mark.parametrize("offset", [1, 8, 32])
def test_memory_off_the_lines_is_refused(offset: int) -> None:
    shifted = memoryview(mmap.mmap(-1, 1 << 17))[offset:]
    shifted[: 1 << 16] = formatted()

    with pytest.raises(ValueError, match="hold no ring"):
        _native.Ring(shifted, Header)
    with pytest.raises(ValueError, match="do not fit"):
        _native.Ring.format(shifted, 4, 2, 64)


@pytest.mark.parametrize("items", ["Q", "H", "c"])
def test_memory_of_other_items_is_bytes(items: Any) -> None:
    ring = _native.Ring(memoryview(formatted()).cast(items), Header)

    ring.set_note(7, b"hello")
    ring.put(7, Header(row=7), b"world")

    assert ring.payload(7).nbytes == 64
    assert (bytes(ring.note(7)), bytes(ring.data(7))) == (b"hello", b"world")


class Wide(tuple[int, ...]):
    """Has a __dict__ behind its items."""


@pytest.mark.parametrize("header", [time.struct_time, type(sys.float_info), Wide, list, 7])
def test_header_must_be_a_plain_tuple(header: Any) -> None:
    with pytest.raises(TypeError):
        _native.Ring(formatted(), header)


@pytest.mark.parametrize(("source", "goal"), [(0, 8), (8, 0)])
def test_row_may_be_put_from_its_own_payload(source: int, goal: int) -> None:
    ring = Ring("test", 2, 1, 1024)
    text = random.Random(0).randbytes(1024)
    ring.payload(0)[:] = text
    ring.set_note(0, b"8 bytes."[:goal])
    text = bytes(ring.payload(0))

    ring.put(0, Header(row=0), ring.payload(0)[source : source + 900])

    assert bytes(ring.data(0)) == text[source : source + 900]


def test_note_may_be_cut_from_its_own_payload() -> None:
    ring = Ring("test", 2, 1, 1024)
    text = random.Random(0).randbytes(1024)
    ring.payload(0)[:] = text

    ring.set_note(0, ring.payload(0)[8:908])

    assert bytes(ring.note(0)) == text[8:908]
