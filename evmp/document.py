"""Read one YAML mapping of settings, a job file or a model.yaml, and note the line of every key.

The reader walks PyYAML's node graph itself instead of loading it: that gives the lines, finds keys
written twice, and bounds how far anchors may unfold (a "billion laughs" file is a few hundred
bytes). What cannot be read at all raises ConfigError; what can be passed over, such as a key
written twice, is kept in `Document.problems`, beside everything else that is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evmp.errors import ConfigError, Problem

MAX_FILE_BYTES = 4 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 32

KeyPath = tuple[str | int, ...]

_SCALARS = {
    "tag:yaml.org,2002:null": yaml.constructor.SafeConstructor.construct_yaml_null,
    "tag:yaml.org,2002:bool": yaml.constructor.SafeConstructor.construct_yaml_bool,
    "tag:yaml.org,2002:int": yaml.constructor.SafeConstructor.construct_yaml_int,
    "tag:yaml.org,2002:float": yaml.constructor.SafeConstructor.construct_yaml_float,
}
# Plain scalars that YAML 1.1 would turn into dates and the like stay the text the user wrote.
_TEXTS = {f"tag:yaml.org,2002:{name}" for name in ("str", "timestamp", "value", "merge")}


@dataclass(frozen=True, slots=True)
class Document:
    """The settings as written, before they are checked against a schema."""

    file: str
    """The name to use in messages: the path as the user gave it."""
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """The line, counted from 1, of each key and list item by its path."""
    problems: tuple[Problem, ...] = ()
    overridden: frozenset[str] = frozenset()
    """Top-level keys whose value came from -D and not from the file."""

    def problem(self, path: KeyPath, message: str) -> Problem:
        """Make a Problem that points at the key, or at the nearest key above that was written."""
        if path and path[0] in self.overridden:
            return Problem(message, format_path(path), "-D")
        written = path
        while written and written not in self.lines:
            written = written[:-1]
        return Problem(message, format_path(path), self.file, self.lines.get(written))


def format_path(path: KeyPath) -> str:
    """Write a path the way users do: `input.mean[1]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def is_utf8(text: str) -> bool:
    """Tell whether the text can be written as UTF-8, that is, holds no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_document(path: str | Path) -> Document:
    """Read the file.

    Raises:
        ConfigError: the file is missing, unreadable, larger than MAX_FILE_BYTES, not UTF-8, not
            YAML, empty, anything but a mapping, or unfolds to more than MAX_VALUES values.
    """
    file = str(path)
    return _parse(read_text(file, MAX_FILE_BYTES), file)


def read_text(path: str | Path, max_bytes: int) -> str:
    """Read a whole UTF-8 file, with or without a byte order mark.

    Raises:
        ConfigError: the file is missing, unreadable, too large or not UTF-8.
    """
    file = str(path)
    try:
        with open(file, "rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(Problem(f"cannot be read: {reason}", file=file)) from error
    if len(data) > max_bytes:
        raise ConfigError(Problem(f"larger than {max_bytes} bytes", file=file))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8: byte 0x{data[error.start]:02x}; save the file as UTF-8"
        raise ConfigError(Problem(message, file=file, line=line)) from error


def parse_value(text: str) -> Any:
    """Return the value of one YAML scalar or flow collection, such as `8`, `true` or `[id, name]`.

    Raises:
        ConfigError: the text is not YAML.
    """
    node = _compose(text, "")
    return None if node is None else _Walk("").value(node, ())


def _parse(text: str, file: str) -> Document:
    node = _compose(text, file)
    if node is None:
        raise ConfigError(
            Problem("empty, expected keys and values such as `key: value`", file=file)
        )
    if not isinstance(node, yaml.MappingNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else "text"
        message = f"got {found}, expected keys and values such as `key: value`"
        raise ConfigError(Problem(message, file=file, line=node.start_mark.line + 1))
    walk = _Walk(file)
    values = walk.value(node, ())
    return Document(file, values, walk.lines, tuple(walk.problems))


def _compose(text: str, file: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context
        line = None if mark is None else mark.line + 1
        raise ConfigError(Problem(f"not YAML: {what}", file=file, line=line)) from error
    except yaml.YAMLError as error:
        raise ConfigError(Problem(f"not YAML: {str(error).splitlines()[0]}", file=file)) from error
    except RecursionError as error:
        raise ConfigError(Problem("not YAML: nested too deeply", file=file)) from error


class _Walk:
    """One walk over a node graph: builds the values, counts them, notes lines and duplicates."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._n_values = 0
        self._constructor = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._n_values += 1
        if self._n_values > MAX_VALUES:
            raise self._fatal(node, f"unfolds to more than {MAX_VALUES} values")
        if len(path) > MAX_DEPTH:
            raise self._fatal(node, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            raise self._fatal(node, f"the tag {node.tag} is not supported")
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._fatal(key_node, "a key must be text")
            key = key_node.value
            line, place = key_node.start_mark.line + 1, (*path, key)
            if key in values:
                first = self.lines[place]
                message = f"written twice, first on line {first}; keep one of them"
                self.problems.append(Problem(message, format_path(place), self.file, line))
                continue
            self.lines[place] = line
            values[key] = self.value(value_node, place)
        return values

    def _item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.lines[path] = node.start_mark.line + 1
        return self.value(node, path)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag in _TEXTS:
            if not is_utf8(node.value):
                raise self._fatal(node, "not UTF-8: a surrogate without its pair")
            return node.value
        if node.tag not in _SCALARS:
            raise self._fatal(node, f"the tag {node.tag} is not supported")
        try:
            return _SCALARS[node.tag](self._constructor, node)
        except (ValueError, IndexError, KeyError) as error:
            raise self._fatal(node, f"not a value: {node.value[:40]}") from error

    def _fatal(self, node: yaml.Node, message: str) -> ConfigError:
        return ConfigError(Problem(message, file=self.file, line=node.start_mark.line + 1))
