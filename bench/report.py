"""Turn what the benchmarks have written with --json into bench/README.md.

python bench/report.py out/bench > bench/README.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

INTRODUCTION = """\
# Benchmarks

`make bench` runs them all and writes this file; `make bench ARGS=--quick` only tries them. Each
script says on its top what it measures and how, takes `--json FILE`, and runs its baselines and
peers in the same run, in turns. LIMITS.md tells what the figures mean.
"""
TITLES = {
    "pipeline": "The pipeline against its peers",
    "gpu": "On a GPU",
    "decode": "A JPEG to a row",
    "resize": "Resize and normalise",
    "base64": "Base64",
    "ring": "From process to process",
    "start": "Start",
    "cloud": "Rows from elsewhere",
    "video": "Videos",
    "cluster": "Many workers",
    "ledger": "Exactly once: what commits cost",
}
WORKS = {
    "w1": "W1: Base64, JPEG, antialiased resize to 224 x 224, normalise, consume",
    "w2": "W2: the same through a TorchScript network of ResNet-18's size, results written",
}
PEERS = """\
All peers decode by simplejpeg and pybase64. They resize by torch's antialias, the fastest that does
not alias; "threads (cv2)" does by cv2's INTER_AREA. evmp runs as the whole command, and writes and
publishes a result for each row in W1, too; its W1 has a stand-in for the network that normalises,
looks at a few pixels and needs no torch. *whole* is the short table from start to end of the
process, *steady* what the long table has more over the time that it takes more: median, least and
greatest of all rounds. Memory is the highest sum of the PSS of all processes, short / long table.
"""


def document_of(result: dict[str, Any]) -> str:
    """Return the section of one bench."""
    facts = result["machine"]
    machine = f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}, Python {facts['python']}"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    head = f"## {TITLES[result['bench']]}\n\n`bench/bench_{result['bench']}.py`"
    about = f"{head} on {machine}; {versions}.\n"
    body: Callable[[dict[str, Any]], str] = {
        "pipeline": works,
        "gpu": tables,
        "start": tables,
        "ledger": tables,
        "cloud": tables,
        "video": tables,
        "cluster": tables,
    }.get(result["bench"], kernels)
    return f"{about}\n{body(result)}"


def kernels(result: dict[str, Any]) -> str:
    """Return the table of a bench that has used harness.Bench."""
    rows = [
        [
            row["size"],
            row["case"],
            f"{row['median_us']:.1f}",
            f"{row['p95_us']:.1f}",
            f"{row['rate']:,.0f} {row['unit']}",
            f"{row['ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    table = markdown(["size", "case", "median, us", "p95, us", "rate", "ratio"], rows)
    return "\n".join([table, tables(result)]) if result.get("tables") else table


def tables(result: dict[str, Any]) -> str:
    """Return the tables whose rows name their columns."""
    parts = []
    for name, rows in result["tables"].items():
        cells = [[_cell(value) for value in row.values()] for row in rows]
        parts.append(f"{name}:\n\n{markdown(list(rows[0]), cells)}")
    return "\n".join(parts)


def works(result: dict[str, Any]) -> str:
    """Return the tables of the pipeline."""
    parts = [PEERS]
    for work, figures in result["works"].items():
        columns = ["", "whole, rows/s", "steady, rows/s", "rows/CPU-s", "first row", "peak, MB"]
        rows = [contestant(row) for row in figures["rows"]]
        short, long = figures["sizes"]
        title = f"{WORKS[work]}; {short:,} and {long:,} rows, {figures['rounds']} rounds."
        parts.append(f"{title}\n\n{markdown(columns, rows)}\n{bound(figures)}")
    return "\n".join(parts)


def contestant(row: dict[str, Any]) -> list[str]:
    """Return the cells of one contestant."""
    if "steady" not in row:
        return [row["name"], f"failed: {row['failure'][:100]}", "", "", "", ""]
    peaks = " / ".join(f"{size:.0f}" for size in row.get("peak_mb", []))
    first = row["first_row"]["median"]
    return [
        f"**{row['name']}**" if row["name"] == "evmp" else row["name"],
        _spread(row["whole"]),
        _spread(row["steady"]),
        f"{row['per_cpu']['median']:.1f}",
        f"{first:.2f} s" if first else "",
        peaks,
    ]


def bound(figures: dict[str, Any]) -> str:
    """Say how near evmp comes to what its own CPU time allows."""
    if not figures["bound"]:
        return ""
    limit = figures["bound"]["rows_per_second"]
    stages = figures["bound"]["us_per_row"].items()
    text = ", ".join(f"{stage} {us:.0f}" for stage, us in stages)
    ours = next((row for row in figures["rows"] if row["name"] == "evmp"), {})
    share = f"; evmp reaches {ours['steady']['median'] / limit:.0%}" if "steady" in ours else ""
    return (
        f"evmp's own CPU time a row, each stage alone, in us: {text}. On "
        f"{figures['bound']['cores']} cores that bounds it to {limit:.0f} rows/s{share}.\n"
    )


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.1f} ({values['min']:.1f} to {values['max']:.1f})"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
    return str(value)


def main(folder: str) -> None:
    """Print the document."""
    results = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    order = list(TITLES)
    results.sort(key=lambda result: order.index(result["bench"]))
    print("\n".join([INTRODUCTION, *map(document_of, results)]), end="")


if __name__ == "__main__":
    main(sys.argv[1])
