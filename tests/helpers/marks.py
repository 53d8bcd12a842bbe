"""Which cases of a parametrised test stand for all in the default run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return the values as a case that is `slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def product(*values: Any) -> Any:
    """Return the values as a case that only the whole product of methods, families and studies has."""
    return pytest.param(*values, marks=pytest.mark.product)


def slow_but(quick: Collection[str], names: Iterable[str]) -> list[Any]:
    """Return all names as parameters, those that are not among `quick` marked `slow`."""
    names = list(names)
    assert set(quick) <= set(names), set(quick) - set(names)
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]
