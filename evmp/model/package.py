"""A model package: a directory that holds a model's weights and says how to feed it.

    out/demo/model/
        model.yaml      what `evmp.model.spec` describes
        model.pt        the weights, of any of the kinds that `archive` tells apart
        labels.txt      one class name a line, where model.yaml names it

`load_package` reads and checks everything but the weights. It imports neither torch nor numpy, so
the supervisor may call it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evmp.document import Document, read_document, read_text
from evmp.errors import ConfigError, ModelError, Problem
from evmp.model.archive import files_of
from evmp.model.rule import READERS
from evmp.model.spec import (
    ModelBoxes,
    ModelFile,
    ModelInput,
    ModelOutput,
    ModelText,
)
from evmp.rule import TEAM
from evmp.setting import build, show

__all__ = [
    "ModelBoxes",
    "ModelInput",
    "ModelOutput",
    "ModelPackage",
    "ModelText",
    "check_model_type",
    "load_package",
]

MODEL_FILE = "model.yaml"
WEIGHTS_SUFFIXES = (".pt", ".pt2", ".onnx")
WEIGHTS_NAMES = "*.pt, *.pt2 or *.onnx"
MAX_LABEL_BYTES = 16 << 20
BACKGROUND = "background"
USUAL_ACTIVATION = {
    "multilabel_classifier": "sigmoid",
    "detector": "none",
    "text_detector": "none",
}


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
    parts: tuple[ModelPackage, ...] = ()
    """The detector's and the recognizer's package, for text_detection_recognition; it has no
    weights and no input of its own."""

    @property
    def models(self) -> tuple[ModelPackage, ...]:
        """The packages that have weights: this one, or its parts."""
        return self.parts or (self,)

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights, and the files beside them that an ONNX model keeps them in.

        Raises:
            ModelError: one cannot be read, or lies outside of the package.
        """
        return tuple(file for model in self.models for file in files_of(model.weights))

    @property
    def activation(self) -> str:
        """What turns scores into probabilities: `softmax`, `sigmoid` or `none`."""
        given = self.output.activation
        return USUAL_ACTIVATION.get(self.model_type, "softmax") if given == "auto" else given

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
        while max(count.values()) > 1:
            names = tuple(f"{x} ({n})" if count[x] > 1 else x for n, x in enumerate(names))
            count = Counter(names)
        return names

    @property
    def characters(self) -> tuple[str | None, ...]:
        """What each class of a model that reads text stands for.

        None is no character: the blank or the end token, and what is ignored. The labels are the
        other classes in order, and behind them, where the package says so, the space.

        Raises:
            ValueError: a class that is no character is not among them all, or is named twice.
        """
        text = self.output.text
        special = (text.blank if text.decoding == "ctc" else text.end, *text.ignored)
        characters = (*self.labels, *(" " if text.space else ""))
        n_classes = len(characters) + len(special)
        places = {number % n_classes for number in special if -n_classes <= number < n_classes}
        if len(places) < len(special):
            raise ValueError(
                f"got {', '.join(map(str, special))} for the classes that are no character, "
                f"expected {len(special)} different ones of the {n_classes} that there are with "
                f"{len(characters)} characters; correct it, or output.labels"
            )
        rest = iter(characters)
        return tuple(None if n in places else next(rest) for n in range(n_classes))

    def fingerprint(self) -> dict[str, Any]:
        """Return what must not change between the runs of one job, by content and not by name.

        Reads the weights whole, which took 0.6 s a GB where it was measured.

        Raises:
            ModelError: the weights cannot be read.
        """
        output = self.output.model_dump(mode="json", exclude={"labels"})
        if self.parts:
            parts = [part.fingerprint() for part in self.parts]
            return {"model_type": self.model_type, "output": output, "parts": parts}
        return {
            "model_type": self.model_type,
            "precision": self.precision,
            "input": self.input.model_dump(mode="json"),
            "output": output,
            "labels": hashlib.sha256("\n".join(self.labels).encode()).hexdigest(),
            "weights": _digest(self.files),
        }


def load_package(path: str | Path) -> ModelPackage:
    """Read a model package.

    Args:
        path: a directory with a model.yaml; a directory with a single file of weights, such as
            `*.pt`, which is taken for a classifier with the defaults of ModelFile; or that file
            itself, for which a model.yaml beside it counts.

    Raises:
        ModelError: there is no such package, or not exactly one file of weights.
        ConfigError: model.yaml is wrong; it lists every problem.
    """
    return _load(Path(path))


def _load(path: Path, wanted: str = "") -> ModelPackage:
    """Load a package, which shall be of the type `wanted` if one is named."""
    weights = _single_weights(path)
    directory = path if path.is_dir() else path.parent
    if not (directory / MODEL_FILE).exists():
        if wanted:
            raise ModelError(f"{path}: got no {MODEL_FILE}, expected that of a {wanted}")
        assert weights is not None
        return _assemble(ModelFile(model_type="classifier"), directory, weights, ())
    document = read_document(directory / MODEL_FILE)
    spec = build(ModelFile, document)
    if wanted and spec.model_type != wanted:
        message = f"got {spec.model_type}, expected {wanted}, as the package around it needs it"
        raise ConfigError(document.problem(("model_type",), message))
    if spec.model_type == TEAM:
        detector = _load(directory / spec.detector, "text_detector")
        recognizer = _load(directory / spec.recognizer, "text_recognizer")
        return replace(_assemble(spec, directory, directory, ()), parts=(detector, recognizer))
    weights = weights or directory / spec.weights
    if not weights.is_file():
        there = _in_brackets(_weights_in(directory))
        message = f"{show(spec.weights)} is not a file in {directory}{there}"
        raise ConfigError(document.problem(("weights",), message))
    package = _assemble(spec, directory, weights, _read_labels(spec, directory, document))
    if package.model_type in READERS:
        _check_characters(package, document)
    return package


def check_model_type(package: ModelPackage, model_type: str) -> None:
    """Refuse a package that is for another type of model than the job.

    Raises:
        ConfigError: the types differ.
    """
    if package.model_type != model_type:
        message = (
            f"got {model_type}, but the package {package.directory} is a {package.model_type}; "
            f"correct the job, or say model_type: {model_type} in its {MODEL_FILE}"
        )
        raise ConfigError(Problem(message, "model_type"))


def _single_weights(path: Path) -> Path | None:
    """Return the one file of weights that the path names, None where model.yaml names it."""
    if path.is_file():
        if path.suffix not in WEIGHTS_SUFFIXES:
            raise ModelError(f"{path}: expected a directory or a {WEIGHTS_NAMES} file")
        return path
    if not path.is_dir():
        raise ModelError(f"{path}: no such file or directory; correct model_path")
    if (path / MODEL_FILE).exists():
        return None
    found = _weights_in(path)
    if len(found) != 1:
        raise ModelError(
            f"{path}: got no {MODEL_FILE} and {len(found)} {WEIGHTS_NAMES} files"
            f"{_in_brackets(found)}, expected a {MODEL_FILE} or one such file"
        )
    return found[0]


def _weights_in(directory: Path) -> list[Path]:
    return sorted(file for file in directory.iterdir() if file.suffix in WEIGHTS_SUFFIXES)


def _in_brackets(files: list[Path]) -> str:
    return f" ({', '.join(file.name for file in files[:5])})" if files else ""


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
    # A file of characters may hold one that is white space.
    is_text = spec.model_type in READERS
    names = [name.removesuffix("\r") if is_text else name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        message = f"{directory / labels}: " + (
            f"line {names.index('') + 1} is empty, expected a name" if names else "no names"
        )
        raise ConfigError(document.problem(("output", "labels"), message))
    return tuple(names)


def _check_characters(package: ModelPackage, document: Document) -> None:
    try:
        assert package.characters
    except ValueError as error:
        raise ConfigError(document.problem(("output", "text"), str(error))) from None


def digests_of(path: str | Path) -> dict[str, Any]:
    """Return size and sha256 of a file, or of each file below a directory, by their names.

    Raises:
        ModelError: when there is nothing, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file or directory; correct model_path")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    return {str(file.relative_to(root)): _digest((file,)) for file in files if file.is_file()}


def _digest(files: tuple[Path, ...]) -> dict[str, Any]:
    digest = hashlib.sha256()
    n_bytes = 0
    for file in files:
        try:
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    n_bytes += len(block)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ModelError(f"{file}: cannot be read: {reason}") from error
    return {"bytes": n_bytes, "sha256": digest.hexdigest()}
