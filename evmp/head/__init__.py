"""Heads: what a model's tensors say, as the JSON result of each `model_type`.

A head knows no torch and no adapter: it takes numpy arrays by name and gives bytes. It works row by
row, so that a result does not depend on the batch. Predictor processes use them.

    classifier      class probabilities
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from evmp.head.classifier import Classifier

if TYPE_CHECKING:
    from evmp.job import Job
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage


class Head(Protocol):
    """The post-processing of one type of model."""

    def check(self, outputs: Outputs) -> None:
        """Look at the outputs of a first row, before any other; settles what depends on them.

        Raises:
            ModelError: they are not what such a model returns, or do not fit the labels.
        """

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        """Turn the outputs of some rows into one JSON object each, in their order.

        Args:
            sizes: (height, width) of the original images, in pixels.

        Raises:
            ModelError: an output has another shape than at the check, or holds NaN or infinity.
        """


def open_head(package: ModelPackage, job: Job) -> Head:
    """Make the head for the package's type of model, which the job must have been checked for."""
    return Classifier(package, top_k=job.top_k)
