"""A package to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from evmp.model.package import ModelInput

ARCHIVE: Final = "model.pt"


@dataclass(frozen=True, slots=True)
class Draft:
    """A package to be."""

    origin: str
    """Where it comes from, in a line."""
    weights: str
    """The name of its file of weights."""
    save: Callable[[Path, ModelInput], None]
    """Writes that file, and what it refers to, for inputs of a size."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """What model.yaml says, as far as the source knows it."""
    labels: tuple[str, ...] = ()
