"""Statements that make tables and partitions, as SQL jobs run them: what a job says, what it does.

Only the forms that pyodps writes are understood; any other is refused as the service refuses what
it cannot parse.
"""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

from odps.types import validate_data_type

from maxcompute.signature import Refused
from maxcompute.store import Data, Table

NAME = r"(?P<project>\w+)\.`(?P<table>\w+)`"
CREATE = re.compile(
    rf"CREATE TABLE (?P<exists>IF NOT EXISTS )?{NAME} \( (?P<columns>.*?) \)"
    r"( PARTITIONED BY \( (?P<keys>.*?) \))?( LIFECYCLE (?P<days>\d+))?;?"
)
ADD = re.compile(
    rf"ALTER TABLE {NAME} ADD (?P<exists>IF NOT EXISTS )?PARTITION \((?P<values>.*)\);?"
)
COLUMN = re.compile(r"`(?P<name>\w+)` (?P<type>.+)")
OLD_TYPES = re.compile(r"bigint|double|string|boolean|datetime|decimal|(array|map)<.*")


class Failed(Exception):
    """A statement that fails, with what its job then has as its result."""


def statement_of(body: bytes) -> tuple[str, dict[str, str]]:
    """Return the statement that a job is to run, on one line, and its settings."""
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise Refused(400, "MalformedXML", str(error)) from None
    query = root.findtext("./Job/Tasks/SQL/Query")
    if query is None:
        raise Refused(400, "InvalidArgument", "The job has no SQL task.")
    settings: dict[str, str] = {}
    for found in root.iterfind("./Job/Tasks/SQL/Config/Property"):
        if found.findtext("Name") == "settings":
            settings = json.loads(found.findtext("Value") or "{}")
    return " ".join(query.split()), settings


def run(statement: str, settings: dict[str, str], project: str, tables: dict[str, Table]) -> None:
    """Do what a statement says.

    Raises:
        Failed: when it is none, or cannot be done.
    """
    create, add = CREATE.fullmatch(statement), ADD.fullmatch(statement)
    match = create or add
    if match is None:
        raise Failed(f"FAILED: ODPS-0130161:[1,1] Parse exception - {statement!r}")
    if match["project"] != project:
        raise Failed(f"FAILED: ODPS-0420111: Project not found - '{match['project']}'")
    table = tables.get(match["table"].lower())
    if create:
        if table is None:
            tables[match["table"].lower()] = _created(create, settings)
        elif not create["exists"]:
            raise Failed("FAILED: ODPS-0130131:[1,1] Table or view already exists")
        return
    if table is None:
        raise Failed(f"FAILED: ODPS-0130131:[1,1] Table not found - {match['table']}")
    values = dict(re.findall(r"(\w+)='((?:[^'\\]|\\.)*)'", match["values"]))
    if tuple(values) != table.keys:
        raise Failed(f"FAILED: ODPS-0130071:[1,1] Semantic analysis exception - {values}")
    spec = ",".join(f"{name}={value}" for name, value in values.items())
    if spec not in table.partitions:
        table.partitions[spec] = Data(table.schema.empty_table())
    elif not match["exists"]:
        raise Failed("FAILED: ODPS-0110061: Failed to run ddltask - AlreadyExistsException")


def _created(match: re.Match[str], settings: dict[str, str]) -> Table:
    types = _columns(match["columns"])
    if settings.get("odps.sql.type.system.odps2") != "true":
        new = [kind for kind in types.values() if not OLD_TYPES.fullmatch(kind)]
        if new:
            raise Failed(
                f"FAILED: ODPS-0130071:[1,1] Semantic analysis exception - {new[0]} type is not "
                "enabled in current mode; set odps.sql.type.system.odps2=true to use it"
            )
    for name, kind in types.items():
        try:
            validate_data_type(kind)
        except ValueError as error:
            raise Failed(f"FAILED: ODPS-0130161:[1,1] Parse exception - {name}: {error}") from None
    table = Table(
        match["table"].lower(),
        types,
        tuple(_columns(match["keys"] or "")),
        lifecycle=int(match["days"] or -1),
    )
    if not table.keys:
        table.put(table.schema.empty_table())
    return table


def _columns(text: str) -> dict[str, str]:
    columns: dict[str, str] = {}
    for column in filter(None, re.split(r", (?=`)", text.lower())):
        match = COLUMN.fullmatch(column)
        if match is None or match["name"] in columns:
            raise Failed(f"FAILED: ODPS-0130161:[1,1] Parse exception - {column!r}")
        columns[match["name"]] = match["type"]
    return columns
