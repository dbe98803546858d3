"""Who looks at every byte that a fuzzed worker has committed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import orjson

from evmp.errors import EvmpError
from evmp.ledger import Ledger
from evmp.publish import check_cover
from fuzzing.world import expected_line

if TYPE_CHECKING:
    from fuzzing.scenario import Verdict

_ROW: Final = re.compile(rb'\{"image":"row (\d+)')
_DIED: Final = re.compile(r"the (decoder|process \S+|predictor) died of this row: .*")


def judge(ledger: Ledger, n_rows: int, verdict: Verdict, result: Callable[[int], bytes]) -> None:
    """Compare every line of every committed block with what it should be.

    Args:
        result: gives that of a row.
    """
    seen = bytearray(n_rows)
    before = -1
    for line in _lines(ledger, verdict):
        found = _ROW.match(line)
        row = int(found[1]) if found else n_rows
        if row >= n_rows:
            verdict.wrong += 1
            continue
        seen[row] = min(255, seen[row] + 1)
        verdict.moved += row != before + 1
        before = row
        if line != expected_line(row, result(row)) and not _is_given_up(row, line, verdict):
            verdict.wrong += 1
    verdict.lost = seen.count(0)
    verdict.rows = n_rows - verdict.lost
    verdict.doubled = sum(count - 1 for count in seen if count > 1)
    _check(lambda: check_cover(ledger.commits(), n_rows), verdict)


def _lines(ledger: Ledger, verdict: Verdict) -> Iterator[bytes]:
    for commit in ledger.commits():
        lines: list[bytes] = []
        try:
            with ledger.data(commit) as file:
                lines = file.read_bytes().splitlines(keepends=True)
        except EvmpError as error:
            verdict.error = verdict.error or str(error)
        yield from lines
        if len(lines) != commit.stop - commit.start:
            verdict.error = verdict.error or f"{commit} holds {len(lines)} rows"


def _check(check: object, verdict: Verdict) -> None:
    try:
        check()  # type: ignore[operator]
    except EvmpError as error:
        verdict.error = verdict.error or str(error)


def _is_given_up(row: int, line: bytes, verdict: Verdict) -> bool:
    """Tell whether the line is the one error row that a row which kills may become."""
    with suppress(ValueError, KeyError, AttributeError):
        outcome = orjson.loads(line)["prediction_result"]
        message = str(outcome.get("error_msg"))
        if _DIED.fullmatch(message) and line == expected_line(row, orjson.dumps(outcome)):
            verdict.given_up[row] = message
            return True
    return False
