"""Children of the test process itself, for tests of what processes share."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def fork(work: Callable[[], int | None]) -> int:
    """Call `work` in a forked child, which then exits. Returns its process id.

    The exit code is what `work` returns, 0 for None, or 99 where it raises.
    """
    pid = os.fork()
    if pid == 0:
        code: int | None = 99
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code or 0)
    return pid


def wait(pid: int) -> int:
    """Wait for a child. Returns its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
