"""Number formats of weights and activations, one file each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsiq.formats.activation import Activation
    from lsiq.formats.integer import Integer
    from lsiq.formats.mxint import MXActivation, MXInt
    from lsiq.formats.quant import QuantSettings

_PLACES = {
    "Activation": "activation",
    "Integer": "integer",
    "MXActivation": "mxint",
    "MXInt": "mxint",
    "QuantSettings": "quant",
}
__all__ = ["Activation", "Integer", "MXActivation", "MXInt", "QuantSettings"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
