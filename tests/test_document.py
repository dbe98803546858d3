from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evmp.document import MAX_FILE_BYTES, Document, format_path, parse_value, read_document
from evmp.errors import ConfigError


def read(folder: Path, content: str | bytes) -> Document:
    file = folder / "job.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_document(file)


def refusal(folder: Path, content: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, content)
    return str(caught.value).removeprefix(f"{folder / 'job.yaml'}")


def test_values_and_the_lines_of_their_keys_are_read(tmp_path: Path) -> None:
    document = read(tmp_path, "# a job\na: 1\nb:\n  c: [x,\n    true]\nd: 2.5\n")

    assert document.values == {"a": 1, "b": {"c": ["x", True]}, "d": 2.5}
    assert document.lines[("b", "c")] == 4
    assert document.lines[("b", "c", 1)] == 5
    assert str(document.problem(("b", "c", 1), "got true")).endswith(":5: b.c[1]: got true")


def test_a_key_that_was_not_written_is_placed_at_the_one_above(tmp_path: Path) -> None:
    document = read(tmp_path, "a: 1\nb:\n  c: 2\n")

    assert document.problem(("b", "d"), "missing").line == 2
    assert document.problem(("e",), "missing").line is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": empty, expected keys and values such as `key: value`"),
        ("# nothing but this\n\n", ": empty, expected keys and values such as `key: value`"),
        ("\n- a\n- b\n", ":2: got a list, expected keys and values such as `key: value`"),
        ("a text\n", ":1: got text, expected keys and values such as `key: value`"),
        ("a: 1\nb: [1, 2\n", ":3: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: b: c\n", ":1: not YAML: mapping values are not allowed here"),
        ("a:\n\t- b\n", r":2: not YAML: found character '\t' that cannot start any token"),
        ("a: 1\n---\nb: 2\n", ":2: not YAML: but found another document"),
        (b"a: 1\nb: caf\xe9\n", ":2: not UTF-8: byte 0xe9; save the file as UTF-8"),
        ("a: 1\n".encode("utf-16"), ":1: not UTF-8: byte 0xff; save the file as UTF-8"),
        (
            "a: \x07\n",
            ": not YAML: unacceptable character #x0007: special characters are not allowed",
        ),
        ("a: *b\n", ":1: not YAML: found undefined alias 'b'"),
        ("a: !!python/object:os.system x\n", ":1: the tag tag:yaml.org,2002:python/object"),
        ("a: 1\nb: !include c\n", ":2: the tag !include is not supported"),
        ("a: !thing {b: 1}\n", ":1: the tag !thing is not supported"),
        ("? [a, b]\n: 1\n", ":1: a key must be text"),
        ("a: !!int x\n", ":1: not a value: x"),
        ('a: "\\ud800"\n', ":1: not UTF-8: a surrogate without its pair"),
        (f"a: {'9' * 5000}\n", ":1: not a value: 999"),
        ("a: " + "[" * 1000, ": not YAML: nested too deeply"),
        ("a: " + "[" * 50 + "]" * 50, ":1: nested deeper than 32 levels"),
        ("a: &a [*a]\n", ":1: nested deeper than 32 levels"),
        (b"#" * (MAX_FILE_BYTES + 1), f": larger than {MAX_FILE_BYTES} bytes"),
    ],
)
def test_what_is_no_mapping_of_settings_is_refused(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    assert refusal(tmp_path, content).startswith(message)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: cannot be read: no such file or directory"):
        read_document(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read: is a directory"):
        read_document(tmp_path)


def test_a_billion_laughs_are_cut_short(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]

    assert "unfolds to more than 100000 values" in refusal(tmp_path, "\n".join(lines))


def test_every_key_written_twice_is_found(tmp_path: Path) -> None:
    document = read(tmp_path, "a: 1\nb: 2\na: 3\nc: {d: 1, d: 2}\na: 4\n")

    assert document.values == {"a": 1, "b": 2, "c": {"d": 1}}
    assert [(p.path, p.line) for p in document.problems] == [("a", 3), ("c.d", 4), ("a", 5)]
    assert document.problems[0].message == "written twice, first on line 1; keep one of them"


def test_dates_and_the_like_stay_text(tmp_path: Path) -> None:
    document = read(tmp_path, "\ufeffa: 2026-11-22\nb: =\n2: <<\non: x\n")

    assert document.values == {"a": "2026-11-22", "b": "=", "2": "<<", "on": "x"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), ("true", True), ("", None), ("[id, name]", ["id", "name"]), ("a b", "a b")],
)
def test_a_value_on_its_own_is_read_as_yaml(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_a_path_is_written_like_in_python() -> None:
    assert format_path(("input", "mean", 1)) == "input.mean[1]"
    assert format_path(()) == ""


@given(st.text(alphabet="ab:-[]{},&*!?|>'\"# \n\t0.<=", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_value(text)
    except ConfigError as error:
        assert error.problems[0].message
