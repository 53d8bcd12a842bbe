"""lsiq: experiments in post-training quantisation of large language models.

    import lsiq

    model = lsiq.load_model("tiny-llama")  # or a folder, or a model of transformers in memory
    quant = lsiq.format("w3a16g128")
    small = lsiq.quantize(model, lsiq.recipe("lsi", epochs=5), quant, lsiq.tokens("bundled", samples=32))
    lsiq.perplexity(small, "bundled")
    small.export("gguf", "out/")
    record = lsiq.run("model=tiny-llama", "method=lsi")  # what the command line does

What stands here is loaded when it is first used: `import lsiq` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsiq.api.models import FloatModel, load_model
    from lsiq.api.quantized import QuantizedModel, perplexity, quantize
    from lsiq.api.recipes import format, recipe, tokens
    from lsiq.api.runs import records, run
    from lsiq.errors import ConfigError, InputError, LsiqError, NumericalError, OutputError, ResourceError


__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "FloatModel",
    "InputError",
    "LsiqError",
    "NumericalError",
    "OutputError",
    "QuantizedModel",
    "ResourceError",
    "format",
    "load_model",
    "perplexity",
    "quantize",
    "recipe",
    "records",
    "run",
    "tokens",
]

_PLACES = {
    "lsiq.api.models": ("FloatModel", "load_model"),
    "lsiq.api.quantized": ("QuantizedModel", "perplexity", "quantize"),
    "lsiq.api.recipes": ("format", "recipe", "tokens"),
    "lsiq.api.runs": ("records", "run"),
    "lsiq.errors": ("ConfigError", "InputError", "LsiqError", "NumericalError", "OutputError", "ResourceError"),
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            from lsiq.runtime.garbage import uncollected_imports

            with uncollected_imports():
                module = importlib.import_module(place)
            return getattr(module, name)
    raise AttributeError(f"module 'lsiq' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
