"""evmp: predict every row of a table, or every file of a list, with every core of the machine.

One job file (`evmp.job`) says what to read, which model to run and where the results go, and
`evmp --config job.yaml` runs it. Rows flow through processes, pixels only through shared memory:

    source ─► reader ─►[ring]─► decoders ─►[ring]─► predictors ─►[ring]─► writer ─► staging ─► sink

Where to read on, from the outside in:

- `cli`, `run`: the command; one job from its plan to its publication.
- `job`: the job file's schema; `rule` joins its keys, `value`, `setting` and `document` are what it
  is made of, `errors` is everything that can be wrong. All else takes a `Job`.
- `pipeline`, `supervisor`, `stage`: which processes a worker has, who watches them, how they stop.
- `placement`: which CPUs and GPUs they have.
- `reader`, `decoder`, `predictor`, `writer`: the stages, in the order of the flow; `ring` between.
- `engine`: what a predictor holds, a model and its head perhaps.
- `source`, `image`, `model`, `head`, `sink`: rows, pixels, tensors, results; none knows the others.
- `ledger`, `publish`: what is done and stays done, and how it becomes the output in one step.
- `_native`: the C extension with Base64, resize and the ring.

This module imports nothing, so that `import evmp` costs the supervising process nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"
