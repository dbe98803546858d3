"""What a job means on this machine, with this input and this model, before anything is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from evmp import resource
from evmp.asset import localize
from evmp.child import call_in_child
from evmp.layout import Layout, plan_layout
from evmp.model.package import ModelPackage, check_model_type, digests_of, load_package
from evmp.rank import Rank
from evmp.rule import CUSTOM
from evmp.source import SourceInfo, open_source
from evmp.target import Target, open_target

if TYPE_CHECKING:
    from evmp.job import Job

BLOCKS_PER_WORKER: Final = 8
MAX_BLOCK_ROWS: Final = 4096
MIN_BLOCK_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job means on this machine, with this input and this model.

    Attributes:
        package: the model's; None where the user's predictor opens it.
        block_rows: rows committed at once.
        fingerprint: what must be the same for a run to go on with the work of another.
        rank: the worker that this command is; None where it is all of them.
        copies: of keys whose values are elsewhere, where the copies are on this machine.
    """

    job: Job
    package: ModelPackage | None
    layout: Layout
    source: SourceInfo
    target: Target
    block_rows: int
    fingerprint: dict[str, Any]
    rank: Rank | None = None
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def here(self) -> Job:
        """The job with the files, workers, CPUs and GPUs that it has on this machine."""
        job = self.job.model_copy(update=self.copies)
        return self.rank.fit(job) if self.rank else job

    @property
    def n_workers(self) -> int:
        """How many workers the job has, on all machines."""
        return self.rank.n_workers if self.rank else self.job.num_worker

    @property
    def own_workers(self) -> Sequence[int]:
        """Those of them that this command runs."""
        return (self.rank.worker,) if self.rank else range(self.n_workers)

    def unpack_code(self, folder: Path) -> Path | None:
        """Unpack the user's code into a new folder within `folder`, and return that, if any.

        `folder` is made where it is missing.

        Raises:
            ConfigError: when that fails.
        """
        if not self.job.user_resource:
            return None
        folder.mkdir(exist_ok=True)
        resource.unpack(self.here.user_resource, folder / "code")
        return folder / "code"


def make_plan(job: Job, rank: Rank | None = None) -> Plan:
    """Look at the model package, the machine and the input; fetch what is elsewhere of them.

    Args:
        rank: the worker that this command is, if it is one.

    Raises:
        EvmpError: when the job cannot start; nothing has been written yet.
    """
    copies = call_in_child(lambda: localize(job))
    here = job.model_copy(update=copies)
    package = None if job.model_type == CUSTOM else load_package(here.model_path)
    if package is not None:
        check_model_type(package, job.model_type)
    layout = plan_layout(rank.fit(job) if rank else job, package)
    model: dict[str, Any] = {}
    code = (
        call_in_child(lambda: resource.fingerprint(here.user_resource)) if job.user_resource else {}
    )
    source = call_in_child(
        lambda: open_source(job).describe(),
        lambda: model.update(package.fingerprint() if package else digests_of(here.model_path)),
    )
    parts = {
        "input": source.fingerprint,
        "job": job.fingerprint(),
        "model": model,
        **({"code": code} if code else {}),
    }
    fingerprint = json.loads(json.dumps(parts))
    n_workers = rank.n_workers if rank else job.num_worker
    block_rows = choose_block_rows(job, source.n_rows, n_workers)
    target = open_target(job, source.keys)
    return Plan(job, package, layout, source, target, block_rows, fingerprint, rank, copies)


def choose_block_rows(job: Job, n_rows: int, n_workers: int) -> int:
    """Return how many rows are committed at once, so that each worker has several blocks."""
    per_worker = -(-n_rows // (n_workers * BLOCKS_PER_WORKER))
    least = 1 if job.is_input_video else MIN_BLOCK_ROWS  # a video is worth committing by itself
    return job.block_rows or min(MAX_BLOCK_ROWS, max(least, per_worker))
