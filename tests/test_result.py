"""A user's result as JSON: numpy and all, or the place of what is none."""

from __future__ import annotations

import datetime
import json
from typing import Any

import numpy as np
import pytest

from evmp.errors import CustomCodeError
from evmp.result import to_json


def test_numpy_values_are_numbers_and_lists() -> None:
    result = {
        "float32": np.float32(0.1),
        "int64": np.int64(-3),
        "bool": np.bool_(True),
        "array": np.array([[1, 2], [3, 4]], np.uint8)[:, ::-1],
        "half": np.array([0.5], np.float16),
        "text": np.array(["a", "ü"]),
        "objects": np.array([1, "b", None], object),
        "nested": [{"x": (np.float64(1.5), np.nan, np.inf)}],
        7: {np.str_("key"): None},
    }

    assert (
        to_json(result)
        == (
            '{"float32":0.1,"int64":-3,"bool":true,"array":[[2,1],[4,3]],"half":[0.5],'
            '"text":["a","ü"],"objects":[1,"b",null],"nested":[{"x":[1.5,null,null]}],'
            '"7":{"key":null}}'
        ).encode()
    )


def test_floats_are_written_as_what_they_are_in_any_layout() -> None:
    table = np.array([[0.1, 0.2], [0.3, np.nan]], np.float32)

    assert to_json([table.T, table[:, 0]]) == b"[[[0.1,0.3],[0.2,null]],[0.1,0.3]]"
    assert to_json([np.array(0.1, np.float32), np.asfortranarray(table)[0]]) == b"[0.1,[0.1,0.2]]"
    assert to_json([np.longdouble(0.5), np.array([0.5], np.longdouble)]) == b"[0.5,[0.5]]"


def test_dates_are_text() -> None:
    assert json.loads(to_json({"day": datetime.date(2024, 2, 29)})) == {"day": "2024-02-29"}


def endless() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"a": [1, 2, {3}]}, 'result["a"][2]: set'),
        ({"a": {"b": (0, b"x")}}, 'result["a"]["b"][1]: bytes'),
        ({"ü": object()}, 'result["ü"]: object'),
        ({"a": {1: 2, "1": 3}}, 'result["a"]: two keys become "1"'),
        ([np.zeros(3, ">f4")], "result[0]: ndarray, numpy array is not native-endianness"),
        ({"n": [10**30]}, 'result["n"][0]: int, integer exceeds 64-bit range'),
        ({"t": "\ud800"}, 'result["t"]: str, str is not valid UTF-8: surrogates not allowed'),
        ({"o": np.array([1, {2}], object)}, 'result["o"][1]: set'),
        ({"c": 1j}, 'result["c"]: complex'),
        ({"f": test_dates_are_text}, 'result["f"]: function'),
        ({"loop": endless()}, "nested too deeply"),
        ({(1, 2): 3}, "result: dict, "),
    ],
)
def test_what_is_no_json_is_named_with_its_place(result: object, message: str) -> None:
    with pytest.raises(CustomCodeError) as caught:
        to_json(result)

    assert message in str(caught.value)
    assert len(str(caught.value)) < 300
