"""What a model.yaml may say: its keys, their defaults and the rules that join them.

Pixels reach the model as `(x * scale - mean) / std` by channel, with x in [0, 255] and the channels
in `color_order`; with the default scale of 1/255 and ImageNet's mean and std that is what
torchvision's weights expect. docs/model-package.md is the manual.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)
from typing_extensions import Self

from evmp.rule import CUSTOM, TEAM
from evmp.setting import (
    Clash,
    Integer,
    Number,
    Truth,
    from_text,
    key,
    raise_clashes,
    schema_of,
    show,
)
from evmp.value import ModelType

# torchvision resizes to 256 and crops 224; other sizes keep that proportion.
CROP_FRACTION = 224 / 256

PACKAGE, INPUT, OUTPUT, BOXES, TEXT = "Package", "Input", "Output", "Boxes", "Text"

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


def _triple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _fraction(value: object) -> object:
    """Read `1/255`, which no decimal fraction is equal to."""
    if not isinstance(value, str):
        return value
    above, _, below = value.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        message = f"got {show(value)}, expected a number or a fraction such as 1/255"
        raise ValueError(message) from None


def _distinct(value: Any) -> Any:
    names = list(value.values() if isinstance(value, dict) else value)
    if len(set(names)) < len(names):
        raise ValueError(f"got {show(names)}, expected names that differ")
    return value


def _inside(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or "\0" in value:
        raise ValueError(f"got {show(value)}, expected a file inside the package")
    return value


Fraction = Annotated[
    float,
    Field(strict=True, allow_inf_nan=False),
    BeforeValidator(_fraction, json_schema_input_type=float | str),
]
Triple = Annotated[tuple[Number, Number, Number], BeforeValidator(_triple)]
Divisor = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0), from_text(float)]
Divisors = Annotated[tuple[Divisor, Divisor, Divisor], BeforeValidator(_triple)]
Level = Annotated[int, Field(strict=True, ge=0, le=255), from_text(int)]
Color = Annotated[tuple[Level, Level, Level], BeforeValidator(_triple)]
Palette = Annotated[tuple[Color, ...], Field(max_length=256), BeforeValidator(_triple)]
InnerFile = Annotated[str, AfterValidator(_inside)]
ClassNumber = Annotated[Integer, Field(ge=-1_000_000, le=1_000_000)]
ClassNumbers = Annotated[
    tuple[ClassNumber, ...], BeforeValidator(_triple), AfterValidator(_distinct)
]
Stride = Annotated[Integer, Field(ge=1, le=1024)]
Strides = Annotated[
    tuple[Stride, ...], Field(min_length=1), BeforeValidator(_triple), AfterValidator(_distinct)
]
Label = Annotated[str, Field(min_length=1)]
Labels = Annotated[InnerFile | tuple[Label, ...], BeforeValidator(_triple)]
OutputNames = Annotated[
    tuple[Label, ...] | dict[Label, Label], BeforeValidator(_triple), AfterValidator(_distinct)
]


class ModelInput(BaseModel):
    """How an image becomes the model's input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Literal["fixed", "dynamic"] = key(
        INPUT,
        "fixed",
        "whether all images become one size, or each one that suits it, up to `height` and `width`",
    )
    height: Integer = key(
        INPUT, 224, "rows of the input, or of the largest", unit="pixels", ge=1, le=8192
    )
    width: Integer = key(
        INPUT, 224, "columns of the input, or of the largest", unit="pixels", ge=1, le=8192
    )
    min_height: Integer = key(
        INPUT,
        0,
        "rows of the smallest input of a dynamic size; 0 is `multiple_of`",
        unit="pixels",
        ge=0,
        le=8192,
    )
    min_width: Integer = key(
        INPUT, 0, "columns of the smallest likewise", unit="pixels", ge=0, le=8192
    )
    multiple_of: Integer = key(
        INPUT,
        32,
        "what divides the sides of an input of a dynamic size; not a side whose smallest is also "
        "its largest",
        unit="pixels",
        ge=1,
        le=1024,
    )
    enlarge_to: Integer = key(
        INPUT,
        0,
        "how long the shorter side of an image may become when it is enlarged to a dynamic size, 1 "
        "enlarges none; 0 is as long as the largest input has room for",
        unit="pixels",
        ge=0,
        le=8192,
    )
    resize: Literal["short_side", "stretch", "letterbox"] = key(
        INPUT,
        "short_side",
        "how an image becomes that size",
    )
    resize_size: Integer = key(
        INPUT,
        0,
        "the shorter side before the crop; 0 is 256/224 of the larger of `height` and `width`",
        unit="pixels",
        ge=0,
        le=16384,
    )
    interpolation: Literal["bilinear", "bicubic"] = key(
        INPUT, "bilinear", "the filter, antialiased when it shrinks"
    )
    pad_color: Color = key(INPUT, (0, 0, 0), "the red, green and blue around a letterboxed image")
    align: Literal["center", "start"] = key(
        INPUT, "center", "where a letterboxed image lies: in the middle, or at the left and the top"
    )
    color_order: Literal["rgb", "bgr"] = key(INPUT, "rgb", "the order of the model's channels")
    scale: Fraction = key(INPUT, 1 / 255, "the factor of pixel values; `1/255` may be so written")
    mean: Triple = key(
        INPUT, (0.485, 0.456, 0.406), "taken off the scaled values, by channel in `color_order`"
    )
    std: Divisors = key(
        INPUT, (0.229, 0.224, 0.225), "what they are then divided by, by channel in `color_order`"
    )

    @property
    def short_side(self) -> int:
        """The shorter side in pixels before the crop; for `resize: short_side` only."""
        return self.resize_size or round(max(self.height, self.width) / CROP_FRACTION)

    @property
    def sides(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Rows and columns of the input: the fewest, the most, and what divides them."""
        return (
            self._side(self.min_height, self.height),
            self._side(self.min_width, self.width),
        )

    def _side(self, least: int, most: int) -> tuple[int, int, int]:
        if self.size == "fixed" or least == most:
            return most, most, 1
        return least or self.multiple_of, most, self.multiple_of


class ModelBoxes(BaseModel):
    """How a detector's output becomes boxes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal[
        "separate", "box_classes", "box_objectness_classes", "box_score_class", "distances"
    ] = key(
        BOXES,
        "separate",
        "what holds boxes, scores and classes: outputs of their own, the columns of one, or for "
        "each stride an output of scores and one of distances",
    )
    strides: Strides = key(
        BOXES,
        (8, 16, 32, 64),
        "the pixels of the input from cell to cell, with `layout: distances`",
    )
    transposed: Truth = key(
        BOXES, False, "the boxes are along the last axis, (4 + classes, N) for (N, 4 + classes)"
    )
    format: Literal["xyxy", "yxyx", "xywh", "cxcywh"] = key(
        BOXES,
        "xyxy",
        "the four numbers of a box: corners; left, top, width, height; or the centre's x and y, "
        "width, height",
    )
    unit: Literal["pixel", "fraction"] = key(
        BOXES, "pixel", "what they count: pixels of the model's input, or fractions of its sides"
    )
    background_last: Truth = key(
        BOXES, False, "the last column of class scores stands for nothing, as DETR has it"
    )
    score_threshold: Number = key(BOXES, 0.05, "boxes with a lower score are dropped", ge=0, le=1)
    iou_threshold: Number = key(
        BOXES,
        1.0,
        "of two boxes of a class whose intersection over union is larger the worse is dropped; 1 "
        "drops none, for a model that has done it itself",
        gt=0,
        le=1,
    )
    across_classes: Truth = key(BOXES, False, "do so whatever the classes of the two are")
    max_detections: Integer = key(
        BOXES, 300, "the best so many boxes of an image are kept", ge=1, le=100_000
    )


class ModelText(BaseModel):
    """How the output of a model of text becomes lines and characters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: Number = key(
        TEXT, 0.3, "pixels of a text detector's map are text where they are above it", ge=0, le=1
    )
    dilate: Truth = key(
        TEXT, False, "widen what is text by a pixel to the right and the bottom, as PP-OCR can"
    )
    min_size: Number = key(
        TEXT,
        3,
        "lines whose shorter side has fewer pixels of the map are dropped, as are those that have "
        "less than 2 more when they have grown",
        ge=0,
    )
    unclip_ratio: Number = key(
        TEXT,
        1.5,
        "lines grow on each side by their area times this over their circumference",
        ge=0,
        le=10,
    )
    max_candidates: Integer = key(
        TEXT, 1000, "so many outlines of an image are looked at", ge=1, le=100_000
    )
    box_threshold: Number = key(TEXT, 0.6, "lines with a lower score are dropped", ge=0, le=1)
    unit: Literal["pixel", "fraction"] = key(
        TEXT, "pixel", "what points count: pixels of the model's input, or fractions of its sides"
    )
    decoding: Literal["ctc", "tokens"] = key(
        TEXT,
        "ctc",
        "how steps become a text: repetitions and blanks fall away, or it goes up to an end token",
    )
    blank: ClassNumber = key(TEXT, 0, "the class of CTC's blank; -1 is the last, as everywhere")
    end: ClassNumber = key(TEXT, 0, "the class of the end token")
    ignored: ClassNumbers = key(
        TEXT, (), "further classes that are no character: the start token, padding, the unknown"
    )
    space: Truth = key(
        TEXT, False, "the class behind the labels is the space, which a file of labels can hold not"
    )
    text_threshold: Number = key(
        TEXT, 0, "lines that are read with a lower score are dropped", ge=0, le=1
    )


class ModelOutput(BaseModel):
    """How the model's output becomes a result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: OutputNames = key(
        OUTPUT,
        (),
        "names for the model's outputs: a list where it returns them in order, called 0, 1 and so "
        "on, or a mapping of its names to others",
    )
    activation: Literal["auto", "softmax", "sigmoid", "none"] = key(
        OUTPUT,
        "auto",
        "what turns scores into probabilities; `none` where they are; `auto` is softmax for "
        "classifier, segmentor and readers of text, sigmoid for multilabel_classifier, none for "
        "detectors",
    )
    palette: Palette = key(
        OUTPUT,
        (),
        "the red, green and blue of each class from 0 on, in the PNG of `segmentation_output: "
        "png`; by default those of PASCAL VOC",
    )
    labels: Labels = key(
        OUTPUT,
        "",
        "the class names: a list, or a file in the package with one name a line; by default "
        "classes are named by their numbers; of a model that reads text, its characters",
    )
    label_offset: Integer = key(
        OUTPUT, 0, "the class of the first label; 1 where class 0 is the background", ge=0, le=1000
    )
    pooling: Literal["average", "flatten"] = key(
        OUTPUT, "average", "how a feature of (C, H, W) becomes a list: C means, or all its numbers"
    )
    boxes: ModelBoxes = key(OUTPUT, ModelBoxes(), "how a detector's output becomes boxes")
    text: ModelText = key(OUTPUT, ModelText(), "how the output of a model of text becomes lines")


class ModelFile(BaseModel):
    """What model.yaml may say."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_type: ModelType = key(
        PACKAGE, ..., "what the model does; a job must say the same", example="classifier"
    )
    weights: InnerFile = key(PACKAGE, "model.pt", "the file with the weights", min_length=1)
    precision: Literal["fp32", "fp16", "bf16"] = key(
        PACKAGE, "fp32", "the arithmetic the model runs in"
    )
    detector: InnerFile = key(
        PACKAGE, "detector", f"the folder with the package that finds lines; for {TEAM}"
    )
    recognizer: InnerFile = key(
        PACKAGE, "recognizer", f"the folder with the package that reads them; for {TEAM}"
    )
    input: ModelInput = key(PACKAGE, ModelInput(), "how an image becomes the model's input")
    output: ModelOutput = key(PACKAGE, ModelOutput(), "how the model's output becomes a result")

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        raise_clashes(_clashes(self), info)
        return self


def package_schema() -> dict[str, Any]:
    """Return the JSON schema of model.yaml."""
    return {**schema_of(ModelFile), "title": "evmp model package"}


def _clashes(spec: ModelFile) -> Iterator[Clash]:
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
        if getattr(boxes, name) != ModelBoxes.model_fields[name].default:
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
        if getattr(spec, name) != ModelFile.model_fields[name].default:
            expected = "in the packages of detector and recognizer" if is_team else f"with {TEAM}"
            message = f"set with model_type: {spec.model_type}, expected only {expected}"
            yield Clash((name, "model_type"), message)


def _input_clashes(spec: ModelInput) -> Iterator[Clash]:
    given, least = spec.resize_size, max(spec.height, spec.width)
    if (spec.resize, spec.size) == ("short_side", "fixed") and 0 < given < least:
        message = f"got {given}, expected 0 or at least {least}, the larger of height and width"
        yield Clash(("input.resize_size",), message)
    for name, (key_, value) in HEEDED_WITH.items():
        is_default = getattr(spec, name) == ModelInput.model_fields[name].default
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
        if value(spec.output) != value(ModelOutput()) and spec.model_type not in types:
            message = f"set with model_type: {spec.model_type}, expected only with "
            yield Clash((f"output.{name}", "model_type"), message + " or ".join(types))
