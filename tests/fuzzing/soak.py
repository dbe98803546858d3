"""The long form of the crash fuzz: rounds of random shape until enough rows and deaths are seen.

    make soak ARGS="--rows 1000000 --deaths 20000 --state out/soak.jsonl"

Each round appends a line to the state file; started again with the same file, the soak goes on
behind the last one. It ends at the first round that is not clean, with that round's log.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from evmp.ring import MAX_ATTEMPTS
from fuzzing.run import fuzz
from fuzzing.scenario import Scenario, Verdict
from fuzzing.world import World

ROLES: Final = ("reader", "decoder", "zygote", "predictor", "writer", "worker")
SUMS: Final = ("rows", "seconds", "requeued", "stops", "given_up", "poison")
FAULTS: Final = ("lost", "doubled", "wrong", "moved", "crashes")


def main() -> None:
    """Soak, and say how it went."""
    options = _options()
    options.state.parent.mkdir(parents=True, exist_ok=True)
    rounds = _read(options.state)
    while not _is_enough(rounds, options):
        number = len(rounds)
        scenario = scenario_of(options.seed, number)
        with tempfile.TemporaryDirectory(prefix="evmp-soak-") as folder:
            verdict = fuzz(scenario, Path(folder, "out.evmp"))
        rounds.append(_record(number, scenario, verdict))
        with open(options.state, "a") as file:
            file.write(json.dumps(rounds[-1]) + "\n")
        print(f"round {number}: {verdict}", flush=True)
        if not verdict.is_clean or _is_unjust(scenario, verdict):
            sys.exit(f"round {number} of seed {options.seed} is not clean: {scenario}")
    print(_table(rounds))


def scenario_of(seed: int, number: int) -> Scenario:
    """Return the scenario of a round; it follows from the seed and the round's number."""
    chance = random.Random(f"{seed} {number}")
    shape = Scenario(
        n_rows=20_000,
        seed=chance.getrandbits(32),
        n_decoders=chance.randint(1, 5),
        n_predictors=chance.randint(1, 3),
        n_payloads=chance.choice([2, 3, 8, 32]),
        n_batches=chance.randint(2, 6),
        batch_rows=chance.choice([1, 2, 4, 7, 16, 64, 65]),
        block_rows=chance.choice([64, 256, 1000]),
        patience_seconds=15.0,
    )
    scenario = chance.choice([_signals, _signals, _signals, _steps, _steps, _lines, _all])(shape)
    if number % 5 == 4:
        return _poison(scenario, chance)
    return scenario


def _is_unjust(scenario: Scenario, verdict: Verdict) -> bool:
    """Tell whether a row was given up that so many deaths cannot have been the fault of."""
    return scenario.max_attempts > MAX_ATTEMPTS and bool(verdict.given_up)


def _signals(shape: Scenario) -> Scenario:
    return replace(shape, kill_seconds=0.008, worker_share=0.01)


def _steps(shape: Scenario) -> Scenario:
    return replace(shape, steps=500)


def _lines(shape: Scenario) -> Scenario:
    return replace(shape, n_rows=3000, lines=5000)


def _all(shape: Scenario) -> Scenario:
    return replace(
        shape,
        n_rows=5000,
        lines=20_000,
        steps=1000,
        kill_seconds=0.02,
        worker_share=0.01,
        stop_rows=1000,
    )


def _poison(scenario: Scenario, chance: random.Random) -> Scenario:
    """Add rows that kill, as often as production lets them."""
    rows = [chance.randrange(scenario.n_rows) for _ in range(6)]
    world = World(segfaults=frozenset(rows[:3]), aborts=frozenset(rows[3:]))
    return replace(scenario, world=world, max_attempts=MAX_ATTEMPTS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--deaths", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, default=Path("out/soak.jsonl"))
    return parser.parse_args()


def _read(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in state.read_text().splitlines()] if state.exists() else []


def _is_enough(rounds: list[dict[str, Any]], options: argparse.Namespace) -> bool:
    rows: int = sum(r["rows"] for r in rounds)
    return bool(rows >= options.rows and _deaths(rounds).total() >= options.deaths)


def _deaths(rounds: list[dict[str, Any]]) -> Counter[str]:
    return sum((Counter(r["deaths"]) for r in rounds), Counter[str]())


def _record(number: int, scenario: Scenario, verdict: Verdict) -> dict[str, Any]:
    world = scenario.world
    return {
        "round": number,
        "rows": verdict.rows,
        "seconds": round(verdict.seconds, 1),
        "deaths": verdict.deaths,
        "requeued": verdict.requeued,
        "stops": verdict.stops,
        "given_up": len(verdict.given_up),
        "poison": len(verdict.given_up.keys() & (world.segfaults | world.aborts)),
        **{name: getattr(verdict, name) for name in FAULTS},
        "error": verdict.error,
    }


def _table(rounds: list[dict[str, Any]]) -> str:
    deaths = _deaths(rounds)
    total = Counter[str]()
    for r in rounds:
        total.update({name: r[name] for name in (*SUMS, *FAULTS)})
    cells = {
        "rounds": len(rounds),
        "rows": total["rows"],
        "seconds": round(total["seconds"]),
        "deaths": deaths.total(),
        **{f"  of {role}s": deaths[role] for role in ROLES},
        "batches requeued": total["requeued"],
        "stops of the job": total["stops"],
        "poison rows given up": total["poison"],
        "other rows given up": total["given_up"] - total["poison"],
        **{f"rows {name}" if name != "crashes" else name: total[name] for name in FAULTS},
    }
    return "\n".join(f"{name:<22}{value:>12,}" for name, value in cells.items())


if __name__ == "__main__":
    main()
