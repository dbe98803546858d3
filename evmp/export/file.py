"""A package of a file of weights, whatever kind it is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from evmp.export import Request
from evmp.export.draft import ARCHIVE, Draft
from evmp.model import import_onnx
from evmp.model.archive import files_of, kind_of
from evmp.model.package import ModelInput
from evmp.model.rule import READERS
from evmp.setting import show

NAMES: Final = {"torchscript": ARCHIVE, "exported": "model.pt2", "onnx": "model.onnx"}
# Under this name the ONNX models of PP-OCR keep their characters; what goes with them is theirs.
CHARACTERS: Final = "character"
PP_OCR_INPUT: Final = {
    "size": "dynamic",
    "width": 3200,
    "min_width": 320,
    "resize": "letterbox",
    "align": "start",
    "pad_color": [128, 128, 128],
    "color_order": "bgr",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
PP_OCR_OUTPUT: Final = {"activation": "none", "text": {"space": True}}


def draft_of_file(request: Request) -> Draft:
    """Draft a package of a file.

    Raises:
        ModelError: it is none of the kinds, damaged, or cannot be loaded.
    """
    file = Path(request.source)
    kind = kind_of(file)
    spec: dict[str, Any] = {}
    labels: tuple[str, ...] = ()
    if kind == "onnx":
        session = import_onnx(file).open_session(file)
        shapes = {it.name: it.shape for it in session.get_inputs()}
        spec["input"] = _size_in(shapes)
        if [it.type for it in session.get_inputs()] == ["tensor(uint8)"]:
            spec["input"] |= {"scale": 1, "mean": [0, 0, 0], "std": [1, 1, 1]}
        characters = session.get_modelmeta().custom_metadata_map.get(CHARACTERS)
        if characters and request.model_type in READERS:
            labels = tuple(characters.rstrip("\n").split("\n"))
            spec = {"input": _line(spec["input"]), "output": PP_OCR_OUTPUT}
    elif kind == "exported":
        from evmp.model.exported import input_shapes, load_program
        from evmp.model.operators import register_operators

        register_operators(file)
        spec["input"] = _size_in(input_shapes(load_program(file)))
    return Draft(
        f"From {show(file.name)}",
        NAMES[kind],
        partial(_copy, file),
        {name: it for name, it in spec.items() if it},
        labels,
    )


def _size_in(shapes: Mapping[str, Sequence[object]]) -> dict[str, Any]:
    """Return height and width, where the only input's shape fixes them."""
    (shape,) = shapes.values() if len(shapes) == 1 else ((),)
    sides = zip(("height", "width"), shape[2:] if len(shape) == 4 else (), strict=False)
    return {name: size for name, size in sides if isinstance(size, int)}


def _line(size: Mapping[str, Any]) -> dict[str, Any]:
    """Return the input of a PP-OCR recogniser: a line of text, of one height and its own width."""
    height = size.get("height", 48)
    return {**PP_OCR_INPUT, "height": height, "min_height": height}


def _copy(file: Path, to: Path, spec: ModelInput) -> None:
    """Copy a file, and what it refers to, beside it under the same names."""
    _, *others = files_of(file)
    shutil.copyfile(file, to)
    for other in others:
        place = to.parent / other.relative_to(file.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(other, "rb") as source, open(place, "xb") as copy:
            shutil.copyfileobj(source, copy)
