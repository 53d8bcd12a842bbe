"""A quantised block of which what costs nothing at inference is trained further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lsiq.formats.tensor import QuantizedTensor
from lsiq.models.block import Block
from lsiq.models.context import Context
from lsiq.models.result import BlockResult
from lsiq.parts.base import Draft, PartState, rate_of

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.methods.finetune.settings import FineTune

Trained = Literal["all", "grid", "nothing"]


class TunedBlock:
    """One block on its grids, and the parameters that change it.

    A weight is `round(W' / h) · h · exp(g)`: `W'` is the decoded or latent weight with the part's increment, `h` the
    step size as it was found, `g` the trained growth of the step. At the start, with increment and growth 0, that is
    what was found, bit for bit. Codes are decoded where they are needed, so that whole models fit.

    Args:
        trained: what is trained of it: all, its grid (step sizes, norms and biases), or nothing, so that it rests.
        steps: how many the optimizer takes; None for those of the whole schedule.
        place: where codes lie; None for the block's own device.

    Attributes:
        groups: the parameters and their learning rates, as optimizers take them.
    """

    def __init__(
        self,
        settings: FineTune,
        block: Block,
        initial: BlockResult,
        quant: QuantSettings,
        context: Context,
        trained: Trained = "all",
        steps: int | None = None,
        place: torch.device | None = None,
    ) -> None:
        self.device = device = next(iter(block.weights.values())).device
        self.initial, self.quant = initial, quant
        self.part = settings.part if trained == "all" else None
        scales, floats_rate = (None, None) if trained == "nothing" else (settings.scales, settings.floats)
        latents = initial.latents if settings.latents and self.part is not None else {}
        self.latents = {name: w.to(device) for name, w in latents.items()}
        block = block.with_rotations_of(initial)
        self.grids = {name: _moved(grid, place or device) for name, grid in initial.weights.items()}
        self.checkpoint = {name: w for name, w in block.weights.items() if name not in self.grids}
        floats = {**self.checkpoint, **{name: w.to(device) for name, w in initial.floats.items()}}
        self.state = PartState({})
        if self.part is not None:
            self.state = self.part.start(replace(block, weights={**floats, **self._decoded()}), quant, context)
        self.growth = {name: torch.zeros_like(grid.scale) for name, grid in self.grids.items() if scales}
        self.floats = {name: w.clone() if floats_rate else w for name, w in floats.items()}
        self.block = settings.training.in_precision(replace(block, weights=self.floats), context.cache)
        floating = {name: w for name, w in self.floats.items() if name not in block.untouched}
        self.groups: list[dict[str, Any]] = []
        assert context.tokens is not None
        steps = settings.training.steps(len(context.tokens)) if steps is None else max(1, steps)
        part_rate = None if self.part is None else rate_of(self.part, steps)
        for parameters, rate in (
            (self.state.parameters, part_rate),
            (self.growth, scales),
            (floating, floats_rate),
        ):
            if rate is not None and parameters:
                self.groups.append({"params": [p.requires_grad_() for p in parameters.values()], "lr": rate})

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the block's outputs; what leads to them is computed again on the way back instead of being kept."""
        return checkpoint(self._run, hidden, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

    def _run(self, hidden: Tensor) -> Tensor:
        return self.block.with_weights(self.weights(), self.quant.running)(hidden)

    def weights(self) -> dict[str, Tensor]:
        """Return every tensor of the block at the present parameters, its linears on their grids."""
        draft = self._draft()
        if self.part is None:
            return {**draft.weights, **{name: self._grown(name).decode() for name in self.grids}}
        return {**draft.weights, **{name: self._rounded(draft, name) for name in self.grids}}

    @torch.no_grad()
    def result(self, metrics: Mapping[str, float]) -> BlockResult:
        """Return the block as it can be stored; decoding gives what `weights` gave, bit for bit."""
        draft = self._draft()
        weights = {name: self._grown(name) for name in self.grids}
        if self.part is not None:
            weights = {
                name: replace(
                    grid, codes=grid.format.encode(self._in_steps(draft, name), torch.ones_like(grid.scale), grid.zero)
                )
                for name, grid in weights.items()
            }
        flips = [(weights[n].codes.cpu() != self.initial.weights[n].codes).float().mean().item() for n in weights]
        floats = {
            name: draft.weights[name].detach()
            for name, before in self.checkpoint.items()
            if name in self.initial.floats or not torch.equal(draft.weights[name], before)
        }
        state = {
            f"{self.part.name}:{name}": parameter.detach()
            for name, parameter in self.state.parameters.items()
            if self.part is not None and name not in self.state.bulky
        }
        metrics = {"flip_rate": sum(flips) / max(len(flips), 1), **metrics}
        return BlockResult(weights, floats, metrics, state, rotations=self.initial.rotations)

    def _decoded(self) -> dict[str, Tensor]:
        """What increments are added to: the weights that the codes stand for, or those that were rounded to them."""
        if not self.latents:
            return {name: grid.decode() for name, grid in self.grids.items()}
        return {
            name: (
                grid.format.placed(
                    grid.format.grouped(grid.codes), grid.format.grouped(self.latents[name]), grid.scale, grid.zero
                )
            ).reshape(grid.codes.shape)
            for name, grid in self.grids.items()
        }

    def _draft(self) -> Draft:
        if self.part is None:
            return Draft(self.floats)
        return self.part.apply(Draft({**self.floats, **self._decoded()}), self.state, self.block)

    def _grown(self, name: str) -> QuantizedTensor:
        """The grid of a linear at the present step sizes, on the device that computes."""
        grid = _moved(self.grids[name], self.device)
        if name not in self.growth:
            return grid
        assert grid.format.trains_steps  # the configuration refuses to train other formats' step sizes
        return replace(grid, scale=grid.format.storable(grid.scale * self.growth[name].exp()))

    def _in_steps(self, draft: Draft, name: str) -> Tensor:
        """What is rounded of a linear, in steps of its grid as it was found."""
        weight = draft.weights[name]
        return (self.grids[name].format.grouped(weight) / self.grids[name].scale).reshape(weight.shape)

    def _rounded(self, draft: Draft, name: str) -> Tensor:
        grid, fmt = self._grown(name), self.grids[name].format
        steps = fmt.fake(self._in_steps(draft, name), torch.ones_like(grid.scale), grid.zero)
        return (fmt.grouped(steps) * grid.scale).reshape(steps.shape)


def _moved(grid: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    return replace(grid, codes=grid.codes.to(device), scale=grid.scale.to(device), zero=grid.zero.to(device))
