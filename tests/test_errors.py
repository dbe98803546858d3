from __future__ import annotations

import signal

import pytest

from evmp import errors
from evmp.errors import ConfigError, EvmpError, Interrupted, Problem


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("EvmpError", 70),
        ("TooManyFailures", 1),
        ("ConfigError", 2),
        ("SourceError", 3),
        ("SinkError", 3),
        ("ModelError", 3),
        ("WorkerDied", 4),
    ],
)
def test_every_error_has_its_exit_code(name: str, code: int) -> None:
    error = getattr(errors, name)("what happened")

    assert isinstance(error, EvmpError)
    assert error.exit_code == code
    assert str(error) == "what happened"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_job_exits_like_a_shell(signum: signal.Signals, code: int) -> None:
    assert Interrupted(signum).exit_code == code


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("empty", file="job.yaml"), "job.yaml: empty"),
        (Problem("got 0", "top_k", "job.yaml"), "job.yaml: top_k: got 0"),
        (Problem("got 0", "top_k", "job.yaml", 3), "job.yaml:3: top_k: got 0"),
        (Problem("got 0", "top_k", "-D"), "-Dtop_k: got 0"),
        (Problem("got 0", "top_k"), "top_k: got 0"),
    ],
)
def test_a_problem_says_where_it_is(problem: Problem, text: str) -> None:
    assert str(problem) == text


def test_a_config_error_keeps_every_problem() -> None:
    error = ConfigError("first", Problem("second", "top_k"))

    assert str(error) == "first\ntop_k: second"
    assert [problem.path for problem in error.problems] == ["", "top_k"]
