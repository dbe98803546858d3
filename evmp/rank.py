"""Which worker of a job this command is, where several commands share one job.

An engine that starts many processes (Slurm, Kubernetes, torchrun, OpenMPI) tells each in its
environment which it is; `--worker k/n` says the same by hand. Without either, the command runs all
workers of the job on this machine. With shards the numbers must be those of all workers; where any
worker takes any block, whatever an engine says will do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import TYPE_CHECKING

from evmp import machine
from evmp.errors import ConfigError, Problem

if TYPE_CHECKING:
    from evmp.job import Job

Environment = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Rank:
    """One worker of a job, which has a command to itself.

    Attributes:
        worker: which worker, from 0.
        n_workers: of the job, on all machines.
        place: which of the workers on this machine; its number, where nobody says.
        n_places: how many the engine says that it has put on this machine.
        engine: what has started it; empty where somebody has said so by hand.
    """

    worker: int
    n_workers: int
    place: int = 0
    n_places: int = 1
    engine: str = ""

    def __str__(self) -> str:
        by = f", as {self.engine} says" if self.engine else ""
        return f"worker {self.worker} of {self.n_workers}{by}"

    def fit(self, job: Job, environ: Environment = os.environ) -> Job:
        """Return the job as it is on this machine: its workers, and their CPUs and GPUs.

        What the engine has given counts more than `cpuRequired` and `gpuRequired`. Of the CPUs it
        is all: there may be others on this machine, of whom this command does not know.
        """
        here = {"num_worker": self.n_places, "cpuRequired": 100 * len(machine.cpus())}
        gpus = machine.gpus() if "CUDA_VISIBLE_DEVICES" in environ else []
        if self.engine and gpus and job.gpuRequired:
            n_sharing = 1 if "SLURM_GPUS_PER_TASK" in environ else self.n_places
            here["gpuRequired"] = max(1, 100 * len(gpus) // n_sharing)
        fitted = job.model_copy(update=here)
        fitted.model_fields_set.difference_update(here)  # which nobody has asked for
        return fitted


def find_rank(job: Job, by_hand: str = "", environ: Environment = os.environ) -> Rank | None:
    """Return which worker of the job this command is; None where it is all of them.

    Args:
        by_hand: `k/n`, which counts more than the environment; the workers are 0 to n - 1.

    Raises:
        ConfigError: when what was said is no worker.
    """
    if by_hand:
        worker = _by_hand(by_hand)
        return worker if worker.n_workers > 1 else None
    told = (tell(environ, job) for tell in (_torchrun, _mpi, _slurm, _kubernetes))
    rank = next(filter(None, told), None)
    if rank and job.enableDynamicCluster:
        return replace(rank, n_workers=max(rank.n_workers, rank.worker + 1))
    return rank and _checked(rank)


def _checked(rank: Rank) -> Rank:
    last = rank.n_workers - 1
    if rank.worker <= last:
        return rank
    remedy = "; num_worker must be how many pods there are" * (rank.engine == "Kubernetes")
    raise ConfigError(
        Problem(
            f"{rank.engine or '--worker'}: got worker {rank.worker} of {rank.n_workers}, expected "
            f"one of 0 to {last}{remedy}"
        )
    )


def _by_hand(text: str) -> Rank:
    if not re.fullmatch(r"[0-9]{1,6}/0*[1-9][0-9]{0,5}", text, re.ASCII):
        raise ConfigError(Problem(f"--worker: got {text}, expected k/n, such as 0/4, to 3/4"))
    worker, n_workers = map(int, text.split("/"))
    return _checked(Rank(worker, n_workers, worker))


def _torchrun(environ: Environment, job: Job) -> Rank | None:
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    rank = _number(environ, "RANK")
    return Rank(
        rank,
        _number(environ, "WORLD_SIZE"),
        _number(environ, "LOCAL_RANK", rank),
        _number(environ, "LOCAL_WORLD_SIZE", 1),
        "torchrun",
    )


def _mpi(environ: Environment, job: Job) -> Rank | None:
    prefix = "OMPI_COMM_WORLD"
    if f"{prefix}_RANK" not in environ:
        return None
    rank = _number(environ, f"{prefix}_RANK")
    return Rank(
        rank,
        _number(environ, f"{prefix}_SIZE"),
        _number(environ, f"{prefix}_LOCAL_RANK", rank),
        _number(environ, f"{prefix}_LOCAL_SIZE", 1),
        "OpenMPI",
    )


def _slurm(environ: Environment, job: Job) -> Rank | None:
    """Count the tasks of all elements of an array, or of the only job."""
    if not environ.keys() & {"SLURM_ARRAY_TASK_ID", "SLURM_PROCID"}:
        return None
    element, n_elements, task, n_tasks = 0, 1, 0, 1
    if "SLURM_ARRAY_TASK_ID" in environ:
        element, n_elements = _element(environ, job)
    # A batch script is told of the tasks that srun would start, and is none of them.
    is_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    if "SLURM_PROCID" in environ and not is_script:
        task = _number(environ, "SLURM_PROCID")
        n_tasks = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))
    if n_tasks == 1 and "SLURM_ARRAY_TASK_ID" not in environ:
        return None  # a script or a shell that has the machine for itself
    worker = element * n_tasks + task
    return Rank(
        worker,
        n_elements * n_tasks,
        _number(environ, "SLURM_LOCALID", worker) if n_tasks > 1 else worker,
        _n_tasks_here(environ) if n_tasks > 1 else 1,
        "Slurm",
    )


def _element(environ: Environment, job: Job) -> tuple[int, int]:
    """Return which element of an array this is, counted from 0, and how many there are.

    Raises:
        ConfigError: when the job has shards, and one number does not follow from the others.
    """
    n_elements = _number(environ, "SLURM_ARRAY_TASK_COUNT")
    first = _number(environ, "SLURM_ARRAY_TASK_MIN", 0)
    step = max(1, _number(environ, "SLURM_ARRAY_TASK_STEP", 1))
    last = _number(environ, "SLURM_ARRAY_TASK_MAX", first + step * (n_elements - 1))
    if n_elements == 2:
        step = max(1, last - first)  # of 1,3 Slurm says 1
    if not job.enableDynamicCluster and first + step * (n_elements - 1) != last:
        raise ConfigError(
            Problem(
                f"Slurm: got an array of {n_elements} elements from {first} to {last}, in which "
                f"there are gaps; take --array=0-{n_elements - 1}, or enableDynamicCluster, where "
                "any worker takes any block"
            )
        )
    return (_number(environ, "SLURM_ARRAY_TASK_ID") - first) // step, n_elements


def _n_tasks_here(environ: Environment) -> int:
    """Return how many tasks of the step this node has; `2(x3),1` is 2 on three nodes, 1 on one."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    nodes = list(chain.from_iterable(repeat(int(n), int(times or 1)) for n, times in counts))
    node = _number(environ, "SLURM_NODEID", 0)
    return nodes[node] if node < len(nodes) else 1


def _kubernetes(environ: Environment, job: Job) -> Rank | None:
    """Kubernetes tells a pod its index, not how many there are: that is `num_worker`."""
    if "JOB_COMPLETION_INDEX" not in environ:
        return None
    index = _number(environ, "JOB_COMPLETION_INDEX")
    return Rank(index, job.num_worker, index, engine="Kubernetes")


def _number(environ: Environment, name: str, default: int | None = None) -> int:
    """Return a variable's number.

    Raises:
        ConfigError: when it is none, or missing where there is no default.
    """
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        raise ConfigError(Problem(f"{name}: got {text!r}, expected a number"))
    return int(text)
