"""The one inner training loop: the parameters of some parts against a block's reconstruction loss."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.clock import Stopwatch
from lsiq.errors import NumericalError
from lsiq.methods.base import Context
from lsiq.models.block import Block
from lsiq.parts.base import Draft, Part, PartState, rounded
from lsiq.track.console import warn

if TYPE_CHECKING:
    from lsiq.config import QuantSettings
    from lsiq.methods.learned import Training


@dataclass
class Epoch:
    """What one epoch came to.

    Attributes:
        loss: mean of the steps' losses.
        seconds: since training began; `weight_seconds` of them in the weight path, that is, in making the rounded
            weights from the parameters and in the gradients back to these.
        gradients: by parameter, the mean gradient norm of the epoch's steps.
        parameters: the parameters at its end, detached, for trajectories.
    """

    index: int
    loss: float
    seconds: float
    weight_seconds: float
    gradients: dict[str, float]
    parameters: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Learned:
    """Trained parts of one block and how they got there."""

    states: list[PartState]
    epochs: list[Epoch]
    steps: int
    seconds: float
    weight_seconds: float
    retries: int
    best_epoch: int


def apply_parts(parts: Sequence[Part], states: Sequence[PartState], block: Block) -> Draft:
    """Return the draft that all parts make of a block, in their order. The one function that is trained and stored."""
    draft = Draft(block.weights)
    for part, state in zip(parts, states, strict=True):
        draft = part.apply(draft, state, block)
    return draft


def learn(parts: Sequence[Part], training: Training, block: Block, quant: QuantSettings, context: Context) -> Learned:
    """Train the parts on a block.

    The loss of a batch is the mean squared difference between the quantised block on the quantised stream and the
    float block on the float stream, over the mean square of the latter's stream; the division leaves Adam's steps as
    they are and keeps its epsilon small against the gradients of any block.

    Raises:
        NumericalError: the loss is not finite after all retries; the message names the block and the rates.
    """
    start = [part.start(block, quant, context) for part in parts]
    states, epochs = start, list[Epoch]()
    for retry in range(training.retries + 1):
        attempt = _Attempt(parts, states, training, block, quant, context, 0.5**retry)
        try:
            return attempt.run(epochs, retry)
        except _NotFiniteError as error:
            # A state from which no epoch succeeds is no good state, however sane its loss: then from the start.
            stuck = retry > 0 and attempt.good_epochs == attempt.first_epoch
            states, epochs = (start, []) if stuck else (attempt.good, epochs[: attempt.good_epochs])
            if retry < training.retries:
                warn(
                    f"block {block.index}: the loss is not finite in epoch {error.epoch}; back to the state after "
                    f"{len(epochs)} epochs at half the learning rates (try {retry + 1} of {training.retries})"
                )
    rates = ", ".join(f"{part.name}.lr={part.lr}" for part in parts)
    raise NumericalError(
        f"block {block.index}: the loss is not finite after {training.retries} retries at ever lower rates; "
        f"lower {rates}, or set method.training.precision=float32"
    )


class _NotFiniteError(Exception):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch


class _Attempt:
    """One try at training a block: the whole schedule at learning rates scaled by `slow`."""

    def __init__(
        self,
        parts: Sequence[Part],
        states: Sequence[PartState],
        training: Training,
        block: Block,
        quant: QuantSettings,
        context: Context,
        slow: float,
    ) -> None:
        assert context.inputs is not None
        assert context.targets is not None
        self.parts, self.training, self.quant, self.context = parts, training, quant, context
        self.block = training.in_precision(block)
        self.states = [
            PartState({k: p.detach().clone().requires_grad_() for k, p in state.parameters.items()}, state.constants)
            for state in states
        ]
        self.good, self.good_epochs, self.first_epoch = self._snapshot(), 0, 0
        self.first_loss = math.inf
        self.device = next(iter(block.weights.values())).device
        # fused: one kernel for all parameters; the CPU has one as well.
        groups = [
            {"params": list(state.parameters.values()), "lr": part.lr * slow}
            for part, state in zip(parts, self.states, strict=True)
            if state.parameters
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True) if groups else None
        half = self.block.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half, init_scale=2.0**16, growth_interval=200)
        self.power = context.targets.float().square().mean().clamp(min=1e-12).to(self.device)
        self.float_function = self.block.with_weights({}) if training.aug_loss else None
        self.weight_path = Stopwatch(self.device)
        self.steps = 0

    def run(self, epochs: list[Epoch], retry: int) -> Learned:
        """Train the epochs that `epochs` does not hold yet, adding to it."""
        start = time.perf_counter()
        self.good_epochs = self.first_epoch = len(epochs)
        best, best_epoch = (self._loss_of_stream(), self._snapshot()) if self._keeps_best else (math.inf, self.good), -1
        total = self.training.steps(len(self.context.targets))  # type: ignore[arg-type]
        self.steps = total // max(self.training.epochs, 1) * len(epochs)
        for index in range(len(epochs), self.training.epochs if self.optimizer is not None else 0):
            self._choose_trained(index)
            before = self._snapshot()
            losses, gradients = self._epoch(total)
            self._remember(before, float(losses[0]), index)
            loss = float(losses.mean())
            if not math.isfinite(loss):
                raise _NotFiniteError(index)
            elapsed = time.perf_counter() - start
            epochs.append(Epoch(index, loss, elapsed, self.weight_path.seconds(), gradients, self._parameters()))
            self.context.log({"learn/epoch": index, "learn/loss": loss, "learn/block": self.block.index})
            if self._keeps_best and (found := self._loss_of_stream()) < best[0]:
                best, best_epoch = (found, self._snapshot()), index
            if self.training.seconds is not None and elapsed > self.training.seconds:
                break
        final = best[1] if self._keeps_best else self._snapshot()
        seconds = time.perf_counter() - start
        return Learned(final, epochs, self.steps, seconds, self.weight_path.seconds(), retry, best_epoch)

    @property
    def _keeps_best(self) -> bool:
        return self.training.keep == "best"

    def _remember(self, before: list[PartState], loss: float, index: int) -> None:
        """Keep the state before an epoch as the one to go back to, if its own loss had not run away by then."""
        self.first_loss = min(self.first_loss, loss)
        if loss <= 2 * self.first_loss:
            self.good, self.good_epochs = before, index

    def _epoch(self, total: int) -> tuple[Tensor, dict[str, float]]:
        """Take one pass over the stream; return the steps' losses and the parameters' mean gradient norms."""
        losses: list[Tensor] = []
        norms: dict[str, Tensor] = {}
        assert self.optimizer is not None
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for part in self._batches():
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.training.rate_factor(self.steps / total)
            losses.append(self._step(part))
            for name, parameter in self._trained():
                if parameter.grad is not None:
                    norms[name] = norms.get(name, parameter.grad.new_zeros(())) + parameter.grad.norm()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.steps += 1
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        count = len(losses)
        return torch.stack(losses).cpu(), {name: norm.item() / count for name, norm in norms.items()}

    def _step(self, samples: Tensor) -> Tensor:
        """Add one batch's gradients; return its loss without waiting for it."""
        inputs, targets = self.context.inputs, self.context.targets
        assert inputs is not None
        assert targets is not None
        with self.weight_path.running():
            made = self._weights()
        # The tokens see the weights as leaves, so that the two paths' backward passes stand apart and can be timed.
        leaves = {name: w.detach().requires_grad_() for name, w in made.items() if w.requires_grad}
        function = self.block.with_weights({**made, **leaves}, self.quant.activation)
        x = inputs[samples].to(self.device, self.block.dtype, non_blocking=True)
        target = targets[samples].to(self.device, non_blocking=True).float()
        out = function(x).float()
        loss = (out - target).square().mean() / self.power
        if self.float_function is not None:
            with torch.no_grad():
                same_input = self.float_function(x).float()
            loss = loss + (out - same_input).square().mean() / self.power
        self.scaler.scale(loss).backward()
        with self.weight_path.running():
            used = [name for name, leaf in leaves.items() if leaf.grad is not None]
            torch.autograd.backward([made[name] for name in used], [leaves[name].grad for name in used])
        if self.optimizer is not None:
            self.scaler.unscale_(self.optimizer)
        return loss.detach()

    def _weights(self) -> dict[str, Tensor]:
        draft = apply_parts(self.parts, self.states, self.block)
        return rounded(draft, self.block.linears, self.quant)

    @torch.no_grad()
    def _loss_of_stream(self) -> float:
        """The loss over the whole stream at the present parameters, in order."""
        function = self.block.with_weights(self._weights(), self.quant.activation)
        total = 0.0
        inputs, targets = self.context.inputs, self.context.targets
        assert inputs is not None
        assert targets is not None
        for x, target in zip(inputs.split(self.context.batch), targets.split(self.context.batch), strict=True):
            out = function(x.to(self.device, self.block.dtype)).float()
            total += (out - target.to(self.device).float()).square().mean().item() * len(x)
        return total / len(inputs) / self.power.item()

    def _batches(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.context.targets), generator=self.context.generator)  # type: ignore[arg-type]
        return iter(order.split(self.training.batch))

    def _choose_trained(self, epoch: int) -> None:
        """In a staged schedule the parts named late stand still for the first epochs."""
        for part, state in zip(self.parts, self.states, strict=True):
            waits = (
                self.training.schedule == "staged" and part.name in self.training.late and epoch < self.training.wait
            )
            for parameter in state.parameters.values():
                parameter.requires_grad_(not waits)

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        for part, state in zip(self.parts, self.states, strict=True):
            for name, parameter in state.parameters.items():
                yield f"{part.name}:{name}", parameter

    def _parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self._trained()}

    def _snapshot(self) -> list[PartState]:
        return [
            PartState({name: p.detach().clone() for name, p in state.parameters.items()}, state.constants)
            for state in self.states
        ]
