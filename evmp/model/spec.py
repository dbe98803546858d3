"""What a model.yaml may say: its keys and their defaults; `rule` joins them.

Pixels reach the model as `(x * scale - mean) / std` by channel, with x in [0, 255] and the channels
in `color_order`; with the default scale of 1/255 and ImageNet's mean and std that is what
torchvision's weights expect. docs/model-package.md is the manual.
"""

from __future__ import annotations

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

from evmp.model.rule import clashes
from evmp.rule import TEAM
from evmp.setting import (
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
        raise_clashes(clashes(self), info)
        return self


def package_schema() -> dict[str, Any]:
    """Return the JSON schema of model.yaml."""
    return {**schema_of(ModelFile), "title": "evmp model package"}
