"""A job whose processes are killed, stopped and asked to go ends like any other; see `chaos`.

The long form is `make soak`.
"""

from __future__ import annotations

import random
from itertools import count
from pathlib import Path

import pytest
from chaos.task import Shape, Task
from chaos.trial import Trial

N_ROWS = 3000
N_KILLS = 8  # in each test


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(tmp_path_factory.mktemp("task"), N_ROWS)


def disturb(task: Task, shape: Shape, folder: Path, n_kills: int) -> None:
    """Run jobs until so many processes were killed, one if all goes well."""
    kills = 0
    for number in count():
        place = folder / str(number)
        place.mkdir()
        seed = random.Random(f"{shape} {number}").getrandbits(32)
        account = Trial(task, shape, place, seed=seed, max_kills=n_kills - kills).run()
        print(account)
        kills += account.kills
        if kills >= n_kills:
            return


@pytest.mark.parametrize("form", ["lines", "table"])
def test_killed_job_ends_with_the_same_bytes(task: Task, tmp_path: Path, form: str) -> None:
    disturb(task, Shape(form), tmp_path, N_KILLS)


@pytest.mark.slow
@pytest.mark.parametrize("is_fresh", [False, True])
@pytest.mark.parametrize("form", ["lines", "table", "text", "parquet"])
def test_killed_job_of_any_form_ends_with_the_same_bytes(
    task: Task, tmp_path: Path, form: str, is_fresh: bool
) -> None:
    disturb(task, Shape(form, is_fresh, n_decoders=3, n_predictors=2), tmp_path, 3 * N_KILLS)
