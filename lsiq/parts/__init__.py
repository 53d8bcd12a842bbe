"""Parts of learned methods: pure maps on the draft of a block's weights, one file each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsiq.parts.clip import Clip
    from lsiq.parts.dense import Dense
    from lsiq.parts.equivalent import Equivalent
    from lsiq.parts.expansion import Expansion
    from lsiq.parts.rounding import Rounding
    from lsiq.parts.singular import Singular

_PLACES = {
    "Clip": "clip",
    "Dense": "dense",
    "Equivalent": "equivalent",
    "Expansion": "expansion",
    "Rounding": "rounding",
    "Singular": "singular",
}
__all__ = ["Clip", "Dense", "Equivalent", "Expansion", "Rounding", "Singular"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
