"""What every adapter does with a batch: fill it up, normalise it, divide what comes out of it.

Numbers and numpy arrays only: no torch is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from evmp.errors import ModelError

if TYPE_CHECKING:
    from evmp.model import Outputs
    from evmp.model.package import ModelInput, ModelPackage

Array: TypeAlias = "np.ndarray[Any, Any]"
Triple: TypeAlias = tuple[float, float, float]


class OutOfMemory(ModelError):
    """The device's memory does not hold what the model needs for so many rows."""


def filled_up(rows: Sequence[int], n: int) -> list[int]:
    """Repeat rows until they are n.

    The shape of a batch never changes, and with it the kernels. Nothing but the rows asked for is
    in it, so that they fail for no other's sake.
    """
    return [rows[i % len(rows)] for i in range(n)]


def scale_and_bias(spec: ModelInput) -> tuple[Triple, Triple]:
    """Return the factor and the summand of each channel: x * scale / std - mean / std."""
    (a, b, c), (x, y, z) = spec.std, spec.mean
    return (spec.scale / a, spec.scale / b, spec.scale / c), (-x / a, -y / b, -z / c)


def image_input(inputs: Mapping[str, Sequence[object]], package: ModelPackage) -> str:
    """Return the name of a model's only input, which takes the package's images.

    Args:
        inputs: the shape of each by its name; what is no integer there is a size that is not fixed.

    Raises:
        ModelError: there are others, or the one is of another shape.
    """
    sides = ((3, 3), *((least, most) for least, most, _ in package.input.sides))
    expected = ", ".join(str(it) if it == to else f"{it} to {to}" for it, to in sides)
    found = ", ".join(f"{name}: {_written(shape)}" for name, shape in inputs.items())
    if len(inputs) != 1:
        raise ModelError(
            f"{package.weights}: the model has the inputs {found or 'of none'}, expected one, the "
            "images as (batch, 3, height, width)"
        )
    ((name, shape),) = inputs.items()
    if len(shape) == 4 and shape[3] == 3 != shape[1]:
        raise ModelError(
            f"{package.weights}: the model's input is {found}, with the channels last (NHWC), "
            "expected (batch, 3, height, width); export it with the channels first, by tf2onnx "
            f"with --inputs-as-nchw {name}"
        )
    if len(shape) != 4 or any(
        isinstance(size, int) and not size == least == most
        for size, (least, most) in zip(shape[1:], sides, strict=True)
    ):
        raise ModelError(
            f"{package.weights}: the model's input is {found}, expected (batch, {expected}), as "
            "input.height and input.width say; correct model.yaml or export the model again"
        )
    return name


def _written(shape: Sequence[object]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


def divided(arrays: Mapping[str, Array], batch_size: int) -> Outputs:
    """Divide a batch's outputs among its rows.

    Args:
        arrays: by name, each (batch_size, ...).

    Raises:
        ModelError: one is not of as many rows.
    """
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != batch_size:
            raise ModelError(
                f"the model's output {name} is {array.shape} for a batch of {batch_size}, "
                f"expected ({batch_size}, ...)"
            )
    return [{name: array[row] for name, array in arrays.items()} for row in range(batch_size)]
