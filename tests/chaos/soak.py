"""The long form of the chaos test: jobs of random shape until enough processes were killed.

    make soak CHAOS_ARGS="--kills 300 --state out/chaos.jsonl"

Each job appends a line to the state file; started again with the same file, the soak goes on behind
the last one. It ends at the first job that is in trouble, with what is known of it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter as Tally
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from chaos.family import ROLES
from chaos.hunter import SIGNALS
from chaos.task import OUTPUTS, Shape, Task
from chaos.trial import Account, Trial, Trouble

N_ROWS: Final = 4000
MAX_KILLS: Final = 30  # of one job


def main() -> None:
    """Soak, and say how it went."""
    options = _options()
    options.state.parent.mkdir(parents=True, exist_ok=True)
    jobs = _read(options.state)
    with tempfile.TemporaryDirectory(prefix="evmp-chaos-") as folder:
        task = Task(Path(folder), options.rows)
        while sum(job["kills"] for job in jobs) < options.kills:
            number = len(jobs)
            account = _one_job(task, options.seed, number)
            figures = {field.name: getattr(account, field.name) for field in fields(account)}
            jobs.append({"job": number, **figures})
            with open(options.state, "a") as file:
                file.write(json.dumps(jobs[-1]) + "\n")
            print(f"job {number}: {account}", flush=True)
    print(_table(jobs))


def _one_job(task: Task, seed: int, number: int) -> Account:
    chance = random.Random(f"{seed} {number}")
    shape = shape_of(chance, number)
    with tempfile.TemporaryDirectory(prefix="evmp-chaos-job-") as folder:
        trial = Trial(task, shape, Path(folder), seed=chance.getrandbits(32), max_kills=MAX_KILLS)
        try:
            return trial.run()
        except Trouble as trouble:
            sys.exit(f"job {number} of seed {seed} is in trouble: {trouble}")


def shape_of(chance: random.Random, number: int) -> Shape:
    """Return the shape of a job; the forms of output come by turns."""
    return Shape(
        form=[*OUTPUTS][number % len(OUTPUTS)],
        is_fresh=chance.random() < 0.3,
        n_decoders=chance.randint(1, 3),
        n_predictors=chance.randint(1, 2),
        batch_size=chance.choice([1, 4, 8, 17]),
        block_rows=chance.choice([30, 50, 120]),
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--rows", type=int, default=N_ROWS, help="of each job")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, default=Path("out/chaos.jsonl"))
    return parser.parse_args()


def _read(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in state.read_text().splitlines()] if state.exists() else []


def _table(jobs: list[dict[str, Any]]) -> str:
    hits, ends = Tally[str](), Tally[str]()
    for job in jobs:
        hits.update(job["hits"])
        ends.update(job["ends"])
    names = [signum.name for signum in SIGNALS]
    lines = [f"{'':<22}" + "".join(f"{name:>12}" for name in names)]
    for role in ROLES:
        cells = "".join(f"{hits[f'{role} {name}']:>12,}" for name in names)
        lines.append(f"{role:<22}{cells}")
    sums = {
        "jobs": len(jobs),
        "rows": sum(job["rows"] for job in jobs),
        "seconds": round(sum(job["seconds"] for job in jobs)),
        "kills": sum(job["kills"] for job in jobs),
        "starts": ends.total(),
        **{f"  {end}": n for end, n in ends.most_common()},
    }
    return "\n".join([*lines, *(f"{name:<22}{value:>12,}" for name, value in sums.items())])


if __name__ == "__main__":
    main()
