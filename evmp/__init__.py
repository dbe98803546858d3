"""evmp: predict every row of a table, or every file of a list, with every core of the machine.

One job file (`evmp.job`) says what to read, which model to run and where the results go, and
`evmp --config job.yaml` runs it. Rows flow through processes, pixels only through shared memory:

    source ─► reader ─►[ring]─► decoders ─►[ring]─► predictors ─►[ring]─► writer ─► staging ─► sink

Where to read on, in the order of that flow:

- `job`, `errors`: the job file's schema and the exception tree; everything else takes a `Job`.
- `source`: tables and file lists, cut into ranges of consecutive rows.
- `image`: bytes to RGB frames; the C extension `_native` holds Base64, resize and the ring.
- `model`: `model.package` says what a model expects, and an adapter runs it.
- `head`: the model's tensors to the JSON result of each `model_type`.
- `sink`: results in input order into a file or a table, one row out for each row in.
- `pipeline`, `supervisor`, `stage`: which processes run, who watches them, how they stop.

This module imports nothing, so that `import evmp` costs the supervising process nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"
