"""What a method makes of every linear in each of the formats that are chosen among."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsiq.formats.quant import QuantSettings
from lsiq.methods.base import Method, WholeMethod

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.allocation.divergence import Rounding
    from lsiq.formats.base import WeightFormat
    from lsiq.models.block import Block
    from lsiq.models.loading import Model


def check_rounding(quant: QuantSettings, method: Method | WholeMethod) -> None:
    """Raise ValueError where sensitivities are to be those of a method that does not round linear by linear."""
    if quant.allocate.active and quant.allocate.rounding == "method" and not getattr(method, "rounds_only", False):
        raise ValueError(
            f"quant.allocate.rounding=method: method {method.name} changes more than the codes, so that one linear "
            "cannot be exchanged alone; use quant.allocate.rounding=nearest, or method=gptq"
        )


def by_method(
    method: Method | WholeMethod,
    model: Model,
    quant: QuantSettings,
    formats: list[WeightFormat],
    tokens: Tensor | None,
    batch: int,
    seed: int,
) -> Rounding:
    """Return what the method makes of a linear where all linears of the model have one of `formats`.

    The model is quantised once in each format, and all codes are held.

    Args:
        quant: has the formats of activations, keys and values.
        tokens: `(N, T)` calibration tokens, or None for a method that needs none.
        batch: sequences that pass through a block at once.
    """
    from lsiq.calib.cache_range import with_float_scales
    from lsiq.pipeline.block_loop import quantize
    from lsiq.results.memory_store import MemoryStore

    model = with_float_scales(model, quant.kv, tokens, batch)
    stores = [MemoryStore() for _ in formats]
    for fmt, store in zip(formats, stores, strict=True):
        if fmt.bits < 16:
            uniform = QuantSettings(weight=fmt, activation=quant.activation, kv=quant.kv, rules=[], plan=None)
            for _ in quantize(model, method, uniform, tokens, batch, seed, store, lambda _: None):
                pass

    def rounded(block: Block, name: str, choice: int) -> Tensor:
        return stores[choice].read(block.index).weights[name].decode().to(block.weights[name])

    return rounded
