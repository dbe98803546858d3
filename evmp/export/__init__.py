"""`evmp export`: a model package made of a file of weights, or of a network by its name.

The package is written beside its place, opened and run by the code that the stages run, and only
then moved there, in one step. What a source knows of its preprocessing and its labels is written
down in model.yaml.

    draft           a package to be
    file            of a TorchScript archive, a program of torch.export or an ONNX model
    torchvision     of torchvision's networks
    timm            of timm's
    network         what the last two share: weights, features, saving

All but this module's `export` is for a child process: torch and the libraries are imported there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from evmp import _native, machine
from evmp.child import call_in_child
from evmp.document import Document, is_utf8, parse_value, read_text
from evmp.errors import ConfigError, Interrupted, ModelError, Problem
from evmp.model.package import MAX_LABEL_BYTES, MODEL_FILE, ModelPackage, load_package
from evmp.model.rule import CLASSES, READERS
from evmp.model.spec import ModelFile
from evmp.rule import TEAM
from evmp.setting import build, show

if TYPE_CHECKING:
    from evmp.export.draft import Draft
    from evmp.job import Job

LABELS: Final = "labels.txt"
ZOOS: Final = ("torchvision", "timm")
MAX_SHOWN: Final = 300  # characters of a result
N_SHOWN: Final = 3  # classes of it


@dataclass(frozen=True, slots=True)
class Request:
    """What to make a package of."""

    source: str
    """A file, or `torchvision:resnet18` or the like."""
    model_type: str = ""
    """What model.yaml shall say; empty where the source knows it."""
    weights: str = ""
    """Of a network by name: a file, a name of the library's own, `none`, or empty for its best."""
    features: tuple[str, ...] = ()
    """Of a network by name: what to return, `layer4` or `layer4=map`."""
    n_classes: int = 0
    """Of a network by name: how many it tells apart; 0 is as many as the library's."""
    labels: str = ""
    """A file with one label a line; empty where the source knows them."""
    settings: tuple[str, ...] = ()
    """Keys of model.yaml, `input.height=320`."""

    @property
    def zoo(self) -> str:
        """The library that has the network; empty for a file."""
        library, colon, _ = self.source.partition(":")
        return library if colon and library in ZOOS else ""


def export(request: Request, folder: Path, *, force: bool = False) -> str:
    """Make a package in a folder, run it once, and say in words what came out.

    Args:
        force: replace a package that is there.

    Raises:
        ConfigError: a request that contradicts itself or the library, or a wrong setting.
        ModelError: the folder is there, or cannot be written; or the model cannot be had or run.
    """
    _check(request, folder, force)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _place_beside(folder) as place:
            draft = place / "package"
            draft.mkdir()
            said = _make_in_child(request, draft, folder)
            if folder.exists():
                _native.exchange(draft, folder)
            else:
                os.rename(draft, folder)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ModelError(f"{folder}: cannot be written: {reason}") from error
    files = ", ".join(sorted(str(it.relative_to(folder)) for it in folder.rglob("*.*")))
    return f"wrote        {folder}: {files}\n{said}"


@contextmanager
def _place_beside(folder: Path) -> Iterator[Path]:
    """Give an empty directory, in place of what an export of this folder left that was killed."""
    place = folder.parent / f".{folder.name}.evmp-export"
    place.mkdir(exist_ok=True)
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (place / "package").exists():
            shutil.rmtree(place / "package")
        try:
            yield place
        finally:
            shutil.rmtree(place)
    except BlockingIOError:
        raise ConfigError(f"{folder}: another export is writing it; wait for it") from None
    finally:
        os.close(fd)


def _make_in_child(request: Request, draft: Path, folder: Path) -> str:
    try:
        return call_in_child(partial(_make, request, draft))
    except (ModelError, ConfigError) as error:  # it shall name the place that people know
        raise type(error)(str(error).replace(str(draft), str(folder))) from None
    except Interrupted as error:
        raise Interrupted(error.signum, "no package was written") from None


def _check(request: Request, folder: Path, force: bool) -> None:
    if folder.exists() and not force:
        raise ConfigError(f"{folder}: is there already; name another, or replace it with --force")
    if folder.exists() and not (folder / MODEL_FILE).is_file():
        raise ConfigError(f"{folder}: is no model package, so it is not replaced; name another")
    if request.model_type == TEAM:
        raise ConfigError(f"--type: a {TEAM} is a folder of two packages; export each of them")
    if request.features and request.model_type not in ("", "feature_extractor"):
        raise ConfigError(
            f"--features: of a feature_extractor, but --type is {request.model_type}; leave one out"
        )
    if request.zoo:
        return
    for name, value in (
        ("--weights", request.weights),
        ("--features", request.features),
        ("--classes", request.n_classes),
    ):
        if value:
            raise ConfigError(f"{name}: only of use with torchvision:NAME and timm:NAME")
    if not request.model_type:
        raise ConfigError("--type: required but missing, it says what the model in the file does")


def _make(request: Request, folder: Path) -> str:
    """Write the package of a request, run it, and describe it; for a child process."""
    warnings.simplefilter("ignore")
    try:
        _write(request, _draft(request), folder)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ModelError(f"{error.filename or request.source}: {reason}") from error
    return _tried(load_package(folder))


def _draft(request: Request) -> Draft:
    if request.zoo == "torchvision":
        from evmp.export.torchvision import draft_of_torchvision

        return draft_of_torchvision(request)
    if request.zoo == "timm":
        from evmp.export.timm import draft_of_timm

        return draft_of_timm(request)
    from evmp.export.file import draft_of_file

    return draft_of_file(request)


def _write(request: Request, draft: Draft, folder: Path) -> None:
    values: dict[str, Any] = {"model_type": request.model_type, "weights": draft.weights}
    values = {**values, **draft.spec}
    labels = draft.labels
    if request.labels:
        labels = tuple(read_text(request.labels, MAX_LABEL_BYTES).rstrip("\n").split("\n"))
    if labels and values["model_type"] in (*CLASSES, *READERS):
        values["output"] = {**values.get("output", {}), "labels": LABELS}
    document = _with_settings(values, request.settings)
    spec = build(ModelFile, document)
    if spec.model_type == TEAM:
        raise ConfigError(f"--type: a {TEAM} is a folder of two packages; export each of them")
    if request.labels and not spec.output.labels:
        raise ConfigError(f"--labels: a {spec.model_type} has none")
    if request.labels and request.n_classes:
        _check_count(len(labels), spec.output.label_offset, request.n_classes)
    weights = folder / spec.weights
    weights.parent.mkdir(parents=True, exist_ok=True)
    draft.save(weights, spec.input)
    if labels and isinstance(spec.output.labels, str) and spec.output.labels:
        _create(folder / spec.output.labels, "".join(f"{label}\n" for label in labels))
    head = f"# {draft.origin}; written by evmp export.\n"
    text = yaml.safe_dump(
        document.values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    _create(folder / MODEL_FILE, head + text)


def _check_count(n_labels: int, offset: int, n_classes: int) -> None:
    if offset + n_labels != n_classes:
        raise ConfigError(
            f"--labels: {n_labels} labels from class {offset} on, but --classes is {n_classes}; "
            "correct one, or set -Doutput.label_offset=1 where class 0 is a background without a "
            "label"
        )


def _create(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "x", encoding="utf-8", newline="\n") as stream:
        stream.write(text)


def _with_settings(values: dict[str, Any], settings: Sequence[str]) -> Document:
    """Apply settings, each `input.height=320`, to the values of a model.yaml."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        *groups, name = path.split(".")
        if not equals or not name or not is_utf8(setting):
            raise ConfigError(Problem("expected -Dkey=value in UTF-8", show(setting), "-D"))
        try:
            value = parse_value(text)
        except ConfigError as error:
            message = f"got {show(text)}, {error.problems[0].message}"
            raise ConfigError(Problem(message, path, "-D")) from None
        inner = values
        for group in groups:
            inner[group] = dict(inner[group]) if isinstance(inner.get(group), dict) else {}
            inner = inner[group]
        inner[name] = value
    names = frozenset(setting.partition("=")[0].partition(".")[0] for setting in settings)
    return Document(MODEL_FILE, values, overridden=names)


def _tried(package: ModelPackage) -> str:
    """Run a package on a black image, and say what came out."""
    from evmp.head import open_head
    from evmp.model import open_model

    spec = package.input
    model = open_model(package, "cpu", 1, len(machine.cpus()))
    outputs = model.warm_up()
    shapes = ", ".join(
        f"{name}: {(1, *array.shape)} {array.dtype}" for name, array in outputs[0].items()
    )
    head = open_head(package, _job(package, next(iter(outputs[0]))))
    head.check(outputs)
    (result,) = head.results(outputs, [(spec.height, spec.width)])
    text = result.decode()
    size = f"{'up to ' * (spec.size == 'dynamic')}{spec.width} x {spec.height}"
    return (
        f"model        {package.model_type}, {size}, {spec.resize}, {spec.interpolation}\n"
        f"outputs      {shapes}\n"
        f"black image  {text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + '...'}"
    )


def _job(package: ModelPackage, feature_name: str) -> Job:
    """Return a job with nothing in it but what heads ask for."""
    from evmp.job import Job

    names = package.output.names
    if isinstance(names, dict):
        feature_name = names.get(feature_name, feature_name)
    elif names:
        feature_name = names[0]
    return Job.model_construct(
        model_type=package.model_type, feature_name=feature_name, top_k=N_SHOWN
    )
