"""evmp: predict every row of a table, or every file of a list, with every core of the machine.

One job file (`evmp.job`) says what to read, which model to run and where the results go, and
`evmp --config job.yaml` runs it. Rows flow through processes, pixels only through shared memory:

    source ─► reader ─►[ring]─► decoders ─►[ring]─► predictors ─►[ring]─► writer ─► staging ─► sink

Where to read on, from the outside in:

- `cli`, `run`: the command; one job from its plan to its publication.
- `job`: the job file's schema; `rule` joins its keys, `value`, `setting` and `document` are what it
  is made of, `errors` is everything that can be wrong. All else takes a `Job`.
- `pipeline`, `supervisor`, `stage`: which processes a worker has, who watches them, how they stop.
- `layout`, `placement`: how large it is, and which CPUs and GPUs it has.
- `reader`, `decoder`, `processor`, `predictor`, `writer`: the stages, in the order of the flow;
  `ring` between, which holds `sample`s where users' code takes part.
- `engine`, `sampleengine`, `textpredictor`: what a predictor holds, a model and its head perhaps.
- `source`, `image`, `model`, `head`, `sink`: rows, pixels, tensors, results; none knows the others.
- `interface`, `custom`, `resource`, `result`, `outputdir`: users' code, and what it gives.
- `ledger`, `publish`: what is done and stays done, and how it becomes the output in one step.
- `_native`: the C extension with Base64, resize and the ring.

Users' code imports PredictorInterface, PredictorInterfaceV2 and Process from here. This module
imports nothing before they are asked for, so that `import evmp` costs the supervising process
nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evmp.interface import PredictorInterface, PredictorInterfaceV2, Process

__all__ = ["PredictorInterface", "PredictorInterfaceV2", "Process", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("evmp.interface"), name)
    raise AttributeError(f"module 'evmp' has no attribute {name!r}")
