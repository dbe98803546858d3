"""Settings with a unit, a range and a meaning, and messages that name key, line and remedy.

`key` declares one setting of a pydantic model (`evmp.job.Job`, `evmp.model.spec.ModelFile`),
`build` turns a Document into that model, and the JSON schemas and the reference tables are read
off the same declarations. `build` reports everything wrong at once: pydantic stops before the rules
that join several keys, so after a failure it runs those again over the keys that were right.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo

from evmp.document import Document, KeyPath
from evmp.errors import ConfigError, Problem

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Trait:
    """What a key's type does not say."""

    group: str
    unit: str = ""
    changes_result: bool = False
    """True: part of a job's fingerprint, a resumed job must not differ in it. False: speed only."""
    own: bool = False
    """False: the specification has the key, and its name, type and default are a contract."""
    comes_with: str = ""
    """The feature that will make the key work; empty where it works now."""
    example: Any = None
    """A valid value of a required key."""


@dataclass(frozen=True, slots=True)
class Clash:
    """A rule that joins several keys and is broken; reported at the first of them."""

    keys: tuple[str, ...]
    """Paths such as `queue_size` or `input.resize_size`."""
    message: str


def key(
    group: str,
    default: Any,
    text: str,
    *,
    unit: str = "",
    result: bool = False,
    own: bool = False,
    comes_with: str = "",
    example: Any = None,
    **limits: Any,
) -> Any:
    """Declare one setting; `default` is `...` where it is required.

    Args:
        text: one line without a full stop, for the reference table and the JSON schema.
        result, own: see Trait.
        limits: pydantic's `ge`, `gt`, `le`, `lt`, `min_length`, `max_length`.
    """
    trait = Trait(group, unit, result, own, comes_with, example)
    extra: Any = {"trait": asdict(trait)}
    return Field(default, description=text, json_schema_extra=extra, **limits)


def trait_of(field: FieldInfo) -> Trait:
    """Return what `key` was told about the field."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return Trait(**extra["trait"])  # type: ignore[arg-type]


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of the file that `model` describes, for editors."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **model.model_json_schema(),
    }
    for part in (schema, *schema.get("$defs", {}).values()):
        for node in part.get("properties", {}).values():
            node.pop("trait", None)
            node.pop("title", None)
    return schema


def build(model: type[M], document: Document) -> M:
    """Check the document against the model.

    Raises:
        ConfigError: anything is wrong; it lists every problem, in the order of the file.
    """
    problems = list(document.problems)
    try:
        return _finish(model.model_validate(document.values), problems)
    except ConfigError as error:
        problems += _locate(error, document)
    except ValidationError as error:
        problems += _translate(error, model, document)
        problems += _clashes_of_the_rest(model, error, document)
    raise ConfigError(*sorted(problems, key=_file_order))


def raise_clashes(clashes: Iterable[Clash], info: ValidationInfo) -> None:
    """Raise the broken rules as one ConfigError, less those about keys wrong in themselves.

    To be called from a model's `after` validator.
    """
    wrong = (info.context or {}).get("wrong", frozenset())
    problems = [
        Problem(clash.message, clash.keys[0])
        for clash in clashes
        if wrong.isdisjoint(path.split(".")[0] for path in clash.keys)
    ]
    if problems:
        raise ConfigError(*problems)


def show(value: object) -> str:
    """Write a value for a message: short, on one line, without control characters."""
    if value is None:
        return "nothing"
    if isinstance(value, (dict, BaseModel)):
        return "a mapping"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `, did you mean ...?` with the name that was probably meant, or nothing."""
    by_lower = {candidate.lower(): candidate for candidate in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f", did you mean {by_lower[found[0]]}?" if found else ""


def from_text(convert: Callable[[str], object]) -> BeforeValidator:
    """Let a number be written as text, as a shell hands it over."""

    def parse(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return convert(value)
        except ValueError:
            return value

    return BeforeValidator(parse)


def _truth(value: object) -> object:
    return (
        {"true": True, "false": False}.get(value.lower(), value)
        if isinstance(value, str)
        else value
    )


Integer = Annotated[int, from_text(int), Field(strict=True)]
Number = Annotated[float, from_text(float), Field(strict=True, allow_inf_nan=False)]
Truth = Annotated[bool, BeforeValidator(_truth), Field(strict=True)]


def _finish(built: M, problems: list[Problem]) -> M:
    if problems:
        raise ConfigError()
    return built


def _file_order(problem: Problem) -> tuple[bool, bool, int]:
    return problem.file == "-D", problem.line is None, problem.line or 0


def _locate(error: ConfigError, document: Document) -> list[Problem]:
    return [
        document.problem(tuple(problem.path.split(".")), problem.message)
        for problem in error.problems
    ]


def _clashes_of_the_rest(
    model: type[BaseModel], error: ValidationError, document: Document
) -> list[Problem]:
    wrong = frozenset(str(item["loc"][0]) for item in error.errors() if item["loc"])
    values = {name: value for name, value in document.values.items() if name not in wrong}
    for name, field in model.model_fields.items():
        if name in wrong and field.is_required():
            values[name] = trait_of(field).example
    try:
        model.model_validate(values, context={"wrong": wrong})
    except ConfigError as clashes:
        return _locate(clashes, document)
    return []


def _translate(error: ValidationError, model: type[BaseModel], document: Document) -> list[Problem]:
    schema = model.model_json_schema()
    found: dict[KeyPath, Problem] = {}
    for item in error.errors(include_url=False):
        path, node = _walk_schema(schema, item["loc"])
        if item["type"] == "missing" and isinstance(path[-1], int):
            path, node = _walk_schema(schema, path[:-1])
        found.setdefault(path, document.problem(path, _message(item, path, node, schema)))
    return list(found.values())


def _message(
    item: Mapping[str, Any], path: KeyPath, node: dict[str, Any], schema: dict[str, Any]
) -> str:
    match item["type"]:
        case "extra_forbidden":
            _, parent = _walk_schema(schema, path[:-1])
            return "unknown key" + nearest(str(path[-1]), parent.get("properties", {}))
        case "missing" if isinstance(item["loc"][-1], str):
            return f"required but missing, expected {node.get('description') or expected(node)}"
        case "value_error":
            return str(item["ctx"]["error"])
    value = item["input"]
    hint = (
        nearest(value, map(str, node["enum"])) if "enum" in node and isinstance(value, str) else ""
    )
    return f"got {show(value)}, expected {expected(node)}{hint}"


def _walk_schema(schema: dict[str, Any], loc: KeyPath) -> tuple[KeyPath, dict[str, Any]]:
    """Follow an error's location through the schema, as far as the schema knows it."""
    node = schema
    for depth, part in enumerate(loc):
        child = _child(schema, node, part)
        if child is None:
            return loc[:depth], node
        node = child
    return loc, node


def _child(schema: dict[str, Any], node: dict[str, Any], part: str | int) -> dict[str, Any] | None:
    """Return the schema of a member; an unknown key of a mapping takes anything."""
    node = _resolve(schema, node)
    for choice in node.get("anyOf", ()):
        if (child := _child(schema, choice, part)) is not None:
            return child
    if isinstance(part, str):
        properties = node.get("properties")
        child = None if properties is None else properties.get(part, {})
    else:
        members = node.get("prefixItems", ())
        child = members[part] if part < len(members) else node.get("items")
    return None if child is None else _resolve(schema, child)


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        target = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        return {**target, **{name: value for name, value in node.items() if name != "$ref"}}
    return node


_KINDS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "object": "a mapping",
    "null": "nothing",
}


def expected(node: Mapping[str, Any]) -> str:
    """Describe in words what a JSON schema node takes: `an integer of at least 1`."""
    if "enum" in node:
        *most, last = [str(value) for value in node["enum"]]
        return f"{', '.join(most)} or {last}" if most else last
    if "const" in node:
        return str(node["const"])
    if "$ref" in node:
        return "a mapping"
    if "anyOf" in node:
        return " or ".join(expected(choice) for choice in node["anyOf"])
    if node.get("type") == "array":
        return _expected_list(node)
    kind = _KINDS.get(node.get("type", ""), "another value")
    if node.get("minLength"):
        kind += " that is not empty"
    return kind + _expected_range(node)


def _expected_list(node: Mapping[str, Any]) -> str:
    if "prefixItems" in node:
        members = expected(node["prefixItems"][0]).split(" ", 1)[1]
        plural = re.sub(r"^\w+", r"\g<0>s", members)
        return f"a list of {len(node['prefixItems'])} {plural}"
    return "a list"


def _expected_range(node: Mapping[str, Any]) -> str:
    low, above, high = (node.get(k) for k in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and high is not None:
        return f" from {low:.10g} to {high:.10g}"
    if low is not None:
        return f" of at least {low:.10g}"
    if above is not None:
        return f" above {above:.10g}" + (f", at most {high:.10g}" if high is not None else "")
    return ""
