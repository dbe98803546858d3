"""Every exception evmp raises on purpose, and the exit code of each.

    EvmpError (70)
    ├── ConfigError (2)       the job file, model.yaml or the command line
    ├── SourceError (3)       the input cannot be opened or read
    ├── SinkError (3)         the output cannot be written or published
    ├── ModelError (3)        the model package is missing, damaged or unfit
    ├── CredentialsError (3)  nobody says who asks the cloud, or he may not
    ├── TooManyFailures (1)   more rows failed than `max_error_fraction` allows
    ├── WorkerDied (4)        a stage kept dying
    ├── Interrupted (130/143) stopped by SIGINT or SIGTERM
    ├── DecodeError           one row's image or text; becomes its result, never the job's end
    ├── DownloadError         one row's file on another machine; likewise
    │   └── MissingError      there is no such file
    └── CustomCodeError       what users' code does wrong with a row; likewise

A bad record is data, a bad job is an exception. Messages are lower case and say what, where, got,
expected and the remedy. Anything else that escapes is a bug in evmp and exits with 70.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass


class EvmpError(Exception):
    """Root of the tree; raised itself only for what should be impossible."""

    exit_code = 70


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a job file, a model.yaml or a command line."""

    message: str
    path: str = ""
    """The key it is about, such as `batch_size` or `input.mean[1]`."""
    file: str = ""
    """The file as the user named it, or `-D` for a key given on the command line."""
    line: int | None = None
    """The line of the key in the file, counted from 1."""

    def __str__(self) -> str:
        if self.file == "-D":
            return f"-D{self.path}: {self.message}"
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.path, self.message) if part)


class ConfigError(EvmpError):
    """What the user wrote cannot be run; lists every problem, one a line."""

    exit_code = 2

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(
            Problem(problem) if isinstance(problem, str) else problem for problem in problems
        )
        super().__init__("\n".join(str(problem) for problem in self.problems))


class SourceError(EvmpError):
    """The input cannot be opened or read."""

    exit_code = 3


class SinkError(EvmpError):
    """The output cannot be created, written or published."""

    exit_code = 3


class ModelError(EvmpError):
    """The model package is missing, damaged or does not fit the job."""

    exit_code = 3


class CredentialsError(EvmpError):
    """There are no credentials for the cloud, or the role that they shall assume is refused."""

    exit_code = 3


class TooManyFailures(EvmpError):
    """More rows failed than `max_error_fraction` allows, or all of them."""

    exit_code = 1


class WorkerDied(EvmpError):
    """A stage kept dying and the job made no progress."""

    exit_code = 4


class Interrupted(EvmpError):
    """A signal stopped the job; what was committed is kept and the job can be resumed."""

    def __init__(self, signum: int, where: str = "what was committed is kept") -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}, {where}; run the same command again to go on")
        self.signum, self._where = signum, where
        self.exit_code = 128 + signum

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, str]]:
        return Interrupted, (self.signum, self._where)


class DecodeError(EvmpError):
    """One row's payload is not an image; the message becomes the row's `error_msg`."""


class DownloadError(EvmpError):
    """One row's file cannot be fetched; likewise."""


class MissingError(DownloadError):
    """There is no such file."""


class CustomCodeError(EvmpError):
    """User code has failed on a row, or made of it what cannot be written; likewise."""
