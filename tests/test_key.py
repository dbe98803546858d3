"""Key values survive the way from an Arrow column through pickle to Arrow or JSON."""

from __future__ import annotations

import pickle
from decimal import Decimal
from typing import Any

import orjson
import pyarrow as pa
import pytest

from evmp.key import KeyField, arrow_field, encode, json_encoder, key_values, table_field

NS = 1_700_000_000_123_456_789
STRUCT = pa.struct([("at", pa.timestamp("ns")), ("tags", pa.list_(pa.float32()))])

# Type, a value as it travels, its JSON.
CASES: list[tuple[pa.DataType, Any, str]] = [
    (pa.int64(), -(1 << 63), "-9223372036854775808"),
    (pa.uint64(), (1 << 64) - 1, "18446744073709551615"),
    (pa.bool_(), True, "true"),
    (pa.string(), 'say "hi"\n', r'"say \"hi\"\n"'),
    (pa.large_string(), "大", '"大"'),
    (pa.binary(), b"\x00\xff", '"AP8="'),
    (pa.binary(2), b"ab", '"YWI="'),
    (pa.float64(), 0.1, "0.1"),
    (pa.float64(), float("inf"), "null"),
    (pa.float32(), 0.10000000149011612, "0.1"),
    (pa.decimal128(10, 3), Decimal("12.300"), '"12.300"'),
    (pa.date32(), 19_000, '"2022-01-08"'),
    (pa.date64(), 19_000 * 86_400_000, '"2022-01-08"'),
    (pa.time32("s"), 3661, '"01:01:01"'),
    (pa.time64("ns"), 1, '"00:00:00.000000001"'),
    (pa.timestamp("ns"), NS, '"2023-11-14T22:13:20.123456789"'),
    (pa.timestamp("ms", tz="Asia/Shanghai"), 0, '"1970-01-01T00:00:00.000Z"'),
    (pa.timestamp("s"), 253_402_300_800, '"10000-01-01T00:00:00"'),
    (pa.duration("us"), 1_500_000, "1.5"),
    (pa.list_(pa.timestamp("s")), [0, None], '["1970-01-01T00:00:00",null]'),
    (pa.large_list(pa.int8()), [1], "[1]"),
    (pa.list_(pa.binary(), 1), [b"a"], '["YQ=="]'),
    (STRUCT, {"at": 0, "tags": [0.5]}, '{"at":"1970-01-01T00:00:00.000000000","tags":[0.5]}'),
    (pa.map_(pa.string(), pa.date32()), [("a", 0)], '{"a":"1970-01-01"}'),
    (pa.map_(pa.int8(), pa.string()), [(1, "a")], '[[1,"a"]]'),
    (pa.null(), None, "null"),
]
IDS = [f"{dtype}-{text}"[:40] for dtype, _, text in CASES]


@pytest.mark.parametrize(("dtype", "value", "text"), CASES, ids=IDS)
def test_values_are_restored_after_a_pickle(dtype: pa.DataType, value: Any, text: str) -> None:
    column = pa.array([value, None], type=dtype)

    field, values = pickle.loads(pickle.dumps((table_field("k", dtype), key_values(column))))

    assert values == [value, None]
    assert pa.array(values, type=arrow_field(field).type).equals(column)


@pytest.mark.parametrize(("dtype", "value", "text"), CASES, ids=IDS)
def test_values_become_json(dtype: pa.DataType, value: Any, text: str) -> None:
    encoded = encode(json_encoder(dtype), value)

    assert orjson.dumps(encoded, option=orjson.OPT_SERIALIZE_NUMPY).decode() == text


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        (pa.array(["a", "b", "a"]).dictionary_encode(), pa.string()),
        (pa.array(["a", "b", "a"], pa.string_view()), pa.string()),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_encodings_are_carried_as_what_they_hold(column: Any, dtype: pa.DataType) -> None:
    assert arrow_field(table_field("k", column.type)) == pa.field("k", dtype)
    assert key_values(column) == pa.array(column.to_pylist(), dtype).to_pylist()


def test_list_views_are_refused_rather_than_cast_wrongly() -> None:
    with pytest.raises(NotImplementedError, match="list views"):
        table_field("k", pa.struct([("a", pa.list_view(pa.int8()))]))


def test_extension_types_are_carried_as_their_storage() -> None:
    storage = pa.array([b"0123456789abcdef", None], pa.binary(16))

    assert key_values(pa.ExtensionArray.from_storage(pa.uuid(), storage)) == storage.to_pylist()
    assert arrow_field(table_field("k", pa.uuid())).type == pa.binary(16)


def test_text_that_is_not_utf8_keeps_the_rest_of_it() -> None:
    column = pa.array([b"a\xffb", None, "大".encode()]).view(pa.string())

    assert key_values(column) == ["a\ufffdb", None, "大"]
    offsets = pa.array([0, 1, 1, 3], pa.int32())
    texts = ["a\ufffdb"], [], [None, "大"]
    assert key_values(pa.ListArray.from_arrays(offsets, column)) == [*texts]
    pairs = pa.MapArray.from_arrays(offsets, column.fill_null("k"), column)
    nested = pa.StructArray.from_arrays([column, pairs, pa.array([1, 2, 3])], ["x", "y", "z"])
    assert key_values(nested) == [
        {"x": "a\ufffdb", "y": [("a\ufffdb", "a\ufffdb")], "z": 1},
        {"x": None, "y": [], "z": 2},
        {"x": "大", "y": [("k", None), ("大", "大")], "z": 3},
    ]


def test_line_of_a_list_is_text_in_a_table() -> None:
    field = KeyField("image")

    assert field.is_line
    assert arrow_field(field) == pa.field("image", pa.string())
