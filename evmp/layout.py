"""How large a worker is: how many processes of each kind it has, and how large its rings are.

Settled once, when the job is planned, and checked against the memory that there is. A ring's rows
take address space for the largest that may come, and memory only for those that do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from evmp import machine
from evmp.errors import ConfigError
from evmp.placement import gpus_of, uses_gpu
from evmp.rule import TEAM, has_custom_code

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.model.package import ModelPackage

TYPICAL_PAYLOAD_BYTES: Final = 256 << 10  # memory of a payload slot that is faulted in at start
TYPICAL_SAMPLE_BYTES: Final = 3 << 20  # of a sample: a picture of a million pixels
TYPICAL_RESULT_BYTES: Final = 16 << 10
TYPICAL_FRAME_PIXELS: Final = 1 << 20
AHEAD_BYTES: Final = 256 << 20  # of frames that decoders may be ahead with
MAX_PLAN_BYTES: Final = 64 << 20  # of a segment: when each of its frames is shown
SPARE_SEGMENTS: Final = 4
SPARE_RESULT_BYTES: Final = 1 << 20  # what a model says of a small image need not be small
# Memory of a process's own, somewhat less than was measured (bench/bench_start.py): of a light
# stage, of torch, once for all predictors, and of a predictor without the weights.
STAGE_BYTES: Final = 15 << 20
TORCH_BYTES: Final = 200 << 20
PREDICTOR_BYTES: Final = 40 << 20
MAX_SEATS: Final = 250
MAX_ADDRESS_BYTES: Final = 1 << 45  # of the 2^47 that a process has on most machines


@dataclass(frozen=True, slots=True)
class Hop:
    """A ring of a worker, before it is made.

    Attributes:
        n_batches: that fit at once.
        batch_rows: rows of a batch.
        row_bytes: address space of a row.
        usual_bytes: memory that a row usually takes.
    """

    name: str
    n_batches: int
    batch_rows: int
    row_bytes: int
    usual_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How many processes a worker has, and how large its rings are. Counts are per worker.

    Attributes:
        n_scouts, n_decoders, n_predictors: processes.
        n_processes: of each link of `user_process_config`.
        hops: the rings, in the order of the flow.
        own_bytes: memory that a predictor takes at least, the others being small.
        has_keeper: whether the worker takes any block, and a process of it keeps the leases.
    """

    n_scouts: int
    n_decoders: int
    n_processes: tuple[int, ...]
    n_predictors: int
    hops: tuple[Hop, ...]
    own_bytes: int
    has_keeper: bool = False

    @property
    def roles(self) -> list[str]:
        """The seats of a worker, in order."""
        scouts = ["scout"] * self.n_scouts
        decoders = ["decoder"] * self.n_decoders
        processes = ["process"] * sum(self.n_processes)
        predictors = ["predictor"] * self.n_predictors
        keeper = ["keeper"] * self.has_keeper
        before = ["worker", *keeper, "reader", *scouts, *decoders]
        return [*before, *processes, "zygote", *predictors, "writer"]

    @property
    def batch_rows(self) -> int:
        """Rows that a predictor gets at once."""
        return self.hops[-1].batch_rows

    @property
    def memory_bytes(self) -> int:
        """Shared memory that the worker's rings usually take."""
        return sum(hop.n_batches * hop.batch_rows * hop.usual_bytes for hop in self.hops)

    @property
    def process_bytes(self) -> int:
        """Memory that the worker's processes have at least of their own."""
        n_light = 3 + self.n_scouts + self.n_decoders + sum(self.n_processes)
        return n_light * STAGE_BYTES + TORCH_BYTES + self.n_predictors * self.own_bytes

    @property
    def address_bytes(self) -> int:
        """Address space that the worker's rings take; most of it is never touched."""
        return sum(hop.n_batches * hop.batch_rows * hop.row_bytes for hop in self.hops)

    def holding(self, n_rows: int) -> Layout:
        """Return the same with rings that hold so many rows, though no stage took any off."""
        whole = math.lcm(*(hop.batch_rows for hop in self.hops))
        n_rows = (n_rows // whole + 1) * whole
        hops = (
            replace(hop, n_batches=max(hop.n_batches, n_rows // hop.batch_rows))
            for hop in self.hops
        )
        return replace(self, hops=tuple(hops))


def plan_layout(job: Job, package: ModelPackage | None) -> Layout:
    """Size a worker.

    Args:
        package: the model's; None where the user's predictor opens it.

    Raises:
        ConfigError: when it would have too many processes, or not fit into memory.
    """
    n_decoders = job.preprocess_thread_num
    n_processes = tuple(process.num_threads for process in job.user_process_config)
    n_predictors, n_in_flight = job.predict_thread_num, 1
    if uses_gpu(job):
        n_predictors, n_in_flight = len(gpus_of(job, 0)) or 1, job.predict_thread_num
    if n_decoders + sum(n_processes) + n_predictors > MAX_SEATS:
        processes = f", {sum(n_processes)} processes of your own" if n_processes else ""
        raise ConfigError(
            f"a worker of {n_decoders} decoders{processes} and {n_predictors} predictors has too "
            f"many processes, expected at most {MAX_SEATS}; raise num_worker instead"
        )
    layout = Layout(
        n_scouts=int(job.is_input_video),
        n_decoders=n_decoders,
        n_processes=n_processes,
        n_predictors=n_predictors,
        hops=_hops(job, package, n_predictors, n_in_flight),
        own_bytes=PREDICTOR_BYTES + _size(package.files if package else ()),
        has_keeper=job.enableDynamicCluster,
    )
    _check_memory(job, layout)
    return layout


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def uses_samples(job: Job) -> bool:
    """Return whether whole samples pass through the worker, and not the model's input."""
    return has_custom_code(job) or job.model_type == TEAM


def _hops(
    job: Job, package: ModelPackage | None, n_predictors: int, n_in_flight: int
) -> tuple[Hop, ...]:
    """Size the rings. Each is named after what it holds."""
    n_decoders, queue = job.preprocess_thread_num, job.queue_size
    hops = _video_hops(job) if job.is_input_video else [_payload_hop(job)]
    if package is not None and not uses_samples(job):
        spec, batch = package.input, job.batch_size
        n_held = n_decoders + _n_downloads(job)
        wanted = (n_in_flight + 1) * n_predictors + 2 + -(-n_held // batch) + 32 // batch
        pixel_bytes = spec.height * spec.width * 3
        wanted = _roomy(job, wanted, batch, pixel_bytes)
        hops.append(Hop("pixels", min(queue // batch, wanted), batch, pixel_bytes, pixel_bytes))
    else:
        hops += _sample_hops(job, n_predictors)
    result_bytes = _whole_pages(2 * job.max_row_bytes + SPARE_RESULT_BYTES)
    n_results = queue // job.batch_size
    hops.append(Hop("results", n_results, job.batch_size, result_bytes, TYPICAL_RESULT_BYTES))
    return tuple(hops)


def _payload_hop(job: Job) -> Hop:
    n_payloads = max(2, min(job.queue_size, 4 * job.preprocess_thread_num + 16 + _n_downloads(job)))
    return Hop("payloads", n_payloads, 1, _whole_pages(job.max_row_bytes), TYPICAL_PAYLOAD_BYTES)


def _video_hops(job: Job) -> list[Hop]:
    """Size the ring of videos, whose key columns lie there, too, and that of their segments."""
    row_bytes = _whole_pages(2 * job.max_row_bytes + SPARE_RESULT_BYTES)
    n_segments = job.preprocess_thread_num + SPARE_SEGMENTS
    return [
        Hop("videos", SPARE_SEGMENTS, 1, row_bytes, TYPICAL_PAYLOAD_BYTES),
        Hop("segments", n_segments, 1, row_bytes + MAX_PLAN_BYTES, TYPICAL_PAYLOAD_BYTES),
    ]


def _roomy(job: Job, wanted: int, batch: int, row_bytes: int) -> int:
    """Return how many batches a ring behind the decoders should hold: of videos more, because
    decoders that work on one at several places give their frames far ahead of their turn.
    """
    return max(wanted, AHEAD_BYTES // (batch * row_bytes)) if job.is_input_video else wanted


def _n_downloads(job: Job) -> int:
    """Return how many rows the decoders of a worker may hold while their files come."""
    if job.is_input_video:
        return 0
    if job.input_table and job.image_type == "base64":
        return 0
    return job.preprocess_thread_num * job.download_concurrency


def _sample_hops(job: Job, n_predictors: int) -> list[Hop]:
    """Size the rings before the links of a chain and before the predictors.

    Note [Batches of several sizes]
    The reader publishes a row when its place is free in every ring. A place becomes free when a
    batch is released, which may wait for batches of the rings before it, and these for rows that
    are not published yet. No ring may be so small that those are just the rows that its fullness
    keeps back: it must hold a batch of its own, and what the batches before may reach beyond.
    """
    row_bytes = _whole_pages(3 * job.max_image_pixels + 2 * job.max_row_bytes)
    links = [(it.num_threads, it.batch_size) for it in job.user_process_config]
    usual_bytes = _usual_sample_bytes(job)
    hops, before, n_before = list[Hop](), 1, job.preprocess_thread_num + _n_downloads(job)
    for n_consumers, batch in [*links, (n_predictors, job.batch_size)]:
        wanted = n_consumers + 2 + -(-n_before // batch)
        wanted = wanted if hops else _roomy(job, wanted, batch, usual_bytes)
        least = 1 - (math.gcd(before, batch) - before) // batch
        n_batches = max(least, min(job.queue_size // batch, wanted))
        name = f"samples{len(hops) + 1}" if hops else "samples"
        hops.append(Hop(name, n_batches, batch, row_bytes, usual_bytes))
        before, n_before = math.lcm(before, batch), n_consumers
    return hops


def _usual_sample_bytes(job: Job) -> int:
    if not job.is_input_video:
        return TYPICAL_SAMPLE_BYTES
    pixels = job.reshape_size**2 * 16 // 9 if job.reshape_size > 0 else TYPICAL_FRAME_PIXELS
    return 3 * pixels * (1 if job.use_image_predictor else job.decode_batch_size)


def _check_memory(job: Job, layout: Layout) -> None:
    if layout.address_bytes > MAX_ADDRESS_BYTES:
        raise ConfigError(
            f"queue_size {job.queue_size} times max_row_bytes {job.max_row_bytes} is more address "
            "space than a process has; lower one of them"
            + (", or max_image_pixels" if uses_samples(job) else "")
        )
    rings, processes = layout.memory_bytes * job.num_worker, layout.process_bytes * job.num_worker
    have = job.memory_limit_bytes or machine.memory_bytes()
    if rings + processes > have:
        raise ConfigError(
            f"the rings of {job.num_worker} workers need {rings >> 20} MiB of shared memory and "
            f"their processes at least {processes >> 20} MiB, but there are {have >> 20} MiB; "
            f"lower batch_size ({job.batch_size}), queue_size ({job.queue_size}), "
            f"predict_thread_num ({job.predict_thread_num}) or num_worker"
        )


def _whole_pages(n_bytes: int) -> int:
    return -(-n_bytes // 4096) * 4096
