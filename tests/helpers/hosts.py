"""Methods that hand on to another one, and a method that shows what it was handed."""

from __future__ import annotations

import torch
from torch import Tensor

from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.formats.quant import QuantSettings
from lsiq.methods.base import Method, Traits
from lsiq.methods.duquant import DuQuant
from lsiq.methods.rotate import Rotate
from lsiq.methods.smoothquant import SmoothQuant
from lsiq.models.block import Block, run_stream
from lsiq.models.context import Context, Need
from lsiq.models.loading import Model
from lsiq.models.result import BlockResult
from lsiq.models.rounding import round_to_nearest

CPU = torch.device("cpu")
W4A4 = QuantSettings(weight=Integer(bits=4), activation=Activation(bits=4))


class Seen(Traits):
    """A method for `then` that keeps the block it is handed, and rounds it."""

    name = "seen"
    needs: frozenset[Need] = frozenset()

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        del context
        self.block = block
        return round_to_nearest(block, quant)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_tokens(count: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, 4096, (count, length), generator=seeded())


def logits(model: Model, tokens: Tensor) -> Tensor:
    """The logits of the streamed float model."""
    hidden, kwargs = model.embed(tokens, batch=2)
    for index in range(model.depth):
        hidden = run_stream(model.block(index, kwargs).with_weights({}), hidden, 2, CPU)
    return model.logits(hidden)


def first_block(model: Model) -> tuple[Block, Tensor]:
    hidden, kwargs = model.embed(some_tokens(4), batch=2)
    return model.block(0, kwargs), hidden


def quantised(method: Method, block: Block, hidden: Tensor, quant: QuantSettings = W4A4) -> BlockResult:
    targets = run_stream(block.with_weights({}), hidden, 2, CPU)
    return method.quantize_block(block, quant, Context(hidden, targets, seeded(), 2, lambda values: None))


def hosts(then: Method) -> dict[str, Method]:
    made: dict[str, Method] = {
        place: Rotate(places=[place], then=then)  # type: ignore[list-item]
        for place in ("value", "norm", "output", "down", "query_key")
    }
    made["all"] = Rotate(places=["value", "norm", "output", "down", "query_key"], then=then)
    made["duquant"] = DuQuant(block=32, steps=8, then=then)
    made["smoothed-duquant"] = SmoothQuant(then=DuQuant(block=32, steps=8, then=then))
    made["rotated-twice"] = Rotate(places=["norm", "down"], then=DuQuant(block=32, steps=8, then=then))
    made["smoothed"] = SmoothQuant(places=["norm", "value", "down"], then=then)
    made["rotated-smoothed"] = Rotate(places=["norm", "value"], then=SmoothQuant(then=then))
    return made
