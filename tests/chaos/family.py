"""The processes of a job that live now, and how to hit one of them and no other."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from fuzzing.killer import children

JOB: Final = "job"
HELPER: Final = "helper"  # looks at the input, or publishes; so does a worker in its first moment
NEWBORN: Final = "newborn"  # below a worker, and not named yet
STAGES: Final = ("reader", "decoder", "zygote", "predict", "writer")
ROLES: Final = (JOB, "worker", *STAGES, HELPER, NEWBORN)
FLEETING: Final = frozenset({HELPER, NEWBORN})  # there for moments only


class Member(NamedTuple):
    """A process of a job."""

    pid: int
    parent: int
    role: str


def members(job: int) -> list[Member]:
    """Return the processes of a job, a child of this process, that live now."""
    found = [Member(job, os.getpid(), JOB)]
    for member in found:  # grows
        with suppress(OSError):  # it may be gone already
            found += [Member(pid, member.pid, _role(pid, member)) for pid in children(member.pid)]
    return found


def _role(pid: int, parent: Member) -> str:
    """Return the role by the name that `ps` shows; before it has one, its parent's is there."""
    name = Path(f"/proc/{pid}/comm").read_text().rstrip()
    if not name.startswith("evmp "):
        return HELPER
    if parent.role != JOB and name == Path(f"/proc/{parent.pid}/comm").read_text().rstrip():
        return NEWBORN
    return name[len("evmp ") :].partition("[")[0]


def hit(member: Member, signum: int) -> bool:
    """Signal a process that lives and runs, and no other that has its number by now.

    Returns: whether it was there.
    """
    try:
        fd = os.pidfd_open(member.pid)
    except ProcessLookupError:
        return False
    try:
        stat = Path(f"/proc/{member.pid}/stat").read_text()
        state, parent, *_ = stat.rpartition(")")[2].split()
        is_there = state not in "ZX" and int(parent) == member.parent
        if not is_there or (state == "T" and signum != signal.SIGKILL):
            return False
        signal.pidfd_send_signal(fd, signum)
        return True
    except (FileNotFoundError, ProcessLookupError):
        return False
    finally:
        os.close(fd)
