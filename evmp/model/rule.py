"""The rules of a model.yaml that join several keys.

Most keys say something to some types of model only, or only beside another key: what would not be
heeded is refused, because whoever has written it expects something of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING

from evmp.rule import CUSTOM, TEAM
from evmp.setting import Clash

if TYPE_CHECKING:
    from evmp.model.spec import ModelBoxes, ModelFile, ModelInput

CLASSES = ("classifier", "multilabel_classifier", "detector", "segmentor")
READERS = ("text_recognizer", "text_spotter")
# The types that heed a key of `output`.
HEEDED_BY: dict[str, tuple[str, ...]] = {
    "names": ("feature_extractor", *CLASSES, "text_detector", *READERS),
    "activation": (*CLASSES, "text_detector", *READERS),
    "labels": (*CLASSES, *READERS),
    "label_offset": CLASSES,
    "palette": ("segmentor",),
    "pooling": ("feature_extractor",),
    "boxes": ("detector",),
    "text.threshold": ("text_detector",),
    "text.dilate": ("text_detector",),
    "text.min_size": ("text_detector",),
    "text.unclip_ratio": ("text_detector",),
    "text.max_candidates": ("text_detector",),
    "text.box_threshold": ("text_detector", "text_spotter"),
    "text.unit": ("text_spotter",),
    "text.decoding": READERS,
    "text.blank": READERS,
    "text.end": READERS,
    "text.ignored": READERS,
    "text.space": READERS,
    "text.text_threshold": (TEAM, "text_spotter"),
}
# The keys of `input` that say something only where another one has a value.
HEEDED_WITH = {
    "resize_size": ("resize", "short_side"),
    "pad_color": ("resize", "letterbox"),
    "align": ("resize", "letterbox"),
    "min_height": ("size", "dynamic"),
    "min_width": ("size", "dynamic"),
    "multiple_of": ("size", "dynamic"),
    "enlarge_to": ("size", "dynamic"),
}


def clashes(spec: ModelFile) -> Iterator[Clash]:
    """Yield every rule that a model.yaml breaks."""
    yield from _input_clashes(spec.input)
    if spec.output.label_offset and not spec.output.labels:
        yield Clash(("output.label_offset",), "set without labels, expected labels as well")
    yield from _unheeded(spec)
    yield from _box_clashes(spec.output.boxes)
    yield from _text_clashes(spec)
    yield from _team_clashes(spec)
    if spec.model_type == CUSTOM:
        message = f"got {CUSTOM}, whose model the user's predictor opens; expected another type"
        yield Clash(("model_type",), message)


def _box_clashes(boxes: ModelBoxes) -> Iterator[Clash]:
    if boxes.across_classes and boxes.iou_threshold == 1:
        message = "set without iou_threshold, expected an iou_threshold below 1 as well"
        yield Clash(("output.boxes.across_classes",), message)
    if boxes.background_last and boxes.layout == "box_score_class":
        message = "set with layout: box_score_class, expected only where classes have columns"
        yield Clash(("output.boxes.background_last",), message)
    is_distances = boxes.layout == "distances"
    for name in ("format", "unit") if is_distances else ("strides",):
        if getattr(boxes, name) != type(boxes).model_fields[name].default:
            expected = "with another layout" if is_distances else "with distances"
            message = f"set with layout: {boxes.layout}, expected only {expected}"
            yield Clash((f"output.boxes.{name}",), message)


def _text_clashes(spec: ModelFile) -> Iterator[Clash]:
    if spec.model_type not in READERS:
        return
    text = spec.output.text
    if not spec.output.labels:
        message = f"required with model_type: {spec.model_type}, but missing; expected the "
        yield Clash(("output.labels",), message + "characters, or a file with one a line")
    name, other = ("end", "tokens") if text.decoding == "ctc" else ("blank", "ctc")
    if getattr(text, name):
        message = f"set with decoding: {text.decoding}, expected only with {other}"
        yield Clash((f"output.text.{name}",), message)


def _team_clashes(spec: ModelFile) -> Iterator[Clash]:
    """Yield what a package of two others leaves to them, and what only such a package says."""
    is_team = spec.model_type == TEAM
    for name in ("weights", "precision", "input") if is_team else ("detector", "recognizer"):
        if getattr(spec, name) != type(spec).model_fields[name].default:
            expected = "in the packages of detector and recognizer" if is_team else f"with {TEAM}"
            message = f"set with model_type: {spec.model_type}, expected only {expected}"
            yield Clash((name, "model_type"), message)


def _input_clashes(spec: ModelInput) -> Iterator[Clash]:
    given, least = spec.resize_size, max(spec.height, spec.width)
    if (spec.resize, spec.size) == ("short_side", "fixed") and 0 < given < least:
        message = f"got {given}, expected 0 or at least {least}, the larger of height and width"
        yield Clash(("input.resize_size",), message)
    for name, (key_, value) in HEEDED_WITH.items():
        is_default = getattr(spec, name) == type(spec).model_fields[name].default
        if not is_default and getattr(spec, key_) != value:
            message = f"set with {key_}: {getattr(spec, key_)}, expected only with {value}"
            yield Clash((f"input.{name}",), message)
    if spec.size == "dynamic":
        yield from _size_clashes(spec)


def _size_clashes(spec: ModelInput) -> Iterator[Clash]:
    """Yield the sides of a dynamic input that no image can have."""
    for name, (least, most, divisor) in zip(("height", "width"), spec.sides, strict=True):
        if least > most:
            message = f"got {least}, expected at most {name}, which is {most}"
            yield Clash((f"input.min_{name}",), message)
        for key_, side in ((name, most), (f"min_{name}", least)):
            if side % divisor:
                message = f"got {side}, expected a multiple of multiple_of, which is {divisor}"
                yield Clash((f"input.{key_}",), message)
    if spec.resize != "short_side":
        return
    longest = max(least for least, *_ in spec.sides)
    if 0 < spec.resize_size < longest:
        message = f"got {spec.resize_size}, expected 0 or at least {longest}, the smallest input's "
        yield Clash(("input.resize_size",), f"{message}longer side")
    if spec.enlarge_to:
        message = "set with resize: short_side, which resizes every image; expected resize_size"
        yield Clash(("input.enlarge_to",), message)


def _unheeded(spec: ModelFile) -> Iterator[Clash]:
    """Yield the keys of `output` that say nothing to a model of this type."""
    for name, types in HEEDED_BY.items():
        value = attrgetter(name)
        if value(spec.output) != value(type(spec.output)()) and spec.model_type not in types:
            message = f"set with model_type: {spec.model_type}, expected only with "
            yield Clash((f"output.{name}", "model_type"), message + " or ".join(types))
