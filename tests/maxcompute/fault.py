"""What goes wrong, and when: the answer to a call is late, refused, torn, damaged or lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from random import Random
from threading import Lock


class Harm(Enum):
    """What happens to a body in transit."""

    CUT = "cut"
    """It ends early, and as if it were whole."""
    RESET = "reset"
    """The connection is reset in its midst."""
    FLIP = "flip"
    """One bit of it changes."""


@dataclass(slots=True)
class Fault:
    """One kind of trouble.

    Attributes:
        call: which calls it is about, such as `download.data`; see `server`.
        times: how many of them; the first ones after `skip` others.
        status, code: the error that is answered in the place of doing anything.
        harm: what happens to the answer's body after `after` bytes of it; to that of the request
            where a block is put.
        lost: the call is done, and the connection reset in the place of an answer.
        fewer: rows that are left out at the end of a range, which is whole in itself.
        seconds: how late the answer is.
    """

    call: str
    times: int = 1
    skip: int = 0
    status: int = 0
    code: str = "InternalServerError"
    harm: Harm | None = None
    after: int = 0
    lost: bool = False
    fewer: int = 0
    seconds: float = 0.0


KINDS: tuple[Callable[[str, int], Fault], ...] = (
    lambda call, after: Fault(call, status=500),
    lambda call, after: Fault(call, status=503),
    lambda call, after: Fault(call, status=429, code="FlowExceeded"),
    lambda call, after: Fault(call, lost=True),
    lambda call, after: Fault(call, seconds=0.05),
    lambda call, after: Fault(call, harm=Harm.CUT, after=after),
    lambda call, after: Fault(call, harm=Harm.RESET, after=after),
    lambda call, after: Fault(call, harm=Harm.FLIP, after=after),
)
HARMED = ("download.data", "upload.block")  # calls with bodies that are checked as they come


class Faults:
    """The troubles still to come. For any number of threads."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = Lock()
        self._random, self._share = Random(0), 0.0
        self.n_drawn = 0

    def rain(self, share: float, seed: int) -> None:
        """Let a share of all calls meet a trouble, drawn among those of every kind."""
        self._random, self._share = Random(seed), share

    def add(self, fault: Fault) -> None:
        """Let there be trouble."""
        with self._lock:
            self._faults.append(fault)

    def of(self, call: str) -> Fault:
        """Return what happens to this call; a Fault that does nothing where it goes well."""
        with self._lock:
            for fault in self._faults:
                if fault.call != call or fault.times == 0:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
            if self._random.random() < self._share:
                self.n_drawn += 1
                kinds = KINDS if call in HARMED else KINDS[:5]
                return self._random.choice(kinds)(call, self._random.randrange(20_000))
        return Fault(call)

    def left(self) -> int:
        """Return how many troubles have not come yet."""
        with self._lock:
            return sum(fault.times for fault in self._faults)
