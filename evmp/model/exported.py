"""Programs of torch.export (.pt2): load, check, run.

A program says of its input which sizes are fixed; one of a fixed batch size runs in that size.

A program is code: torch unpickles parts of it and runs what its author wrote, as if it were a
Python file. TorchScript and ONNX are not like that.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.export
from torch.export.passes import move_to_device_pass

from evmp.errors import ModelError
from evmp.model.batch import image_input
from evmp.model.network import explain, open_network, resolve_device, set_threads
from evmp.model.operators import lacking, register_operators

if TYPE_CHECKING:
    from evmp.model import Model
    from evmp.model.package import ModelPackage

# torch writes 2 for the least batch where it means any: 0 and 1 are special to it while it traces.
ANY_BATCH = 2


def open_exported(
    package: ModelPackage, device: str, batch_size: int, threads: int, cpu_batch_size: int
) -> Model:
    """Load a program for a device; see `evmp.model.open_model`."""
    set_threads(threads)
    register_operators(package.weights)
    program = load_program(package.weights)
    least, most = _batch_sizes(program, package)
    _check_evaluates(program, package.weights)
    return open_network(
        _module(program, resolve_device(device)),
        package,
        device=device,
        batch_size=int(min(max(batch_size, least), most)),
        cpu_batch_size=int(min(max(cpu_batch_size, least), most)),
        least=least,
        finish=lambda module: module,
    )


def load_program(file: Path) -> Any:
    """Load a program of torch.export; see register_operators, which comes first.

    Raises:
        ModelError: this torch cannot.
    """
    with open(file, "rb") as stream, _quiet() as causes:
        try:
            return torch.export.load(stream)
        except (RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
            # torch logs what went wrong, and then raises that something has.
            cause = causes[0] if causes else error
            reason = lacking(cause) or f"torch {torch.__version__} cannot load it: {explain(cause)}"
            raise ModelError(f"{file}: {reason}; save it again with this torch") from error


@contextmanager
def _quiet() -> Iterator[list[Exception]]:
    """Collect the exceptions that torch.export logs in a list, and keep all else to itself."""
    causes: list[Exception] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], Exception):
            causes.append(record.exc_info[1])
        return False

    log = logging.getLogger("torch.export")
    log.addFilter(collect)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield causes
    finally:
        log.removeFilter(collect)


def input_shapes(program: Any) -> dict[str, tuple[Any, ...]]:
    """Return the shapes of a program's inputs by name; a size that is not fixed is no integer."""
    return {name: tuple(getattr(it, "shape", ())) for name, it in _inputs(program).items()}


def _inputs(program: Any) -> dict[str, Any]:
    """Return stand-ins for a program's inputs, which have their shapes and types."""
    names = set(program.graph_signature.user_inputs)
    nodes = [it for it in program.graph.nodes if it.op == "placeholder" and it.name in names]
    return {node.name: node.meta.get("val") for node in nodes}


def _batch_sizes(program: Any, package: ModelPackage) -> tuple[int, float]:
    """Return the smallest and the largest batch that a program takes.

    Raises:
        ModelError: it takes anything but a batch of images of the package's size.
    """
    shapes = input_shapes(program)
    name = image_input(shapes, package)
    value, shape = _inputs(program)[name], shapes[name]
    if not value.is_floating_point():
        raise ModelError(
            f"{package.weights}: the model's input {name} is {value.dtype}, expected float"
        )
    if isinstance(shape[0], int):
        return shape[0], shape[0]
    sizes = program.range_constraints.get(shape[0].node.expr)
    if sizes is None:
        return 1, math.inf
    least = int(sizes.lower)
    return least if least > ANY_BATCH else 1, float(sizes.upper)


def _check_evaluates(program: Any, file: Path) -> None:
    """Refuse a network in training: its results depend on chance and on the whole batch."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema else []
        values = dict(zip(names, node.args, strict=False))
        is_training = True in (values.get("training"), values.get("train"))
        # Instance normalisation is a batch normalisation that keeps nothing of the batch.
        if is_training and ("momentum" not in names or values.get("running_mean")):
            raise ModelError(
                f"{file}: the network was exported in training ({node.target}); export "
                "network.eval()"
            )


def _module(program: Any, place: str) -> Any:
    with _quiet():
        return move_to_device_pass(program, place).module()
