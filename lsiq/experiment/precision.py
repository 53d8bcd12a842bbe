"""The precision in which a run's method trains, as the record says it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lsiq.methods.base import chain
from lsiq.runtime.precision import Choice, fastest

if TYPE_CHECKING:
    from lsiq.methods.base import Method, WholeMethod


def precision_of(
    method: Method | WholeMethod, device: torch.device, dtype: torch.dtype, cache: Path | None
) -> Choice | None:
    """Return what `precision=auto` stands for in a run, or None where nothing in its method says auto."""
    return fastest(device, dtype, cache) if any(training.precision == "auto" for training in _courses(method)) else None


def _courses(method: Any) -> list[Any]:
    links = list(chain(method))
    links += [inner for link in links if (start := getattr(link, "start", None)) is not None for inner in chain(start)]
    return [link.training for link in links if link.training is not None]
