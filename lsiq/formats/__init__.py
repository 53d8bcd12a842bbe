"""Number formats of weights and activations, one file each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsiq.formats.activation import Activation
    from lsiq.formats.fp8 import FP8, FP8Activation
    from lsiq.formats.integer import Integer
    from lsiq.formats.mxfp import MXFP, MXFPActivation
    from lsiq.formats.mxint import MXActivation, MXInt
    from lsiq.formats.nvfp4 import NVFP4, NVFP4Activation
    from lsiq.formats.quant import QuantSettings

_PLACES = {
    "FP8": "fp8",
    "MXFP": "mxfp",
    "NVFP4": "nvfp4",
    "Activation": "activation",
    "FP8Activation": "fp8",
    "Integer": "integer",
    "MXActivation": "mxint",
    "MXFPActivation": "mxfp",
    "MXInt": "mxint",
    "NVFP4Activation": "nvfp4",
    "QuantSettings": "quant",
}
__all__ = [
    "FP8",
    "MXFP",
    "NVFP4",
    "Activation",
    "FP8Activation",
    "Integer",
    "MXActivation",
    "MXFPActivation",
    "MXInt",
    "NVFP4Activation",
    "QuantSettings",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
