"""One vector an image: `{"feature": [0.1, -2.5, ...]}`, from the output that `feature_name` names.

An output of (C, H, W) is averaged over H and W in float64, or taken whole where the package says
`pooling: flatten`. A number that is NaN or infinite is null: the others may still be of use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evmp.errors import ModelError
from evmp.head.array import Array, Scores, dump, shapes_of
from evmp.setting import nearest, show

if TYPE_CHECKING:
    from evmp.model import Outputs
    from evmp.model.package import ModelPackage


class FeatureExtractor:
    """The head of `model_type: feature_extractor`."""

    def __init__(self, package: ModelPackage, *, feature_name: str) -> None:
        """Make the head of a package.

        Args:
            feature_name: the output that is the feature.
        """
        self._pooling, self._name = package.output.pooling, feature_name
        self._is_dynamic = package.input.size == "dynamic"
        self._shape: tuple[int, ...] = ()

    def check(self, outputs: Outputs) -> None:
        row = outputs[0]
        if self._name not in row:
            raise ModelError(
                f"feature_name: got {show(self._name)}, but the model's outputs are "
                f"{shapes_of(row)}{nearest(self._name, row)}"
            )
        self._shape = self._lasting(row[self._name])
        self._vector(row[self._name])

    def results(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        return [b'{"feature":%b}' % dump(self._vector(row[self._name])) for row in outputs]

    def _vector(self, array: Array) -> Scores:
        """Return (D,) float32, C-contiguous."""
        if self._lasting(array) != self._shape:
            raise ModelError(
                f"the model's output {self._name} is {(1, *array.shape)} for this image, at first "
                f"it was {(1, *self._shape)}"
            )
        is_vector = array.ndim != 3 and array.size == max(array.shape, default=1)
        with np.errstate(over="ignore", invalid="ignore"):
            if array.size and (is_vector or self._pooling == "flatten"):
                return array.reshape(-1).astype(np.float32)
            if array.size and array.ndim == 3:
                means: Scores = array.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)
                return means
        raise ModelError(
            f"the model's output {self._name} is {(1, *array.shape)} for an image, expected "
            "(1, D) or (1, C, H, W); output.pooling: flatten takes any"
        )

    def _lasting(self, array: Array) -> tuple[int, ...]:
        """Return what is the same for every image: the shape, or what is left when it is pooled."""
        is_pooled = array.ndim == 3 and self._pooling == "average"
        shape: tuple[int, ...] = array.shape
        return shape[:1] if self._is_dynamic and is_pooled else shape
