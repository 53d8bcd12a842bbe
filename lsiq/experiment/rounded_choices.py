"""What the run's own method makes of every linear in each of the formats that are chosen among."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lsiq.data.tokens import token_hash
from lsiq.formats.quant import QuantSettings
from lsiq.pipeline.block_loop import quantize
from lsiq.results.memory_store import MemoryStore
from lsiq.runtime.sources import source_hash

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.allocation.divergence import Rounding
    from lsiq.experiment.config import RunConfig
    from lsiq.formats.base import WeightFormat
    from lsiq.models.block import Block
    from lsiq.models.loading import Model


def by_method(config: RunConfig, model: Model, formats: list[WeightFormat], tokens: Tensor | None) -> Rounding:
    """Return what the run's method makes of a linear where all linears of the model have one of `formats`.

    The model is quantised once in each format, and all codes are held.

    Args:
        tokens: `(N, T)` calibration tokens, or None for a method that needs none.
    """
    stores = []
    for fmt in formats:
        stores.append(store := MemoryStore())
        if fmt.bits < 16:
            quant = QuantSettings(weight=fmt, activation=config.quant.activation, kv=config.quant.kv)
            for _ in quantize(
                model, config.method, quant, tokens, config.calib.batch, config.seed, store, lambda _: None
            ):
                pass

    def rounded(block: Block, name: str, choice: int) -> Tensor:
        return stores[choice].read(block.index).weights[name].decode().to(block.weights[name])

    return rounded


def method_request(config: RunConfig, tokens: Tensor | None) -> dict[str, Any]:
    """Return what the rounding depends on, as plain data."""
    return {
        "method": config.method.name,
        "settings": {key: str(value) for key, value in asdict(config.method).items()},  # type: ignore[call-overload]
        "activation": str(config.quant.activation),
        "tokens": None if tokens is None else token_hash(tokens),
        "seed": config.seed,
        "sources": source_hash("methods", "calib", "pipeline"),
    }
