"""Where this process's log lines go.

Stages and workers log to their stderr, a pipe that the parent reads and names; the job process logs
past its progress display. INFO is for the life of processes, not for rows.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable


def say(line: str) -> None:
    """Print a line to stderr. One that nobody reads any more is lost; the job goes on."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)


def to_stderr(level: int = logging.INFO) -> None:
    """Log to stderr from now on, from `level` on."""
    _set_handler(logging.StreamHandler(), level)


def send_to(emit: Callable[[str], None], level: int = logging.INFO) -> None:
    """Log by calling `emit` with each line from `level` on, from now on."""
    _set_handler(_Sender(emit), level)


class _Sender(logging.Handler):
    def __init__(self, send: Callable[[str], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(self.format(record))


class _Formatter(logging.Formatter):
    """The level in words in front of a warning or worse; nothing in front of the rest."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def _set_handler(handler: logging.Handler, level: int) -> None:
    handler.setFormatter(_Formatter("%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
