"""Protocols that are broken on purpose: the crash fuzz must see each of them.

A mutant of Python replaces a function; a mutant of C replaces a few lines of csrc/ring.c, which is
then built into an extension of its own.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any, Final

from evmp.grid import Block
from evmp.ledger import Ledger
from evmp.predictor import Predictor
from evmp.processor import Processor
from evmp.reader import Reader
from evmp.ring import Header, Ring
from evmp.sample import pack
from evmp.sink import Recovered
from evmp.stage import claims

Patch = dict[str, Any]
ROOT: Final = Path(__file__).resolve().parents[2]
_recover, _resume, _put = Ring.recover, Reader._resume, Processor._put


def _free_what_is_not_done(self: Ring, seat: int, is_done: object, *blame: Any) -> int:
    return _recover(self, seat, lambda n: True, *blame)


def _free_nothing(self: Ring, seat: int, is_done: object, *blame: object) -> int:
    return 0


def _release_then_decode(self: Any) -> None:
    for n in claims(self._payload, self._seat, self._number):
        header = self._payload.header(n)
        self._payload.release(n, self._number)
        if not self._pixels.is_done(n):
            self._work(n, header)


def _begin_and_release(self: Any, seq: int, has_killed: bool) -> Any:
    batch = _begin(self, seq, has_killed)
    self._pixels.release(seq, self._number)
    return batch


def _release_then_write(self: Any) -> None:
    for seq in claims(self._results, self._seat, self._number, ordered=True):
        placed = list(self._placed(seq))
        self._results.release(seq, self._number)
        self._deliver(placed)
    if self._block is not None:
        self._commit(self._block)


def _commit_then_pack(self: Any, n: int, samples: list[Any]) -> None:
    if not samples:
        _put(self, n, samples)
        return
    row, place = self._before.header(n).row, memoryview(bytearray(64 << 10))
    length = pack(samples, place)
    self._after.set_header(n, Header(row, length=length))
    self._after.commit(n)
    self._after.payload(n)[:length] = place[:length]


def _trust_torn_tail(self: object, path: Path) -> Recovered:
    if not path.exists():
        return Recovered(0, 0)
    return Recovered(len(path.read_bytes().splitlines()), 0)


def _append_again(self: Any, sink: Any, placed: list[Any]) -> list[Any]:
    records = [it.record for it in placed]
    if self._file is not None and records:
        sink.append(self._file, records)
        self._next = max(self._next, placed[-1].place + 1)
    return records


def _resume_late(self: Reader) -> tuple[int, int]:
    n, row = _resume(self)
    return n, row + (n > 0)


def _resume_early(self: Reader) -> tuple[int, int]:
    n, row = _resume(self)
    return n, max(0, row - 1)


def _rename_then_record(
    self: Ledger, stage: Path, block: Block, failed: int, reasons: dict[str, list[Any]]
) -> bool:
    aside = stage.with_suffix(".aside")
    os.rename(stage, aside)
    return _commit(self, aside, block, failed, reasons)


def _trim_without_a_mark(self: Ring, n: int, keep_bytes: int) -> None:
    header = self.header(n)
    _trim(self, n, keep_bytes)
    self.set_header(n, header)


_commit, _trim, _begin = Ledger.commit, Ring._trim, Predictor._begin

PYTHON: Final[dict[str, Patch]] = {
    "recovery frees rows that are not done": {"evmp.ring.Ring.recover": _free_what_is_not_done},
    "recovery frees nothing": {"evmp.ring.Ring.recover": _free_nothing},
    "decoder releases before it commits": {"evmp.decoder.Decoder.run": _release_then_decode},
    "predictor releases what it has begun": {"evmp.predictor.Predictor._begin": _begin_and_release},
    "process hands on before it writes": {"evmp.processor.Processor._put": _commit_then_pack},
    "writer releases before it writes": {"evmp.writer.Writer.run": _release_then_write},
    "writer trusts a torn tail": {"fuzzing.world.TearingSink.recover": _trust_torn_tail},
    "writer appends what is there already": {"evmp.writer._OpenBlock.append": _append_again},
    "reader resumes a row late": {"evmp.reader.Reader._resume": _resume_late},
    "reader resumes a row early": {"evmp.reader.Reader._resume": _resume_early},
    "block moves before its record": {"evmp.ledger.Ledger.commit": _rename_then_record},
    "memory goes back without a mark": {
        "evmp.ring.Ring._trim": _trim_without_a_mark,
        "fuzzing.world.LONG_EVERY": 14,
    },
}


def _at_lines_of(role: str, stride: int, **scenario: int) -> dict[str, Any]:
    """Die at each `stride`-th line behind those that a process needs to start."""
    return {"lines": 0, "steps": 0, "sweep": role, "first_line": 100, "stride": stride, **scenario}


# How to bring those out that random deaths find too seldom.
HINTS: Final[dict[str, dict[str, Any]]] = {
    "process hands on before it writes": {"is_custom": True},
    "block moves before its record": _at_lines_of("writer", 4, block_rows=12),
    "memory goes back without a mark": {"lines": 0, "steps": 15},
    "writer trusts a torn tail": _at_lines_of("writer", 3, n_rows=500),
    # These go on to the end.
    "writer appends what is there already": _at_lines_of("writer", 40, n_rows=400),
    "reader resumes a row early": _at_lines_of("reader", 20, n_rows=100),
}

_COUNT = "(_Atomic uint64_t *)((char *)slot + 8)"

# What is found once in ring.c, and what comes in its place.
C: Final[dict[str, list[tuple[str, str]]]] = {
    "rows are counted instead of marked": [
        (
            "    step();\n    if (is_complete(ring, seq)) {",
            f"    step();\n    atomic_fetch_add({_COUNT}, 1);\n    if (is_complete(ring, seq)) {{",
        ),
        (
            "    uint64_t flip = is_even_lap(ring, seq) ? 0 : UINT64_MAX;",
            "    uint64_t lap = seq / ring->n_slots + 1;\n"
            f"    if (atomic_load({_COUNT}) < lap * ring->n_rows) return false;\n"
            "    uint64_t flip = is_even_lap(ring, seq) ? 0 : UINT64_MAX;",
        ),
    ],
    "claim does not compare": [
        (
            "if (atomic_compare_exchange_strong(word, &old, new)) {\n            step();",
            "if ((usleep(1), atomic_store(word, new), true)) {\n            step();",
        ),
    ],
    "row is committed before it is written": [
        (
            "    memmove(behind_note, data, header->length);\n    step();\n",
            "    ring_commit(ring, n);\n    step();\n"
            "    memmove(behind_note, data, header->length);\n",
        ),
    ],
    "batch of the dead moves on": [
        (
            "hand_on(ring, seq, seat, pack(seq, 0, attempt, RING_OPEN))",
            "hand_on(ring, seq, seat, pack(seq + ring->n_slots, 0, attempt, RING_OPEN))",
        ),
    ],
}


def mutate(name: str, folder: Path) -> Path:
    """Write the ring.c of the C mutant `name` to `folder`."""
    text = (ROOT / "csrc" / "ring.c").read_text()
    for old, new in C[name]:
        assert text.count(old) == 1, f"ring.c has changed; the mutant {name!r} needs another place"
        text = text.replace(old, new)
    (folder / "ring.c").write_text(text)
    return folder / "ring.c"


def build(name: str, folder: Path) -> Path:
    """Build the C mutant `name` in `folder`. Returns an extension that has only the ring."""
    extension = folder / "mutant.so"
    sources = [mutate(name, folder), ROOT / "tests" / "c" / "ring_module.c"]
    sources += [ROOT / "csrc" / f"native_{part}.c" for part in ("ring", "row", "process")]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{sysconfig.get_paths()['include']}"]
    command: list[str | Path] = [
        "gcc",
        "-std=c11",
        "-O1",
        "-fPIC",
        "-w",
        "-shared",
        *includes,
        *sources,
    ]
    done = subprocess.run([*command, "-o", extension], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return extension
