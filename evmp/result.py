"""What a user's predictor returns, as the JSON of a row.

numpy's numbers and arrays become numbers and lists, float32 in its shortest form, NaN and infinity
null; keys that are no text become text. What JSON has no form for is an error that names its place:
`result["a"][2]: set`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import numpy as np
import orjson

from evmp.errors import CustomCodeError

OPTIONS: Final = orjson.OPT_SERIALIZE_NUMPY
TEXT_KEYS: Final = OPTIONS | orjson.OPT_NON_STR_KEYS
MAX_DEPTH: Final = 100  # to which a fault is looked for


def to_json(result: object) -> bytes:
    """Write a result.

    Raises:
        CustomCodeError: JSON has no form for something in it.
    """
    with suppress(TypeError, ValueError, RecursionError):
        return orjson.dumps(result, default=_plain, option=OPTIONS)
    try:
        text = orjson.dumps(result, default=_plain, option=TEXT_KEYS)
    except (TypeError, ValueError, RecursionError) as error:
        raise CustomCodeError(_place_of_fault(result, "result", str(error))) from None
    _check_keys(result, "result")
    return text


def _check_keys(value: Any, path: str) -> None:
    """Refuse keys of one mapping that become the same text, such as 1 and "1"."""
    if isinstance(value, dict):
        names = [orjson.dumps({key: None}, option=TEXT_KEYS) for key in value]
        if twice := next((key for key, n in Counter(names).items() if n > 1), None):
            key = twice[1 : -len(b":null}")].decode()
            raise CustomCodeError(f"{path}: two keys become {key}")
    for place, part in _parts(value):
        _check_keys(part, f"{path}[{place}]")


def _plain(value: object) -> object:
    """Return what orjson can write for what it cannot: arrays of any type and layout.

    Numbers stay numpy's: only so is a float32 written as one.
    """
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        return array.tolist()
    is_long = array.dtype.kind == "f" and array.itemsize > 8
    numbers = np.ascontiguousarray(array, np.float64 if is_long else array.dtype)
    return numbers if array.ndim else numbers[0]


def _place_of_fault(value: object, path: str, reason: str, depth: int = 0) -> str:
    """Name the innermost part of a value that cannot be written."""
    for place, part in _parts(value):
        try:
            orjson.dumps(part, default=_plain, option=TEXT_KEYS)
        except (TypeError, ValueError, RecursionError) as error:
            if depth < MAX_DEPTH:
                return _place_of_fault(part, f"{path}[{place}]", str(error), depth + 1)
            return f"{path[:MAX_DEPTH]}...: nested too deeply"
    kind = type(value).__name__
    known = isinstance(value, (str, int, dict, list, tuple, np.ndarray)) and not isinstance(
        value, bool
    )
    return f"{path}: {kind}, {reason[:1].lower()}{reason[1:]}" if known else f"{path}: {kind}"


def _parts(value: Any) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield json.dumps(key, default=repr, ensure_ascii=False), part
    elif isinstance(value, np.ndarray) and value.dtype.hasobject and value.ndim:
        yield from _parts(value.tolist())
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            yield str(place), part
