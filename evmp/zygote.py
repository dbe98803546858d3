"""The process that a worker's predictors are forked from, with what their model needs imported.

torch is imported once a worker, not once a predictor: its memory is shared, and a predictor that
has died is back without seconds of imports. The worker's own supervisor stays light all the same,
since this process supervises the predictors itself. It loads no model and touches no device, so
that a fork is as safe as anywhere; and a zygote that dies takes its predictors with it, see Post.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from evmp import logs, model
from evmp.metrics import Seat, State
from evmp.supervisor import Post, Supervisor

if TYPE_CHECKING:
    from evmp.model.package import ModelPackage

GRACE_SECONDS: Final = 0.25  # less than the worker grants


class Zygote:
    """A stage whose work is to keep the predictors alive.

    Args:
        package: the model that they run; None for code of the user's, which they import.
        posts: theirs.
        seat: this process's own.
        stall_seconds, progress: see Supervisor.
    """

    def __init__(
        self,
        package: ModelPackage | None,
        posts: Sequence[Post],
        seat: Seat,
        *,
        stall_seconds: float,
        progress: Callable[[], int],
    ) -> None:
        self._package, self._seat = package, seat
        self._supervisor = Supervisor(
            posts,
            stall_seconds=stall_seconds,
            progress=progress,
            tick=lambda: seat.enter(State.WAITING),
            grace_seconds=GRACE_SECONDS,
            emit=logs.say,
            signals=(),
        )

    def open(self) -> None:
        """Import what the model needs."""
        if self._package is not None:
            model.preload(self._package)
        gc.freeze()  # a collection in a predictor would copy the pages that it shares

    def run(self) -> None:
        """Fork the predictors, and keep them alive until they have finished."""
        self._supervisor.run()
