"""The C kernels. Buffers are C-contiguous; the GIL is released while a kernel runs."""

from os import PathLike
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar, final

from numpy.typing import NDArray
from typing_extensions import Buffer

# Before Python 3.12 numpy does not tell the type checker that its arrays are buffers.
_AnyBuffer: TypeAlias = Buffer | NDArray[Any]

class Base64Error(ValueError):
    """Text that is not strict Base64; `position` is the index of the fault in it."""

    position: int

def base64_decode(
    src: str | _AnyBuffer, dst: _AnyBuffer, *, url: bool = False, whitespace: bool = False
) -> int:
    """Decode Base64 text into a writable buffer, which it must not overlap.

    Args:
        src: text as an encoder writes it (RFC 4648): padded, in one piece.
        dst: at least as long as the decoded bytes; nothing is written behind them.
        url: expect `-` and `_` in the place of `+` and `/`.
        whitespace: skip space, tab, LF, FF and CR anywhere.

    Returns: the bytes written.

    Raises:
        Base64Error: the text is anything else; `dst` then holds whatever it holds.
        ValueError: `dst` is too small.
    """

def resize(
    src: _AnyBuffer,
    src_height: int,
    src_width: int,
    dst: _AnyBuffer,
    dst_height: int,
    dst_width: int,
    *,
    box: tuple[float, float, float, float] | None = None,
    into: tuple[int, int, int, int] | None = None,
    fill: tuple[int, int, int] = (0, 0, 0),
    filter: Literal["bilinear", "bicubic"] = "bilinear",
    swap: bool = False,
) -> None:
    """Resize a box of an image, antialiased, into a rectangle of another, and fill its rest.

    Args:
        src: (src_height, src_width, 3) uint8 RGB.
        dst: (dst_height, dst_width, 3) uint8, writable; all of it is written. No part of `src`.
        box: (left, top, right, bottom) in source pixels, fractions allowed; None: all of it. As
            with Pillow, pixels outside the box weigh in where the filter reaches over its edge.
        into: (left, top, width, height) in pixels of `dst`; None: all of it.
        fill: red, green, blue of what is not in `into`.
        filter: "bilinear" as Pillow's BILINEAR, within one grey level, or "bicubic" as its BICUBIC
            (a = -0.5), within one but at hard edges, where Pillow clips between its two passes.
        swap: write blue, green, red.

    Raises:
        ValueError: a size, the box or the rectangle does not fit.
    """

def normalize(
    src: _AnyBuffer,
    dst: _AnyBuffer,
    height: int,
    width: int,
    *,
    scale: tuple[float, float, float],
    bias: tuple[float, float, float],
) -> None:
    """Write `src * scale + bias`, per channel, as a network takes it.

    Args:
        src: (N, height, width, 3) uint8.
        dst: (N, 3, height, width) float32, writable.
        scale: 1 / (255 * std) of each channel.
        bias: -mean / std of each channel.

    Raises:
        ValueError: a size does not fit.
    """

def simd_levels() -> tuple[str, ...]:
    """Return the instruction sets that this CPU has kernels for, from slow to fast."""

def simd_level() -> str:
    """Return the one in use, at first the fastest."""

def set_simd_level(name: str) -> None:
    """Use another one, for tests and benchmarks. The results are the same bytes."""

def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when its parent thread dies."""

def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies."""

def exchange(one: str | PathLike[str], other: str | PathLike[str], /) -> None:
    """Have two paths change places in one step.

    Raises:
        OSError: with EINVAL or ENOSYS where the file system or the kernel cannot do it.
    """

def keep_memory() -> None:
    """Have malloc keep what is freed for the next allocation, however large."""

def set_process_name(name: str, /) -> None:
    """Set what `ps -o comm` and `top` show; the first 15 bytes count."""

def set_fault(reciprocal: int, seed: int, /) -> None:
    """Test hook: die between two steps of the ring's protocol, with a chance of 1 in this."""

TIMEOUT: Final[int]
DRAINED: Final[int]
STOPPED: Final[int]

_Header = TypeVar("_Header", bound=tuple[int, ...])

@final
class Ring(Generic[_Header]):
    """One hop of the pipeline in shared memory; the protocol is told in csrc/ring.h.

    Views are of the ring's memory: what they show is the row's until its release.
    """

    n_slots: Final[int]
    n_rows: Final[int]
    row_bytes: Final[int]
    payload_start: Final[int]

    @property
    def cursor(self) -> int:
        """The lowest unreleased batch."""

    @property
    def backlog(self) -> int:
        """Complete or claimed batches, approximately."""

    @property
    def end(self) -> int | None:
        """Rows in all, or None until closed."""

    def __new__(cls, memory: _AnyBuffer, header: type[_Header], /) -> Ring[_Header]: ...
    @staticmethod
    def measure(n_slots: int, n_rows: int, row_bytes: int, /) -> int:
        """Return the bytes of memory that such a ring takes."""

    @staticmethod
    def format(memory: _AnyBuffer, n_slots: int, n_rows: int, row_bytes: int, /) -> None:
        """Lay out an empty ring in zeroed, page-aligned memory."""

    def is_open(self, n: int, /) -> bool:
        """Return whether the place of row n is free for it."""

    def is_done(self, n: int, /) -> bool:
        """Return whether row n is committed, or already released."""

    def wait_open(self, n: int, timeout: float, /) -> int:
        """Wait up to `timeout` seconds for is_open(n). Returns 0, TIMEOUT or STOPPED."""

    def commit(self, n: int, /) -> None:
        """Publish row n, whose header and payload are written. Idempotent.

        Raises:
            RuntimeError: row n has no place in the ring now.
        """

    def header(self, n: int, /) -> _Header:
        """Return the header of row n."""

    def set_header(self, n: int, header: _Header, /) -> None:
        """Write the header of row n; its note stays."""

    def payload(self, n: int, /) -> memoryview:
        """Return the payload of row n: row_bytes writable bytes."""

    def note(self, n: int, /) -> memoryview:
        """Return what set_note has left for row n."""

    def set_note(self, n: int, note: _AnyBuffer, /) -> None:
        """Leave `note`, at most row_bytes long, at the start of the payload of row n."""

    def data(self, n: int, /) -> memoryview:
        """Return the data of row n, without the note."""

    def room(self, n: int, /) -> int:
        """Return how many bytes of data row n has room for."""

    def used(self, n: int, /) -> int:
        """Return how many bytes the note and the data of row n take."""

    def put(self, n: int, header: _Header, data: _AnyBuffer, /) -> None:
        """Write and commit row n: its header, with the length of `data`, and them after the note.

        Raises:
            RuntimeError: row n has no place in the ring now.
            ValueError: the data have no room.
        """

    def claim(self, seat: int, ordered: bool, timeout: float, /) -> int:
        """Take the oldest complete batch, with `ordered` only the oldest of all.

        Returns: its sequence number, or TIMEOUT, DRAINED or STOPPED, which are negative.
        """

    def release(self, seq: int, seat: int, /) -> None:
        """Give the slot of batch `seq`, held by `seat`, to the next lap."""

    def reopen(self, seq: int, seat: int, attempt: int, /) -> None:
        """Hand batch `seq` of the dead `seat` to the next claimer; for the supervisor."""

    def peek(self, seq: int, /) -> tuple[int, int, int, bool]:
        """Return (seq, seat, attempt, is_claimed) of the slot that batch `seq` lives in."""

    def close(self, end: int, /) -> None:
        """Say that there are `end` rows, a multiple of n_rows."""

    def stop(self) -> None:
        """Make every waiting call return STOPPED, now and later."""

    def wake(self) -> None:
        """Wake every sleeper, after a recovery."""
