"""Users' classes: imported, made and called; what they do wrong, in words."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evmp.custom import Caller, Predicting, Processing, image_of
from evmp.errors import CustomCodeError, ModelError
from evmp.value import ProcessConfig

IMAGE = np.zeros((2, 3, 3), np.uint8)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Caller]]:
    """`make(text)`: a caller whose user's code is a file `mine.py` with this text."""
    modules, path, finders = dict(sys.modules), list(sys.path), list(sys.meta_path)

    def make(text: str) -> Caller:
        (tmp_path / "mine.py").write_text(text)
        caller = Caller(tmp_path)
        caller.enter()
        return caller

    yield make
    sys.path[:], sys.meta_path[:] = path, finders
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]


def predicting(caller: Caller, config: str = "") -> Predicting:
    return Predicting(caller, "mine.Mine", "model", config)


def processing(caller: Caller, **config: Any) -> Processing:
    return Processing(caller, ProcessConfig(user_process_cls="mine.Mine", **config))


# --- finding and making ---------------------------------------------------------------------------

PREDICTOR = """
from {module} import {name}
class Mine({name}):
    def __init__(self, model_path, model_config=None):
        self.given = [model_path, model_config]
    def predict(self, input_data, batch_size):
        return [{{"type": type(it).__name__, "n": batch_size, "given": self.given}}
                for it in input_data]
"""


@pytest.mark.parametrize(
    "module",
    ["evmp", "easy_vision.python.inference.predictor", "easycv.predictors.interface"],
)
@pytest.mark.parametrize(
    ("name", "kind"), [("PredictorInterface", "ndarray"), ("PredictorInterfaceV2", "dict")]
)
def test_predictor_of_either_version_runs_whatever_it_imports(
    make: Callable[[str], Caller], module: str, name: str, kind: str
) -> None:
    mine = predicting(make(PREDICTOR.format(module=module, name=name)), '{"a": 1}')

    found = mine.predict([{"image": IMAGE}, {"image": IMAGE}])

    assert found == [{"type": kind, "n": 2, "given": ["model", '{"a": 1}']}] * 2
    assert mine.output_type == {}


def test_aliases_give_way_to_an_installed_package(
    make: Callable[[str], Caller], tmp_path: Path
) -> None:
    (tmp_path / "easycv").mkdir()
    (tmp_path / "easycv" / "__init__.py").write_text("real = True")
    caller = make("import easycv\nclass Mine: pass\n")

    assert vars(sys.modules[caller.find("key", "mine.Mine").__module__])["easycv"].real
    with pytest.raises(ModuleNotFoundError):
        __import__("easycv.predictors.interface")


def test_aliases_are_unknown_where_no_user_code_runs() -> None:
    with pytest.raises(ModuleNotFoundError):
        __import__("easycv.predictors.interface")


@pytest.mark.parametrize("arguments", ["path", "path, config", "path, config=None", "path, *more"])
def test_class_needs_no_base_and_may_take_the_path_alone(
    make: Callable[[str], Caller], arguments: str
) -> None:
    text = f"""
class Mine:
    version = 2
    def __init__(self, {arguments}): self.path = path
    def predict(self, samples, batch_size): return [{{"path": self.path}} for _ in samples]
"""
    assert predicting(make(text)).predict([{}]) == [{"path": "model"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Mina: pass", "module mine has no class Mine, did you mean Mina?"),
        ("Mine = 3", "has Mine, which is no class"),
        ("import nowhere", "module mine cannot be imported: ModuleNotFoundError: No module named"),
        ("x = (", "module mine cannot be imported: SyntaxError"),
        ("import sys; sys.exit(3)", "module mine cannot be imported: SystemExit: 3 (mine.py:1)"),
        ("class Mine: pass", "mine.Mine has no method predict"),
        (
            "from evmp import PredictorInterface\nclass Mine(PredictorInterface): pass",
            "mine.Mine has no method predict",
        ),
        (
            "class Mine:\n def __init__(self): pass\n def predict(self): pass",
            "Mine() does not take what it is given: too many positional arguments",
        ),
        (
            "class Mine:\n def predict(self): pass\n def __init__(self, path, config):\n  1 / 0",
            "Mine.__init__ failed: ZeroDivisionError: division by zero (mine.py:4)",
        ),
        (
            "class Mine:\n def predict(self): pass\n"
            " def __init__(self, path, config):\n  raise SystemExit",
            "Mine.__init__ failed: SystemExit (mine.py:4)",
        ),
        (
            "class Mine:\n def __init__(self, path, config): pass\n def predict(self): pass\n"
            " def get_output_type(self): return {'mask': 'picture'}",
            "expected a dict of keys to json, image or video",
        ),
    ],
)
def test_predictor_that_cannot_start_is_told(
    make: Callable[[str], Caller], text: str, message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        predicting(make(text), "{}")

    assert message in str(caught.value)


def test_traceback_of_a_failed_start_is_logged_whole(
    make: Callable[[str], Caller], caplog: pytest.LogCaptureFixture
) -> None:
    caller = make("class Mine:\n def predict(self): 0\n def __init__(self, path):\n  self.load()")

    with pytest.raises(ModelError, match="AttributeError"):
        predicting(caller)

    assert 'mine.py", line 4, in __init__' in caplog.text


def test_module_that_is_not_there_is_told_with_those_that_are(
    make: Callable[[str], Caller], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="no module mind in user_resource, which has mine"):
        make("").find("user_predictor_cls", "mind.Mine")
    with pytest.raises(ModelError, match=r"no module mind installed; user_resource names"):
        Caller(None).find("user_predictor_cls", "mind.Mine")


def test_module_whose_name_is_taken_is_told(
    make: Callable[[str], Caller], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "numpy.py").write_text("class Mine: pass")
    (tmp_path / "json").mkdir()
    (tmp_path / "own").mkdir()

    with pytest.raises(ModelError, match=r"the name numpy is taken by .*; rename your module"):
        make("import own").find("user_predictor_cls", "numpy.Mine")

    assert "user_resource: json of yours is not used, " in caplog.text
    assert "user_resource: numpy of yours is not used, " in caplog.text
    assert make("import own; class Mine: pass".replace("; ", "\n")).find("mine", "mine.Mine")
    assert "own of yours" not in caplog.text


def test_exception_whose_message_raises_is_an_exception_all_the_same(
    make: Callable[[str], Caller],
) -> None:
    text = "class Bad(Exception):\n def __str__(self): exit(1)\nclass Mine:\n"
    text += " def predict(self): 0\n def __init__(self, path): raise Bad"

    with pytest.raises(ModelError, match=r"Bad: a message that cannot be read \(mine.py:5\)"):
        predicting(make(text))


# --- predicting -----------------------------------------------------------------------------------

ANSWER = """
class Mine:
    version = 2
    def __init__(self, path): pass
    def predict(self, samples, batch_size):
        return {answer}
"""


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("None", "Mine.predict returned NoneType, expected a list of one dict a sample"),
        ("{}", "Mine.predict returned dict, expected a list"),
        ("[{}]", "Mine.predict returned 1 results for 2 samples"),
        ("[{}, 'x']", "Mine.predict returned str for a sample, expected a dict"),
        ("samples[0]['none']", "KeyError: 'none' (mine.py:6)"),
        ("exit(4)", "SystemExit: 4 (mine.py:6)"),
        ("(_ for _ in ()).throw(KeyboardInterrupt)", "KeyboardInterrupt (mine.py:6)"),
        ("(_ for _ in ()).throw(OSError('two\\nlines'))", "OSError: two lines (mine.py:6)"),
        ("int('x' * 9999)", "ValueError: invalid literal for int() with base 10: 'xxx"),
    ],
)
def test_what_a_predictor_does_wrong_is_one_line(
    make: Callable[[str], Caller], answer: str, message: str
) -> None:
    mine = predicting(make(ANSWER.format(answer=answer)))

    with pytest.raises(CustomCodeError) as caught:
        mine.predict([{}, {}])

    assert message in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sample", "found"),
    [
        ({}, "nothing"),
        ({"image": None}, "nothing"),
        ({"image": "a.jpg"}, "str"),
        ({"image": np.zeros((2, 2), np.uint8)}, r"\(2, 2\) uint8"),
        ({"image": np.zeros((2, 2, 3))}, r"\(2, 2, 3\) float64"),
        ({"image": np.zeros((2, 2, 4), np.uint8)}, r"\(2, 2, 4\) uint8"),
        ({"image": np.zeros((0, 2, 3), np.uint8)}, r"\(0, 2, 3\) uint8"),
    ],
)
def test_built_in_model_gets_images_and_nothing_else(sample: dict[str, Any], found: str) -> None:
    with pytest.raises(CustomCodeError, match=f"image: got {found}, expected"):
        image_of(sample)


@pytest.mark.parametrize(
    ("image", "kind"),
    [(IMAGE.astype(np.float32), "ndarray"), (IMAGE[:, :, 0], "ndarray"), ("", "str")],
)
def test_predictor_of_images_gets_whatever_a_process_makes(
    make: Callable[[str], Caller], image: object, kind: str
) -> None:
    mine = predicting(make(PREDICTOR.format(module="evmp", name="PredictorInterface")))

    assert mine.predict([{"image": image}])[0]["type"] == kind
    with pytest.raises(CustomCodeError, match="image: Mine takes images, and the sample has none"):
        mine.predict([{}])


def test_destroy_is_called_and_may_fail(
    make: Callable[[str], Caller], caplog: pytest.LogCaptureFixture
) -> None:
    text = "class Mine:\n def predict(self): 0\n def __init__(self, path): 0\n def destroy(self):\n"
    mine = predicting(make(f"{text}  exit(1)"))

    with caplog.at_level(logging.WARNING):
        mine.destroy()

    assert "Mine.destroy failed" in caplog.text


@pytest.mark.parametrize(
    ("end", "code"), [("exit(0)", 0), ("exit()", 0), ("exit(5)", 1), ("1 / 0", 1), ("0", 1)]
)
def test_forked_child_does_not_come_back_as_a_second_predictor(
    make: Callable[[str], Caller], end: str, code: int
) -> None:
    text = f"""
import os
class Mine:
    version = 2
    def __init__(self, path): 0
    def predict(self, samples, batch_size):
        pid = os.fork()
        if pid == 0:
            {end}
            return [{{}}]
        return [{{"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}}]
"""
    assert predicting(make(text)).predict([{}]) == [{"code": code}]


# --- processing -----------------------------------------------------------------------------------

PROCESS = """
from evmp import Process
class Mine(Process):
    def process(self, it):
        {body}
"""


def test_process_may_have_any_keyword(make: Callable[[str], Caller]) -> None:
    names = ["self", "key", "kind", "what", "function"]

    mine = processing(make(PROCESS.format(body="return self.config")), **dict.fromkeys(names, 1))

    assert mine.process([{}]) == [[dict.fromkeys(names, 1)]]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return it", [{"a": 1}]),
        ("return {**it, 'b': self.config['b']}", [{"a": 1, "b": 5}]),
        ("return None", []),
        ("self.put(it)", [{"a": 1}]),
        ("self.put({}); self.put(it); self.put({'c': 3})", [{}, {"a": 1}, {"c": 3}]),
    ],
)
def test_process_returns_a_sample_or_puts_any_number(
    make: Callable[[str], Caller], body: str, expected: list[object]
) -> None:
    mine = processing(make(PROCESS.format(body=body)), b=5)

    assert mine.process([{"a": 1}]) == [expected]
    assert mine.process([{"a": 1}]) == [expected]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return it", [[{"a": 1}], [{"a": 2}]]),
        ("return [None, it[0]]", [[], [{"a": 1}]]),
        ("return None", [[], []]),
        ("self.put(it[1]); self.put(it[1])", [[], [{"a": 2}, {"a": 2}]]),
        ("self.put(it[1]); self.put(it[0])", [[{"a": 1}], [{"a": 2}]]),
    ],
)
def test_process_of_batches_gets_and_gives_lists(
    make: Callable[[str], Caller], body: str, expected: list[object]
) -> None:
    mine = processing(make(PROCESS.format(body=body)), batch_size=2)

    assert mine.process([{"a": 1}, {"a": 2}]) == expected


def test_all_that_is_put_of_one_sample_is_its_own(make: Callable[[str], Caller]) -> None:
    text = PROCESS.format(body="self.put({}); self.put({'b': 2})")
    mine = processing(make(text), batch_size=4)

    assert mine.process([{"a": 1}]) == [[{}, {"b": 2}]]


@pytest.mark.parametrize(
    ("body", "batch_size", "message"),
    [
        ("return 3", 1, "Mine.process gave int, expected a sample, a dict"),
        ("return [it]", 1, "Mine.process gave list, expected a sample, a dict"),
        ("self.put(3)", 1, "Mine.process gave int, expected a sample, a dict"),
        ("self.put(it); return it", 1, "Mine.process both put samples and returned some"),
        ("return it['b']", 1, "KeyError: 'b' (mine.py:5)"),
        ("return it[0]", 2, "Mine.process returned no list for 2 samples; expected as many"),
        ("return it[:1]", 2, "Mine.process returned 1 samples for 2 samples"),
        ("self.put({})", 2, "put new samples for 2, and it cannot be told whose they are"),
        ("self.put(dict(it[0])); self.put({})", 2, "put each sample itself, changed, or set"),
    ],
)
def test_what_a_process_does_wrong_is_one_line(
    make: Callable[[str], Caller], body: str, batch_size: int, message: str
) -> None:
    mine = processing(make(PROCESS.format(body=body)), batch_size=batch_size)

    with pytest.raises(CustomCodeError) as caught:
        mine.process([{"a": 1}] * batch_size)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Mine: pass", "mine.Mine does not derive from evmp.Process"),
        ("import evmp\nclass Mine(evmp.Process): pass", "mine.Mine has no method process"),
        (
            "import evmp\nclass Mine(evmp.Process):\n def __init__(self, a): 0\n"
            " def process(self, it): 0",
            "Mine(a) does not take what it is given: missing a required argument: 'a'",
        ),
    ],
)
def test_process_that_cannot_start_is_told(
    make: Callable[[str], Caller], text: str, message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        processing(make(text), margin=3)

    assert message in str(caught.value)
