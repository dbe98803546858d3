"""`--check`: everything that a job needs, opened for once, and one batch predicted.

Nothing is written. What is loaded here is loaded in a process of its own, by the very code that the
stages run.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from evmp import machine
from evmp.child import call_in_child
from evmp.ledger import Block
from evmp.metrics import Board
from evmp.pipeline import Worker
from evmp.placement import uses_gpu
from evmp.ring import Mark

if TYPE_CHECKING:
    from evmp.run import Plan


def check_job(plan: Plan) -> str:
    """Validate everything, predict one batch, and return the plan in words.

    Raises:
        EvmpError: the job could not start.
    """
    plan.target.check_writable()
    first = call_in_child(partial(_first_batch, plan))
    return "\n".join([*_describe(plan), f"first row    {first}"])


def _first_batch(plan: Plan) -> str:
    """Put the first rows through every stage, one after the other, in this process."""
    n_rows = min(plan.source.n_rows, plan.layout.batch_rows)
    # One stage runs after the other here, so the first ring must hold the whole batch.
    layout = replace(plan.layout, n_payloads=plan.layout.batch_rows + 1)
    seats = Board(layout.roles, 1).workers[0]
    worker = Worker(
        0, plan.job, plan.package, layout, plan.target.ledger, plan.source.keys, seats, list
    )
    results = worker.rehearse([Block(0, n_rows)])
    if n_rows == 0:
        return "none: the input is empty"
    header = results.header(0)
    text = bytes(results.data(0)).decode()
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"FAILED: {text}" if header.mark == Mark.ERROR else text


def _describe(plan: Plan) -> list[str]:
    job, layout, spec = plan.job, plan.layout, plan.package.input
    size = f"{'up to ' * (spec.size == 'dynamic')}{spec.width} x {spec.height}"
    device = f"CPU, {job.torch_threads} threads each"
    if uses_gpu(job):
        device = f"a GPU each, {job.predict_thread_num} batches in flight"
    n_blocks = -(-plan.source.n_rows // plan.block_rows)
    return [
        f"input        {job.input_table or job.input_oss_file}: {plan.source.n_rows} rows",
        f"model        {plan.package.weights}: {job.model_type}, {size}, {spec.resize}, "
        f"{spec.interpolation}",
        f"output       {plan.target.path}",
        f"blocks       {n_blocks} of up to {plan.block_rows} rows",
        f"workers      {job.num_worker}, each 1 reader, {layout.n_decoders} decoders, "
        f"{layout.n_predictors} predictors ({device}), 1 writer",
        f"batches      {layout.batch_rows} rows; {layout.n_pixel_batches} in the pixel ring, "
        f"{job.queue_size} rows in flight",
        f"memory       {layout.memory_bytes * job.num_worker >> 20} MiB shared, at least "
        f"{layout.process_bytes * job.num_worker >> 20} MiB of the processes' own, of "
        f"{(job.memory_limit_bytes or machine.memory_bytes()) >> 20} MiB free",
    ]
