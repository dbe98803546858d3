"""`--check`: everything that a job needs, opened for once, and one batch predicted.

Nothing is written. What is loaded here is loaded in a process of its own, by the very code that the
stages run.
"""

from __future__ import annotations

import faulthandler
import math
import signal
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from evmp import machine
from evmp.child import call_in_child
from evmp.errors import WorkerDied
from evmp.grid import Block
from evmp.ledger import Ledger
from evmp.metrics import Board
from evmp.pipeline import Worker
from evmp.placement import uses_gpu
from evmp.ring import Mark
from evmp.value import mask

if TYPE_CHECKING:
    from evmp.plan import Plan


def check_job(plan: Plan) -> str:
    """Validate everything, predict one batch, and return the plan in words.

    Raises:
        EvmpError: the job could not start.
    """
    plan.target.check_writable()
    try:
        first = call_in_child(partial(_first_batch, plan))
    except WorkerDied as error:
        limit = f"SIGALRM, after stall_timeout_seconds, {plan.job.stall_timeout_seconds:g}"
        cause = str(error).replace("SIGALRM", limit)
        raise WorkerDied(
            f"the first batch cannot be tried: {cause}; what it has printed, and where it was, is "
            "above"
        ) from None
    return "\n".join([*_describe(plan), f"first row    {first}"])


def _first_batch(plan: Plan) -> str:
    """Put the first rows through every stage, one after the other, in this process."""
    n_items = plan.layout.batch_rows
    n_rows = min(plan.source.n_rows, 1 if plan.job.is_input_video else n_items)
    # One stage runs after the other here, so each ring must hold the whole batch.
    layout = plan.layout.holding(n_items + 1)
    seats = Board(layout.roles, 1).workers[0]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        ledger.open({})
        worker = Worker(
            0,
            plan.here.model_copy(update={"output_dir": plan.job.output_dir and folder}),
            plan.package,
            layout,
            ledger,
            plan.source,
            seats,
            list,
            code=plan.unpack_code(Path(folder)),
        )
        faulthandler.enable()  # where users' code crashes or hangs is shown on stderr
        faulthandler.register(signal.SIGALRM, chain=True)
        signal.alarm(math.ceil(plan.job.stall_timeout_seconds))  # no supervisor looks after it
        results = worker.rehearse([Block(0, n_rows)], n_items)
        signal.alarm(0)
    if n_rows == 0:
        return "none: the input is empty"
    header = results.header(0)
    text = bytes(results.data(0)).decode().replace(folder, plan.job.output_dir)
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"FAILED: {text}" if header.mark == Mark.ERROR else text


def _describe(plan: Plan) -> list[str]:
    job, layout = plan.here, plan.layout
    device = f"CPU, {job.torch_threads} threads each"
    if uses_gpu(job):
        device = f"a GPU each, {job.predict_thread_num} batches in flight"
    processes = "".join(
        f"{process.num_threads} x {process.user_process_cls}, "
        for process in job.user_process_config
    )
    before = layout.hops[-2]
    n_blocks = -(-plan.source.n_rows // plan.block_rows)
    return [
        f"input        {mask(job.input_table or job.input_oss_file)}: {plan.source.n_rows} rows",
        *(f"model        {model}" for model in _describe_models(plan)),
        f"output       {plan.target.uri}",
        f"blocks       {n_blocks} of up to {plan.block_rows} rows",
        f"workers      {job.num_worker}, each 1 reader, {layout.n_decoders} decoders, "
        f"{processes}{layout.n_predictors} predictors ({device}), 1 writer",
        f"batches      {layout.batch_rows} rows; {before.n_batches} in the ring before the model, "
        f"{job.queue_size} rows in flight",
        f"memory       {layout.memory_bytes * job.num_worker >> 20} MiB shared, at least "
        f"{layout.process_bytes * job.num_worker >> 20} MiB of the processes' own, of "
        f"{(job.memory_limit_bytes or machine.memory_bytes()) >> 20} MiB free",
    ]


def _describe_models(plan: Plan) -> Iterator[str]:
    if plan.package is None:
        yield f"{mask(plan.job.model_path)}: {plan.job.model_type}, {plan.job.user_predictor_cls}"
        return
    for package in plan.package.models:
        spec = package.input
        size = f"{'up to ' * (spec.size == 'dynamic')}{spec.width} x {spec.height}"
        what = f"{package.model_type}, {size}, {spec.resize}, {spec.interpolation}"
        yield f"{package.weights}: {what}"
