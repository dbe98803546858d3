"""Operators that an archive calls and torch itself does not have.

torchvision registers its own with torch when it is imported, which therefore comes before loading.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import torch

from evmp.errors import ModelError
from evmp.model.archive import needs_torchvision
from evmp.model.network import explain


def register_operators(file: Path) -> None:
    """Import torchvision, if an archive of torch calls its operators.

    Raises:
        ModelError: it cannot be imported.
    """
    if not needs_torchvision(file):
        return
    try:
        import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{file}: needs torchvision's operators, but torchvision cannot be imported "
            f"({explain(error)}); install the torchvision that belongs to torch {torch.__version__}"
        ) from error


def lacking(error: BaseException) -> str:
    """Say which operator is not there; empty where something else is wrong."""
    found = re.search(r"Unknown builtin op: ([\w:]+)|failed to resolve ([\w.]+) to", str(error))
    name = found and (found[1] or found[2])
    return f"needs the operator {name}, which torch {torch.__version__} lacks" if name else ""
