"""Where a worker's processes run: which CPUs and which GPUs of the machine are its own.

A worker asks for hundredths of them (`cpuRequired`, `gpuRequired`). Workers lie on the GPUs one
after the other: below 100 as many share a card as fit on it whole, from 100 on each gets a card for
every hundred that it has begun. Where there are too few cards they are shared as evenly as may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evmp import machine

if TYPE_CHECKING:
    from evmp.job import Job


def uses_gpu(job: Job) -> bool:
    """Return whether predictors get a GPU each."""
    if job.device == "cpu" or job.gpuRequired == 0:
        return False
    return job.device == "cuda" or bool(machine.gpus())


def gpus_of(job: Job, worker: int) -> list[str]:
    """Return the GPUs of a worker, one for each of its predictors, all workers equally many."""
    if not uses_gpu(job):
        return []
    return spread(machine.gpus(), job.gpuRequired, job.num_worker, worker)


def spread(gpus: Sequence[str], share: int, n_workers: int, worker: int) -> list[str]:
    """Return those of the GPUs that belong to one of n workers.

    Args:
        share: of a worker, in hundredths of a GPU, at least 1.
        worker: which; one beyond the n, who may be elsewhere, lies where it would if all were here.
    """
    if not gpus:
        return []
    if share < 100:
        n_on_a_card = max(100 // share, -(-n_workers // len(gpus)))
        return [gpus[worker // n_on_a_card % len(gpus)]]
    n = min(-(-share // 100), len(gpus))
    first = worker * share // 100 if has_room(len(gpus), share, n_workers) else worker * n
    return [gpus[(first + i) % len(gpus)] for i in range(n)]


def has_room(n_gpus: int, share: int, n_workers: int) -> bool:
    """Say whether each of n workers can have its share of the GPUs."""
    if share < 100:
        return n_workers <= n_gpus * (100 // share)
    return n_workers * share <= 100 * n_gpus


def cpus_of(job: Job, worker: int) -> list[int]:
    """Return the CPUs of a worker: its own where there are enough for all, else every one."""
    everyone = machine.cpus()
    n_own = max(1, job.cpuRequired // 100)
    if n_own * max(job.num_worker, worker + 1) > len(everyone):
        return everyone
    return everyone[worker * n_own : (worker + 1) * n_own]


def shortages(job: Job) -> list[str]:
    """Return what the job asks for, in so many words, and the machine does not have."""
    lines = []
    n_cpus, n_gpus = len(machine.cpus()), len(machine.gpus())
    asked = job.model_fields_set
    if "cpuRequired" in asked and job.cpuRequired * job.num_worker > 100 * n_cpus:
        lines.append(
            f"cpuRequired: {job.num_worker} workers ask for {job.cpuRequired / 100:g} CPUs each, "
            f"there are {n_cpus}; they share them"
        )
    is_asked = "gpuRequired" in asked and uses_gpu(job)
    if is_asked and not has_room(n_gpus, job.gpuRequired, job.num_worker):
        lines.append(
            f"gpuRequired: {job.num_worker} workers ask for {job.gpuRequired / 100:g} GPUs each, "
            f"there are {n_gpus}; they share them"
        )
    return lines
