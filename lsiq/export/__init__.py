"""Layouts of other programs that a quantised model is written in, one file each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsiq.export.compressed_tensors import CompressedTensors
    from lsiq.export.gguf import GGUF
    from lsiq.export.gptq import GPTQLayout
    from lsiq.export.plain import Plain

_PLACES = {"GGUF": "gguf", "CompressedTensors": "compressed_tensors", "GPTQLayout": "gptq", "Plain": "plain"}
__all__ = ["GGUF", "CompressedTensors", "GPTQLayout", "Plain"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
