"""A quantised block of which what costs nothing at inference is trained further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lsiq.formats.tensor import QuantizedTensor
from lsiq.learning.weight_path import fuses_rounding
from lsiq.models.block import Block
from lsiq.models.context import Context
from lsiq.models.result import BlockResult
from lsiq.parts.base import Draft, Part, PartState, rate_of

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.methods.finetune.settings import FineTune

Tensors = Mapping[str, Tensor]


class TunedBlock:
    """One block on its grids, and the parameters that change it.

    A weight is `round(W' / h) · h · exp(g)`: `W'` is the decoded or latent weight with the part's increment, `h` the
    step size as it was found, `g` the trained growth of the step. At the start, with increment and growth 0, that is
    what was found, bit for bit. There are increments between `open` and `settle`; before and after, the weights are
    those of codes, which are decoded where they are needed, so that whole models fit.

    Args:
        rests: whether nothing is trained.
        place: where codes lie while there are no increments; None for the block's own device.
        recomputes: whether what leads to the outputs is computed again on the way back instead of being kept, with the
            same result.

    Attributes:
        growth, floats: what is trained throughout, unless the block rests.
        groups: of these, parameters and learning rates, as optimizers take them.
    """

    def __init__(
        self,
        settings: FineTune,
        block: Block,
        initial: BlockResult,
        quant: QuantSettings,
        context: Context,
        rests: bool = False,
        place: torch.device | None = None,
        recomputes: bool = True,
    ) -> None:
        self.recomputes = recomputes
        self.device = device = block.device
        self.settings, self.initial, self.quant, self.context = settings, initial, quant, context
        block = block.with_rotations_of(initial)
        self.place = place or device
        self.grids = {name: grid.to(self.place) for name, grid in initial.weights.items()}
        self.checkpoint = {name: w for name, w in block.weights.items() if name not in self.grids}
        floats = {**self.checkpoint, **{name: w.to(device) for name, w in initial.floats.items()}}
        self._plain = replace(block, weights={})
        self.part: Part | None = None
        self.state, self.latents = PartState({}), dict[str, Tensor]()
        self.learned: dict[str, Tensor] = {}
        scales, rate = (None, None) if rests else (settings.scales, settings.floats)
        self.growth = {name: torch.zeros_like(grid.scale, device=device) for name, grid in self.grids.items() if scales}
        self.floats = {name: w.clone() if rate else w for name, w in floats.items()}
        running = replace(block, weights=self.floats, fused_rounding=fuses_rounding("auto", block))
        self.block = settings.training.in_precision(running, context.cache)
        floating = {name: w for name, w in self.floats.items() if name not in block.untouched}
        self.groups = [*_trainable(self.growth, scales), *_trainable(floating, rate)]

    def open(self, steps: int) -> list[dict[str, Any]]:
        """Let the weights have increments, trained for so many steps; return those as optimizers take them.

        There are none without a part, and where the grid alone is trained. Where windows have a share of the epochs, a
        rate that the settings name is divided by the root of the share: what increments wander by the noise of the
        batches is then as far as in all epochs, and so are the codes that flip for nothing as many.
        """
        if (part := self.settings.part) is None or self.settings.trained == "grid":
            return []
        self.grids = {name: grid.to(self.device) for name, grid in self.grids.items()}
        if self.settings.latents:
            self.latents = {name: w.to(self.device) for name, w in self.initial.latents.items()}
        with torch.no_grad():
            start = replace(self._plain, weights={**self.floats, **self._decoded()})
            self.part, self.state = part, part.start(start, self.quant, self.context)
        rate = rate_of(part, self.state, max(1, steps))
        return _trainable(self.state.parameters, rate if part.lr is None else rate / self.settings.weight_share**0.5)

    @torch.no_grad()
    def settle(self) -> None:
        """Let the weights stand where the increments have brought them, as codes of the grid that is there."""
        if self.part is None:
            return
        draft = self._draft()
        codes = {
            name: grid.format.encode(self._in_steps(draft, name), torch.ones_like(grid.scale), grid.zero)
            for name, grid in self.grids.items()
        }
        for name, tensor in self.floats.items():  # some parts have increments of norms and biases
            if tensor.requires_grad:
                tensor.copy_(draft.weights[name])
            else:
                self.floats[name] = draft.weights[name].detach()
        self.learned = {
            f"{self.part.name}:{name}": parameter.detach()
            for name, parameter in self.state.parameters.items()
            if name not in self.state.bulky
        }
        self.part, self.state, self.latents = None, PartState({}), {}
        self._take_codes(codes)

    def settled(self) -> dict[str, Tensor]:
        """Return, by kind and name, what `settle` changed that no optimizer holds."""
        tensors = {f"codes/{name}": grid.codes for name, grid in self.grids.items()}
        tensors |= {f"float/{name}": tensor for name, tensor in self.floats.items() if not tensor.requires_grad}
        return tensors | {f"learned/{name}": tensor for name, tensor in self.learned.items()}

    def take_settled(self, tensors: Tensors) -> None:
        """Let the block be what it was when `settled` returned this."""
        kinds: dict[str, dict[str, Tensor]] = {"codes": {}, "float": {}, "learned": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            kinds[kind][name] = tensor.to(self.device)
        self._take_codes(kinds["codes"])
        self.floats.update(kinds["float"])
        self.learned = kinds["learned"]

    def _take_codes(self, codes: Tensors) -> None:
        grids = {name: replace(grid, codes=codes[name]) for name, grid in self.grids.items()}
        self.grids = {name: grid.to(self.place) for name, grid in grids.items()}

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the block's outputs."""
        if not self.recomputes:
            return self._run(hidden)
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
        """Return the block, settled, as it can be stored; decoding gives what `weights` gave, bit for bit."""
        assert self.part is None
        weights = {name: self._grown(name) for name in self.grids}
        found = {name: self.initial.weights[name].codes.to(self.device) for name in weights}
        flips = [(weights[name].codes != found[name]).float().mean().item() for name in weights]
        floats = {
            name: self.floats[name].detach()
            for name, before in self.checkpoint.items()
            if name in self.initial.floats or not torch.equal(self.floats[name], before)
        }
        metrics = {"flip_rate": sum(flips) / max(len(flips), 1), **metrics}
        return BlockResult(weights, floats, metrics, self.learned, rotations=self.initial.rotations)

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
        grid = self.grids[name].to(self.device)
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


def _trainable(parameters: Mapping[str, Tensor], rate: float | None) -> list[dict[str, Any]]:
    """Return parameters, which gather gradients from here on, as a group of an optimizer; none without a rate."""
    if rate is None or not parameters:
        return []
    return [{"params": [parameter.requires_grad_() for parameter in parameters.values()], "lr": rate}]
