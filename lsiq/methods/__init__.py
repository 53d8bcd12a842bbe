"""What quantises a block. A method is one file, or a folder where its computation is longer than its settings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsiq.methods.awq import AWQ
    from lsiq.methods.duquant import DuQuant
    from lsiq.methods.finetune import FineTune
    from lsiq.methods.gptq import GPTQ
    from lsiq.methods.learned import Learned
    from lsiq.methods.lqer import LQER
    from lsiq.methods.prefix import Prefix
    from lsiq.methods.rotate import Rotate
    from lsiq.methods.rtn import RTN
    from lsiq.methods.smoothquant import SmoothQuant

_PLACES = {
    "AWQ": "awq",
    "GPTQ": "gptq",
    "LQER": "lqer",
    "RTN": "rtn",
    "DuQuant": "duquant",
    "FineTune": "finetune",
    "Learned": "learned",
    "Prefix": "prefix",
    "Rotate": "rotate",
    "SmoothQuant": "smoothquant",
}
__all__ = ["AWQ", "GPTQ", "LQER", "RTN", "DuQuant", "FineTune", "Learned", "Prefix", "Rotate", "SmoothQuant"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
