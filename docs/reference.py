"""Write what is generated: JSON schemas and reference tables of keys, and example scripts.

    python docs/reference.py            bring the files up to date
    python docs/reference.py --check    name those that are not, and exit 1

In a Markdown file only the text between `<!-- NAME: start -->` and `<!-- NAME: end -->` is ours.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from evmp.job import Job, job_schema, load_job
from evmp.model.spec import (
    ModelBoxes,
    ModelFile,
    ModelInput,
    ModelOutput,
    ModelText,
    package_schema,
)
from evmp.sbatch import Kind, script
from evmp.setting import Trait, expected, trait_of

ROOT = Path(__file__).resolve().parent.parent


LEGEND = """A key marked + is evmp's own; all others are EasyVision's, with its names and defaults.
Results depend on the keys marked =; a job that resumes must not differ in them.

"""


class MarkerError(Exception):
    """A Markdown file lacks the markers between which its table belongs."""


def job_table() -> str:
    """Return the reference of the job file, a heading and a table for each group of keys."""
    groups = groupby(_rows(Job, ""), key=lambda pair: pair[0].group)
    return LEGEND + "\n\n".join(
        f"**{group}**\n\n{_table([row for _, row in members])}" for group, members in groups
    )


def package_table() -> str:
    """Return the reference of model.yaml, nested keys under their dotted path."""
    parts: dict[str, type[BaseModel]] = {
        "": ModelFile,
        "input.": ModelInput,
        "output.": ModelOutput,
        "output.boxes.": ModelBoxes,
        "output.text.": ModelText,
    }
    return _table([row for prefix, model in parts.items() for _, row in _rows(model, prefix)])


def batch_script(kind: Kind, *overrides: str) -> str:
    """Return what `evmp sbatch` prints for the demo's job on four nodes."""
    settings = ["--config", "config/demo.yaml", *(f"-D{it}" for it in overrides)]
    job = load_job(ROOT / "config/demo.yaml", overrides)
    return script(job, kind, 4, settings=settings)


ON_CPUS = ("device=cpu", "cpuRequired=400")
GENERATED: dict[str, tuple[str, Callable[[], str]]] = {
    "evmp/job.schema.json": ("", lambda: _json(job_schema())),
    "evmp/model.schema.json": ("", lambda: _json(package_schema())),
    "README.md": ("parameters", job_table),
    "docs/model-package.md": ("keys", package_table),
    "config/slurm/array-gpu.sbatch": ("", lambda: batch_script("array")),
    "config/slurm/array-cpu.sbatch": ("", lambda: batch_script("array", *ON_CPUS)),
    "config/slurm/tasks-cpu.sbatch": ("", lambda: batch_script("tasks", *ON_CPUS)),
    "config/slurm/report.sbatch": ("", lambda: batch_script("report", *ON_CPUS)),
}
"""Each file, the name of its markers (none: the whole file is ours), and what belongs there."""


def renew(path: str, old: str) -> str:
    """Return the text that the file should hold, given what it holds now.

    Raises:
        MarkerError: a Markdown file has not one pair of markers, in order.
    """
    name, generate = GENERATED[path]
    if not name:
        return generate()
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    before, found_start, rest = old.partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise MarkerError(f"{path}: expected the lines {start} and {end}, in this order")
    return f"{before}{start}\n{generate()}\n{end}{after}"


def main(arguments: list[str]) -> int:
    """Bring the files up to date, or with --check only name those that are not."""
    check = "--check" in arguments
    failed = False
    for path in GENERATED:
        file = ROOT / path
        old = file.read_text("utf-8") if file.exists() else ""
        try:
            new = renew(path, old)
        except MarkerError as error:
            print(error)
            failed = True
            continue
        if new != old:
            print(f"{path}: {'out of date, run python docs/reference.py' if check else 'written'}")
            failed |= check
            if not check:
                file.write_text(new, "utf-8")
    return int(failed)


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[Trait, tuple[str, ...]]]:
    schema = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            continue
        trait = trait_of(field)
        default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
        text = field.description or ""
        if trait.comes_with:
            text += f"; *not in this version, comes with {trait.comes_with}*"
        mark = " +" if trait.own else ""
        mark += " =" if trait.changes_result else ""
        yield trait, (f"`{prefix}{name}`{mark}", _type(schema[name], trait), default, text)


def _type(node: dict[str, Any], trait: Trait) -> str:
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    kind = re.sub(r"\ban? ", "", expected(node)).replace(" that is not empty", "")
    if node.get("type") == "boolean":
        kind = "`true` or `false`"
    return f"{kind}, in {trait.unit}" if trait.unit else kind


def _yaml(default: Any) -> str:
    if default == () or default == "":
        return '""'
    if default == 1 / 255:
        return "1/255"
    return json.dumps(default)


def _table(rows: list[tuple[str, ...]]) -> str:
    head = [("Key", "Type", "Default", "What it is"), ("---",) * 4]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in head + rows
    )


def _json(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
