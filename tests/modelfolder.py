"""Model packages of every type: as objects for the heads, and as folders for the command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from evmp.head import Head, open_head
from evmp.model.package import ModelInput, ModelOutput, ModelPackage

INPUT = {"height": 32, "width": 32, "resize": "stretch", "mean": [0, 0, 0], "std": [1, 1, 1]}
JOB = {
    "feature_name": "0",
    "top_k": 0,
    "multilabel_threshold": 0.5,
    "segmentation_output": "both",
}


def package_of(
    model_type: str,
    *,
    labels: tuple[str, ...] = (),
    input: Mapping[str, Any] | None = None,
    output: Mapping[str, Any] | None = None,
) -> ModelPackage:
    """Return a package of 32 x 32 pixels as `load_package` reads it; no file is there."""
    return ModelPackage(
        Path("model"),
        Path("model/model.pt"),
        model_type,
        "fp32",
        ModelInput.model_validate({**INPUT, **(input or {})}),
        ModelOutput.model_validate(output or {}),
        labels,
    )


def head_of(model_type: str, **options: Any) -> Head:
    """Open the head of such a package: `input`, `output` and `labels`, and keys of the job."""
    own = {name: options.pop(name) for name in ("input", "output", "labels") if name in options}
    return open_head(package_of(model_type, **own), SimpleNamespace(**{**JOB, **options}))


def result_of(
    head: Head, row: Mapping[str, Any], size: tuple[int, int] = (32, 32)
) -> dict[str, Any]:
    """Check a head with one image's outputs, and return the result that it makes of them.

    Args:
        row: arrays by name, or what becomes float32.
        size: (height, width) of the image.
    """
    outputs = [
        {k: v if isinstance(v, np.ndarray) else np.asarray(v, np.float32) for k, v in row.items()}
    ]
    head.check(outputs)
    (result,) = head.results(outputs, [size])
    return json.loads(result)


def write_package(
    folder: Path, network: Any, model_type: str, *, trace: Any = None, **keys: Any
) -> Path:
    """Write a package of 32 x 32 pixels in [0, 1] around a module that is scripted.

    Args:
        trace: an example to trace with, instead of scripting.
        keys: `input` and `output` of model.yaml; those of `input` join ours.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    network = network.eval()
    script = torch.jit.script(network) if trace is None else torch.jit.trace(network, trace)
    torch.jit.save(script, folder / "model.pt")
    keys["input"] = {**INPUT, **keys.get("input", {})}
    (folder / "model.yaml").write_text(yaml.safe_dump({"model_type": model_type, **keys}))
    return folder


def to_image(x: float, y: float, spec: Mapping[str, Any], size: tuple[int, int]) -> list[float]:
    """Say where a point of the input lies in the image, in the steps that a textbook would take.

    Args:
        x, y: pixels of the input.
        spec: `width`, `height`, `resize`, `resize_size` and `align` of model.yaml.
        size: (height, width) of the image.

    Returns: [x, y] in pixels of the image, inside it.
    """
    height, width = size
    if spec["resize"] == "stretch":
        x, y = x * width / spec["width"], y * height / spec["height"]
    elif spec["resize"] == "short_side":
        side, short = spec["resize_size"], min(size)
        rows = side if height == short else int(height * side / short)
        columns = side if width == short else int(width * side / short)
        left, top = round((columns - spec["width"]) / 2), round((rows - spec["height"]) / 2)
        x, y = (x + left) * width / columns, (y + top) * height / rows
    else:
        factor = min(spec["width"] / width, spec["height"] / height)
        rows, columns = max(1, round(height * factor)), max(1, round(width * factor))
        left, top = (spec["width"] - columns) // 2, (spec["height"] - rows) // 2
        if spec.get("align") == "start":
            left, top = 0, 0
        x, y = (x - left) * width / columns, (y - top) * height / rows
    return [min(max(x, 0), width), min(max(y, 0), height)]


def write_onnx(
    file: Path,
    nodes: Sequence[Any],
    outputs: Sequence[str],
    *,
    shape: Sequence[int | str] = ("N", 3, 32, 32),
    dtype: str = "FLOAT",
    inputs: Sequence[str] = ("image",),
    weights: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an ONNX model of a few nodes, each made by `onnx.helper.make_node`.

    Args:
        shape, dtype: of each of `inputs`; a name is a size that is not fixed.
        weights: what nodes take beside the inputs, by name.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    element = getattr(TensorProto, dtype)
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, element, shape) for name in inputs],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(model, dict(metadata or {}))
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)
    return file
