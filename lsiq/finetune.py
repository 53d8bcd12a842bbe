"""The training behind `lsiq.methods.finetune`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.errors import InputError, NumericalError
from lsiq.formats.tensor import QuantizedTensor
from lsiq.methods.base import BlockResult, Context
from lsiq.models.block import Block, BlockFunction, result_weights
from lsiq.parts.base import Draft, PartState
from lsiq.store import BlockStore

if TYPE_CHECKING:
    from lsiq.config import QuantSettings
    from lsiq.methods.finetune import FineTune


def tune(settings: FineTune, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
    """Return the run's own result for an early block, and a trained one for the last blocks."""
    store = BlockStore(Path(settings.run) / "blocks")
    found = store.read(block.index)
    _check(found, block, quant, settings.run)
    assert context.ahead is not None
    if block.index < context.ahead.depth - settings.blocks:
        return found
    return _Tuner(settings, block, found, quant, context, store).train()


def _check(found: BlockResult, block: Block, quant: QuantSettings, run: str) -> None:
    """The run must be of this model and this format, for its codes are kept, and all of it in codes."""
    if found.branches:
        raise InputError(
            f"method.run={run}: has low-rank side branches, which are not trained here; give a run without them"
        )
    for name in block.linears:
        weight = found.weights.get(name)
        if weight is None or weight.codes.shape != block.weights[name].shape:
            raise InputError(f"method.run={run}: its blocks do not fit this model; give a run of the same model")
        if weight.format != quant.weight:
            raise InputError(
                f"method.run={run}: was quantised to {weight.format.bits} bits in groups of {weight.format.width}; "
                "give the same quant= as that run"
            )


class _Tuner:
    """The increments of one block, trained through the rest of the model."""

    def __init__(
        self,
        settings: FineTune,
        block: Block,
        found: BlockResult,
        quant: QuantSettings,
        context: Context,
        store: BlockStore,
    ) -> None:
        assert context.ahead is not None
        assert context.inputs is not None
        assert context.tokens is not None
        self.settings, self.found, self.quant, self.context = settings, found, quant, context
        self.block = settings.training.in_precision(
            replace(block, weights={**block.weights, **result_weights(found, block.weights)})
        )
        self.device = next(iter(block.weights.values())).device
        start = settings.part.start(self.block, quant, context)
        parameters = {name: parameter.requires_grad_() for name, parameter in start.parameters.items()}
        self.state = PartState(parameters, start.constants)
        self.rest: list[BlockFunction] = [
            settings.training.in_precision(later).with_result(store.read(later.index), quant.activation)
            for later in map(context.ahead.block, range(block.index + 1, context.ahead.depth))
        ]
        self.grids: Mapping[str, QuantizedTensor] = {
            name: replace(
                weight, codes=weight.codes, scale=weight.scale.to(self.device), zero=weight.zero.to(self.device)
            )
            for name, weight in found.weights.items()
        }

    def train(self) -> BlockResult:
        """Train for the settings' epochs and return the block on its grid."""
        training = self.settings.training
        optimizer = torch.optim.AdamW(self.state.parameters.values(), lr=self.settings.part.lr, weight_decay=0.0)
        tokens = self.context.tokens
        assert tokens is not None
        steps, total = 0, training.steps(len(tokens))
        losses: list[float] = []
        for epoch in range(training.epochs):
            order = torch.randperm(len(tokens), generator=self.context.generator)
            sums = []
            for samples in order.split(training.batch):
                for group in optimizer.param_groups:
                    group["lr"] = self.settings.part.lr * training.rate_factor(steps / total)
                loss = self._loss(samples)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                sums.append(loss.detach())
                steps += 1
            losses.append(torch.stack(sums).mean().item())
            if not math.isfinite(losses[-1]):
                raise NumericalError(
                    f"block {self.block.index}: the loss is not finite in epoch {epoch}; lower method.part.lr"
                )
            self.context.log({"finetune/loss": losses[-1], "finetune/block": self.block.index, "finetune/epoch": epoch})
        return self._result(losses)

    def _weights(self, draft: Draft) -> dict[str, Tensor]:
        fmt = self.quant.weight
        rounded = {n: fmt.fake(draft.weights[n], g.scale, g.zero) for n, g in self.grids.items()}
        return {**draft.weights, **rounded}

    def _loss(self, samples: Tensor) -> Tensor:
        inputs, tokens, ahead = self.context.inputs, self.context.tokens, self.context.ahead
        assert inputs is not None
        assert tokens is not None
        assert ahead is not None
        draft = self.settings.part.apply(Draft(self.block.weights), self.state, self.block)
        hidden = inputs[samples].to(self.device, self.block.dtype)
        hidden = self.block.with_weights(self._weights(draft), self.quant.activation)(hidden)
        for function in self.rest:
            hidden = function(hidden)
        logits = ahead.logits(hidden[:, :-1])
        targets = tokens[samples][:, 1:].to(self.device)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def _result(self, losses: list[float]) -> BlockResult:
        draft = self.settings.part.apply(Draft(self.block.weights), self.state, self.block)
        weights = {
            name: replace(grid, codes=self.quant.weight.encode(draft.weights[name], grid.scale, grid.zero))
            for name, grid in self.grids.items()
        }
        flips = [(weights[n].codes.cpu() != self.found.weights[n].codes).float().mean().item() for n in weights]
        metrics = {"flip_rate": sum(flips) / len(flips)}
        if losses:
            metrics |= {"loss_first": losses[0], "loss_last": losses[-1]}
        state = {f"singular:{name}": parameter.detach() for name, parameter in self.state.parameters.items()}
        return BlockResult(weights, self.found.floats, metrics, state)
