"""Users' classes: found, made and called, in the processes that run them and nowhere else.

Whatever user code does wrong becomes one of two things. What keeps it from starting, a class that
is not there or an `__init__` that raises, is a ModelError and ends the job. What it raises later is
a CustomCodeError, which costs a row: its message is one line, with the place in the user's file;
the traceback that it carries goes to the log whole. That `sys.exit` is among what it may raise is
why every exception is caught here.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, machinery, util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from evmp.errors import CustomCodeError, ModelError
from evmp.interface import PredictorInterface, PredictorInterfaceV2, Process
from evmp.setting import nearest

if TYPE_CHECKING:
    from evmp.value import ProcessConfig

log = logging.getLogger(__name__)

# Where EasyVision and EasyCV have the interface of predictors.
ALIASES: Final = ("easy_vision.python.inference.predictor", "easycv.predictors.interface")
MAX_MESSAGE_CHARS: Final = 500
_ABSTRACT: Final = (PredictorInterface.predict, PredictorInterfaceV2.predict)


class Caller:
    """Imports, makes and calls users' classes.

    Args:
        code: the folder that the user's archive was unpacked to, where there is one.
    """

    def __init__(self, code: Path | None) -> None:
        self._code = code

    def enter(self, threads: int = 1) -> None:
        """Make this process one that runs user code: from now on it imports it, and the aliases.

        Args:
            threads: that numeric libraries which it imports may start; one for each core, their
                usual choice, would be too many for several processes.
        """
        os.environ["OMP_NUM_THREADS"] = str(threads)
        sys.dont_write_bytecode = True
        if self._code is not None and str(self._code) not in sys.path:
            sys.path.insert(0, str(self._code))
            for name, file in self._taken():
                log.warning("user_resource: %s of yours is not used, %s is; rename it", name, file)
        if not any(isinstance(finder, _Aliases) for finder in sys.meta_path):
            sys.meta_path.append(_Aliases())

    def find(self, key: str, class_path: str) -> type:
        """Import a class.

        Args:
            key: of the job, for messages.
            class_path: `module.Class`.

        Raises:
            ModelError: when it cannot be imported, is not there, or is no class.
        """
        module_path, _, name = class_path.rpartition(".")
        try:
            with _one_process():
                module = import_module(module_path)
        except BaseException as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and f"{module_path}.".startswith(f"{missing}."):
                raise ModelError(f"{key}: there is no module {missing}{self._there()}") from None
            raise self._not_started(f"{key}: module {module_path} cannot be imported") from None
        self._check_origin(key, module)
        found = getattr(module, name, None)
        if not isinstance(found, type):
            classes = [it for it, value in vars(module).items() if isinstance(value, type)]
            what = f"has no class {name}" if found is None else f"has {name}, which is no class"
            raise ModelError(f"{key}: module {module_path} {what}{nearest(name, classes)}")
        return found

    def _there(self) -> str:
        """Say which modules there are."""
        if self._code is None:
            return " installed; user_resource names an archive or a file that brings it"
        names = sorted(path.stem for path in self._code.iterdir())
        return f" in user_resource, which has {', '.join(names[:10])}"

    def _check_origin(self, key: str, module: ModuleType) -> None:
        """Refuse a module of another place that has the name of one of the user's."""
        top = module.__name__.partition(".")[0]
        for name, file in self._taken():
            if name == top:
                raise ModelError(f"{key}: the name {top} is taken by {file}; rename your module")

    def _taken(self) -> Iterator[tuple[str, str]]:
        """Yield the names of user modules that those of other places have, and those' files."""
        for path in sorted(self._code.iterdir()) if self._code else ():
            module = sys.modules.get(path.stem)
            if module is None or not (path.suffix == ".py" or path.is_dir()):
                continue
            folder = next(iter(getattr(module, "__path__", ())), "one that is built in")
            file = getattr(module, "__file__", None) or folder
            if path.parent not in Path(file).parents:
                yield path.stem, file

    def make(self, key: str, kind: type, /, *arguments: object, **keywords: object) -> Any:
        """Make an object of a user's class.

        Raises:
            ModelError: when its `__init__` takes other arguments, or raises.
        """
        if misfit := misfit_of(kind, *arguments, **keywords):
            raise ModelError(f"{key}: {misfit}")
        what = f"{key}: {kind.__name__}.__init__ failed"
        return self.prepare(what, kind, *arguments, **keywords)

    def prepare(
        self, what: str, function: Callable[..., Any], /, *arguments: object, **keywords: object
    ) -> Any:
        """Call user code before the first row.

        Raises:
            ModelError: when it raises anything at all, in words that begin with `what`.
        """
        try:
            with _one_process():
                return function(*arguments, **keywords)
        except BaseException:
            raise self._not_started(what) from None

    def _not_started(self, what: str) -> ModelError:
        """Log the traceback of the exception at hand, and return the error that ends the job."""
        error = sys.exc_info()[1]
        assert error is not None
        log.error("%s", "".join(traceback.format_exception(error)).rstrip())
        return ModelError(f"{what}: {self.brief(error)}; its traceback is in the log above")

    def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Call user code.

        Raises:
            CustomCodeError: when it raises anything at all.
        """
        try:
            with _one_process():
                return function(*arguments)
        except BaseException as error:
            raise CustomCodeError(self.brief(error)) from error

    def destroy(self, made: object) -> None:
        """Call `destroy`, if there is one; what it raises is logged."""
        destroy = getattr(made, "destroy", None)
        if callable(destroy):
            try:
                with _one_process():
                    destroy()
            except BaseException:
                log.warning("%s.destroy failed", type(made).__name__, exc_info=True)

    def brief(self, error: BaseException) -> str:
        """Return an exception's type, message, and where in the user's code it was raised."""
        try:
            text = " ".join(str(error).split())
        except BaseException:
            text = "a message that cannot be read"
        text = text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 3] + "..."
        frames = list(traceback.extract_tb(error.__traceback__))
        own = [it for it in frames if self._code and Path(it.filename).is_relative_to(self._code)]
        outside = [it for it in frames if not it.filename.startswith(str(Path(__file__).parent))]
        place = ""
        if frames := own or outside:
            file = Path(frames[-1].filename)
            inner = file.relative_to(self._code) if own and self._code else Path(file.name)
            place = f" ({inner}:{frames[-1].lineno})"
        return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


class Predicting:
    """A user's predictor, called with checked samples, and answering with checked dicts.

    Args:
        caller: of this process.
        class_path, model_path, config: see the job's `user_predictor_cls` and what is beside it.
    """

    def __init__(self, caller: Caller, class_path: str, model_path: str, config: str) -> None:
        self._caller = caller
        kind = caller.find("user_predictor_cls", class_path)
        if getattr(kind, "predict", PredictorInterface.predict) in _ABSTRACT:
            raise ModelError(f"user_predictor_cls: {class_path} has no method predict")
        self._name = kind.__name__
        self._takes_samples = getattr(kind, "version", 1) == 2
        arguments: tuple[str | None, ...] = (model_path, config or None)
        if not config and misfit_of(kind, *arguments):
            arguments = (model_path,)
        self._made = caller.make("user_predictor_cls", kind, *arguments)
        self.output_type = self._read_output_type()

    def _read_output_type(self) -> dict[str, str]:
        ask: Any = getattr(self._made, "get_output_type", dict)
        found = self._caller.prepare(f"{self._name}.get_output_type failed", ask)
        kinds = ("json", "image", "video")
        if not isinstance(found, dict) or not all(kind in kinds for kind in found.values()):
            raise ModelError(
                f"{self._name}.get_output_type returned {found!r:.100}, expected a dict of keys "
                "to json, image or video"
            )
        return {str(key): kind for key, kind in found.items()}

    def predict(self, samples: Sequence[dict[Any, Any]]) -> list[dict[Any, Any]]:
        """Return one result for each sample.

        Raises:
            CustomCodeError: the predictor raises, or returns anything else.
        """
        data = list(samples) if self._takes_samples else [self._image(it) for it in samples]
        found = self._caller.call(self._made.predict, data, len(data))
        if not isinstance(found, (list, tuple)):
            raise CustomCodeError(
                f"{self._name}.predict returned {type(found).__name__}, expected a list of one "
                "dict a sample"
            )
        if len(found) != len(samples):
            raise CustomCodeError(
                f"{self._name}.predict returned {len(found)} results for {len(samples)} samples"
            )
        for result in found:
            if not isinstance(result, dict):
                raise CustomCodeError(
                    f"{self._name}.predict returned {type(result).__name__} for a sample, "
                    "expected a dict"
                )
        return list(found)

    def _image(self, sample: dict[Any, Any]) -> Any:
        """Return what a process has left, or made, under `image`."""
        if sample.get("image") is None:
            raise CustomCodeError(f"image: {self._name} takes images, and the sample has none")
        return sample["image"]

    def destroy(self) -> None:
        """Call the predictor's own, if it has one."""
        self._caller.destroy(self._made)


class Processing:
    """A user's process: samples in, for each the samples that it becomes out.

    Args:
        caller: of this process.
        config: its entry in `user_process_config`.
    """

    def __init__(self, caller: Caller, config: ProcessConfig) -> None:
        self._caller, self._batch_size = caller, config.batch_size
        class_path = config.user_process_cls
        kind = caller.find("user_process_cls", class_path)
        if not issubclass(kind, Process):
            raise ModelError(f"user_process_cls: {class_path} does not derive from evmp.Process")
        if kind.process is Process.process:
            raise ModelError(f"user_process_cls: {class_path} has no method process")
        self._name = config.job_name or kind.__name__
        self._made = caller.make("user_process_cls", kind, **(config.model_extra or {}))

    def process(self, samples: Sequence[dict[Any, Any]]) -> list[list[dict[Any, Any]]]:
        """Return what each of at most `batch_size` samples becomes.

        Raises:
            CustomCodeError: the process raises, or returns or puts what it may not.
        """
        put: list[Any] = []
        self._made._put = put
        if self._batch_size == 1:
            (sample,) = samples
            returned = self._caller.call(self._made.process, sample)
            found: list[list[Any]] = [put or ([] if returned is None else [returned])]
        else:
            returned = self._caller.call(self._made.process, list(samples))
            found = self._shared_out(samples, put) if put else self._checked(samples, returned)
        if put and returned is not None:
            raise CustomCodeError(f"{self._name}.process both put samples and returned some")
        for sample in (it for several in found for it in several):
            if not isinstance(sample, dict):
                raise CustomCodeError(
                    f"{self._name}.process gave {type(sample).__name__}, expected a sample, a dict"
                )
        return found

    def _checked(self, samples: Sequence[object], returned: Any) -> list[list[Any]]:
        """Return a returned list, None or a sample for each, as lists of samples."""
        if returned is None:
            return [[] for _ in samples]
        if not isinstance(returned, (list, tuple)) or len(returned) != len(samples):
            got = f"{len(returned)} samples" if isinstance(returned, (list, tuple)) else "no list"
            raise CustomCodeError(
                f"{self._name}.process returned {got} for {len(samples)} samples; expected as "
                "many, with None for those to drop"
            )
        return [[] if it is None else [it] for it in returned]

    def _shared_out(self, samples: Sequence[object], put: list[Any]) -> list[list[Any]]:
        """Return whose samples those are that were put: of several the given ones themselves."""
        if len(samples) == 1:
            return [put]
        if not all(any(it is sample for sample in samples) for it in put):
            raise CustomCodeError(
                f"{self._name}.process put new samples for {len(samples)}, and it cannot be told "
                "whose they are; put each sample itself, changed, or set batch_size: 1"
            )
        return [[it for it in put if it is sample] for sample in samples]

    def destroy(self) -> None:
        """Call the process's own, if it has one."""
        self._caller.destroy(self._made)


@contextmanager
def _one_process() -> Iterator[None]:
    """End a copy of this process that user code has forked, and that would come back as another."""
    here = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != here:
            error = sys.exc_info()[1]
            os._exit(0 if isinstance(error, SystemExit) and not error.code else 1)


def misfit_of(kind: type, /, *arguments: object, **keywords: object) -> str:
    """Return why a class does not take these arguments; empty where it does, or cannot be asked."""
    try:
        signature = inspect.signature(kind)
    except ValueError:
        return ""  # it is written in C
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        return f"{kind.__name__}{signature} does not take what it is given: {error}"
    return ""


def image_of(sample: dict[Any, Any]) -> Any:
    """Return the image of a sample, for a built-in model: (H, W, 3) uint8, C-contiguous.

    Raises:
        CustomCodeError: it has none.
    """
    image: Any = sample.get("image")
    is_image = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
    if not is_image or image.shape[2] != 3 or image.size == 0:
        found = "nothing" if image is None else _describe(image)
        raise CustomCodeError(f"image: got {found}, expected (H, W, 3) uint8")
    return np.ascontiguousarray(image)


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{shape} {value.dtype}"


class _Aliases:
    """Finds the interface under EasyVision's and EasyCV's names, where those are not installed.

    It stands last, so that a real package comes first, and what it has made up has no path, so that
    nothing is added to a real one.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> machinery.ModuleSpec | None:
        """Return the spec of a module that is an alias, or of a package on the way to one."""
        if path or not any(alias == name or alias.startswith(f"{name}.") for alias in ALIASES):
            return None
        return util.spec_from_loader(name, self, is_package=name not in ALIASES)  # type: ignore[arg-type]

    def create_module(self, spec: machinery.ModuleSpec) -> None:
        """Leave it to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the interface into the module."""
        if module.__name__ in ALIASES:
            for interface in (PredictorInterface, PredictorInterfaceV2):
                setattr(module, interface.__name__, interface)
