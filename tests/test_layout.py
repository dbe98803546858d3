"""The shape of the code: imports go down only, and the supervising process stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# Top to bottom. A module may import those of lower lines, never one of its own line or above; a
# package counts as one module. Imports for annotations alone (TYPE_CHECKING) do not count.
LAYERS = [
    "__main__",
    "cli",
    "check export sbatch",
    "run",
    "crew",
    "pipeline publish status",
    "progress share plan",
    "layout target",
    "zygote",
    "supervisor child",
    "keeper reader scout decoder videodecoder processor predictor writer",
    "textpredictor",
    "sampleengine",
    "engine",
    "outputdir",
    "video",
    "stage",
    "ring",
    "head sink report lease",
    "asset",
    "fit source model image ledger metrics custom resource sample result download",
    "fetch turn",
    "storage",
    "agenda interface lock payload placement rank remote maxcompute",
    "credentials",
    "job",
    "rule",
    "value",
    "setting",
    "document key",
    "errors grid logs machine printout _native",
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer.split()}
FILES = sorted((ROOT / "evmp").rglob("*.py"))
HEAVY = {"torch", "torchvision", "onnxruntime", "timm", "av", "fsspec", "odps", "oss2", "pyarrow"}


def unit_of(file: Path) -> str:
    """Name the module or the package that a file belongs to."""
    return file.relative_to(ROOT / "evmp").with_suffix("").parts[0]


def imported_units(node: ast.AST) -> Iterator[str]:
    """Yield what a file imports of evmp, at its top and within functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield from names_in(child)
        yield from imported_units(child)


def names_in(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        paths = [alias.name.split(".") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative import"
        base = (node.module or "").split(".")
        paths = [[*base, alias.name] for alias in node.names]
    else:
        return
    # `from evmp import __version__` asks the tour itself, which imports nothing.
    yield from (path[1] for path in paths if path[0] == "evmp" and path[1] != "__version__")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down_only(file: Path) -> None:
    unit = unit_of(file)
    if unit == "__init__":
        assert list(imported_units(ast.parse(file.read_text()))) == []
        return
    assert unit in RANK, f"evmp.{unit} has no layer; name one in {__file__}"

    others = set(imported_units(ast.parse(file.read_text()))) - {unit}

    # A module without a layer fails its own test, not that of everybody who imports it.
    assert {other for other in others if RANK.get(other, len(LAYERS)) <= RANK[unit]} == set()


def ask_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module", ["cli", "export", "pipeline", "supervisor", "model.package", "source", "sink"]
)
def test_supervising_process_imports_nothing_heavy(module: str) -> None:
    modules = ask_python(f"import sys, evmp.{module}; print(*sys.modules)").split()

    assert f"evmp.{module}" in modules
    assert HEAVY & set(modules) == set()


def test_command_starts_no_thread_before_it_forks() -> None:
    threads = ask_python("import os, evmp.cli; print(*os.listdir('/proc/self/task'))").split()

    assert len(threads) == 1
