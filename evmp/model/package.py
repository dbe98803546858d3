"""A model package: a directory that holds a model's weights and says how to feed it.

    out/demo/model/
        model.yaml      what this module describes
        model.pt        the weights, a TorchScript archive
        labels.txt      one class name a line, where model.yaml names it

`load_package` reads and checks everything but the weights; it imports neither torch nor numpy, so
the supervisor may call it. Pixels reach the model as `(x * scale - mean) / std` by channel, with x
in [0, 255] and the channels in `color_order`; with the default scale of 1/255 and ImageNet's mean
and std that is what torchvision's weights expect.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
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

from evmp.document import Document, read_document, read_text
from evmp.errors import ConfigError, ModelError, Problem
from evmp.rule import AVAILABLE_MODEL_TYPES
from evmp.setting import (
    Clash,
    Integer,
    Number,
    build,
    from_text,
    key,
    raise_clashes,
    schema_of,
    show,
)
from evmp.value import ModelType

MODEL_FILE = "model.yaml"
WEIGHTS_SUFFIX = ".pt"
MAX_LABEL_BYTES = 16 << 20
# torchvision resizes to 256 and crops 224; other sizes keep that proportion.
CROP_FRACTION = 224 / 256
BACKGROUND = "background"

PACKAGE, INPUT, OUTPUT = "Package", "Input", "Output"


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
InnerFile = Annotated[str, AfterValidator(_inside)]
Label = Annotated[str, Field(min_length=1)]
Labels = Annotated[InnerFile | tuple[Label, ...], BeforeValidator(_triple)]


class ModelInput(BaseModel):
    """How an image becomes the model's input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    height: Integer = key(INPUT, 224, "rows of the input", unit="pixels", ge=1, le=8192)
    width: Integer = key(INPUT, 224, "columns of the input", unit="pixels", ge=1, le=8192)
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


class ModelOutput(BaseModel):
    """How the model's output becomes a result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    activation: Literal["softmax", "sigmoid", "none"] = key(
        OUTPUT, "softmax", "what turns the output into probabilities; `none` where it holds them"
    )
    labels: Labels = key(
        OUTPUT,
        "",
        "the class names: a list, or a file in the package with one name a line; by default "
        "classes are named by their numbers",
    )
    label_offset: Integer = key(
        OUTPUT, 0, "the class of the first label; 1 where class 0 is the background", ge=0, le=1000
    )


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
    input: ModelInput = key(PACKAGE, ModelInput(), "how an image becomes the model's input")
    output: ModelOutput = key(PACKAGE, ModelOutput(), "how the model's output becomes a result")

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        raise_clashes(_clashes(self), info)
        return self


@dataclass(frozen=True, slots=True)
class ModelPackage:
    """A package that was read and checked, but for the weights themselves."""

    directory: Path
    weights: Path
    model_type: str
    precision: str
    input: ModelInput
    output: ModelOutput
    labels: tuple[str, ...]
    """The names as listed, of the classes from `output.label_offset` on; empty without labels."""

    def class_names(self, n_classes: int) -> tuple[str, ...]:
        """Name the classes 0 to `n_classes` - 1, each differently.

        Without labels a class is named by its number. Classes before `label_offset` are the
        background. A name that is listed more than once, as ImageNet's two "crane" are, gets the
        class number behind it: "crane (134)" and "crane (517)".

        Raises:
            ModelError: the number of labels does not fit the number of classes.
        """
        if not self.labels:
            return tuple(str(number) for number in range(n_classes))
        offset = self.output.label_offset
        if offset + len(self.labels) != n_classes:
            raise ModelError(
                f"{self.directory}: the model has {n_classes} classes, but there are "
                f"{len(self.labels)} labels from class {offset} on; correct output.labels or "
                f"output.label_offset in {MODEL_FILE}"
            )
        names = (*(BACKGROUND for _ in range(offset)), *self.labels)
        count = Counter(names)
        return tuple(f"{x} ({n})" if count[x] > 1 else x for n, x in enumerate(names))

    def fingerprint(self) -> dict[str, Any]:
        """Return what must not change between the runs of one job, by content and not by name.

        Reads the weights whole, at 0.4 to 1.7 GB/s.
        """
        return {
            "model_type": self.model_type,
            "precision": self.precision,
            "input": self.input.model_dump(mode="json"),
            "output": self.output.model_dump(mode="json", exclude={"labels"}),
            "labels": hashlib.sha256("\n".join(self.labels).encode()).hexdigest(),
            "weights": _digest(self.weights),
        }


def load_package(path: str | Path) -> ModelPackage:
    """Read a model package.

    Args:
        path: a directory with a model.yaml; a directory with a single `*.pt` file, which is taken
            for a classifier with the defaults of ModelFile; or a `*.pt` file itself, for which a
            model.yaml beside it counts.

    Raises:
        ModelError: there is no such package, or not exactly one file of weights.
        ConfigError: model.yaml is wrong; it lists every problem.
    """
    path = Path(path)
    weights = _single_weights(path)
    directory = path if path.is_dir() else path.parent
    if not (directory / MODEL_FILE).exists():
        assert weights is not None
        return _assemble(ModelFile(model_type="classifier"), directory, weights, ())
    document = read_document(directory / MODEL_FILE)
    spec = build(ModelFile, document)
    weights = weights or directory / spec.weights
    if not weights.is_file():
        message = f"{show(spec.weights)} is not a file in {directory}{_weights_there(directory)}"
        raise ConfigError(document.problem(("weights",), message))
    return _assemble(spec, directory, weights, _read_labels(spec, directory, document))


def check_model_type(package: ModelPackage, model_type: str) -> None:
    """Refuse a package that is for another type of model than the job.

    Raises:
        ConfigError: the types differ.
    """
    if package.model_type != model_type:
        message = (
            f"got {model_type}, but the package {package.directory} is a {package.model_type}; "
            f"correct the job or model_type in {MODEL_FILE}"
        )
        raise ConfigError(Problem(message, "model_type"))


def package_schema() -> dict[str, Any]:
    """Return the JSON schema of model.yaml."""
    return {**schema_of(ModelFile), "title": "evmp model package"}


def _clashes(spec: ModelFile) -> Iterator[Clash]:
    given, least = spec.input.resize_size, max(spec.input.height, spec.input.width)
    if spec.input.resize == "short_side" and 0 < given < least:
        message = f"got {given}, expected 0 or at least {least}, the larger of height and width"
        yield Clash(("input.resize_size",), message)
    for name, mode in (("resize_size", "short_side"), ("pad_color", "letterbox")):
        default = ModelInput.model_fields[name].default
        if spec.input.resize != mode and getattr(spec.input, name) != default:
            message = f"set with resize: {spec.input.resize}, expected only with {mode}"
            yield Clash((f"input.{name}",), message)
    if spec.output.label_offset and not spec.output.labels:
        yield Clash(("output.label_offset",), "set without labels, expected labels as well")
    if spec.model_type not in AVAILABLE_MODEL_TYPES:
        message = f"{spec.model_type} is not available in this version, expected "
        yield Clash(("model_type",), message + " or ".join(AVAILABLE_MODEL_TYPES))


def _single_weights(path: Path) -> Path | None:
    """Return the one file of weights that the path names, None where model.yaml names it."""
    if path.is_file():
        if path.suffix != WEIGHTS_SUFFIX:
            raise ModelError(f"{path}: expected a directory or a *{WEIGHTS_SUFFIX} file")
        return path
    if not path.is_dir():
        raise ModelError(f"{path}: no such file or directory; correct model_path")
    if (path / MODEL_FILE).exists():
        return None
    found = sorted(path.glob(f"*{WEIGHTS_SUFFIX}"))
    if len(found) != 1:
        raise ModelError(
            f"{path}: got no {MODEL_FILE} and {len(found)} *{WEIGHTS_SUFFIX} files"
            f"{_weights_there(path)}, expected a {MODEL_FILE} or one *{WEIGHTS_SUFFIX} file"
        )
    return found[0]


def _weights_there(directory: Path) -> str:
    names = sorted(file.name for file in directory.glob(f"*{WEIGHTS_SUFFIX}"))
    return f" ({', '.join(names[:5])})" if names else ""


def _assemble(
    spec: ModelFile, directory: Path, weights: Path, labels: tuple[str, ...]
) -> ModelPackage:
    return ModelPackage(
        directory, weights, spec.model_type, spec.precision, spec.input, spec.output, labels
    )


def _read_labels(spec: ModelFile, directory: Path, document: Document) -> tuple[str, ...]:
    labels = spec.output.labels
    if not isinstance(labels, str):
        return labels
    if not labels:
        return ()
    try:
        names = read_text(directory / labels, MAX_LABEL_BYTES).split("\n")
    except ConfigError as error:
        message = str(error)
        raise ConfigError(document.problem(("output", "labels"), message)) from error
    while names and not names[-1].strip():
        names.pop()
    names = [name.strip() for name in names]
    if not names or "" in names:
        message = f"{directory / labels}: " + (
            f"line {names.index('') + 1} is empty, expected a name" if names else "no names"
        )
        raise ConfigError(document.problem(("output", "labels"), message))
    return tuple(names)


def _digest(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    n_bytes = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            n_bytes += len(block)
    return {"bytes": n_bytes, "sha256": digest.hexdigest()}
