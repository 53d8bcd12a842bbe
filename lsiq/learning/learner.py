"""The one inner training loop: the parameters of some parts against a block's reconstruction loss."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.errors import NumericalError
from lsiq.learning.batches import BatchFeeder
from lsiq.learning.look_ahead import LookAheadLoss, look_ahead
from lsiq.learning.step import Stepper
from lsiq.learning.trained import Trained, start_parts
from lsiq.learning.weight_path import choose, on_path
from lsiq.models.block import Block
from lsiq.models.context import Context
from lsiq.parts.base import Part, PartState
from lsiq.runtime import processes, streams
from lsiq.runtime.terminal import warn

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.learning.schedule import Training


@dataclass
class Epoch:
    """What one epoch came to.

    Attributes:
        loss: mean of the steps' losses.
        seconds: since training began; `weight_seconds` of them in the weight path, that is, in making the rounded
            weights from the parameters and in the gradients back to these.
        gradients: by parameter, the mean gradient norm of the epoch's steps.
        increments: the increments of singular values (corners and bands included) at its end, for trajectories.
    """

    index: int
    loss: float
    seconds: float
    weight_seconds: float
    gradients: dict[str, float]
    increments: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Trajectory:
    """Trained parts of one block and how they got there."""

    states: list[PartState]
    epochs: list[Epoch]
    steps: int
    seconds: float
    weight_seconds: float
    retries: int
    best_epoch: int
    kernels: str = "plain"


def learn(
    parts: Sequence[Part], training: Training, block: Block, quant: QuantSettings, context: Context
) -> Trajectory:
    """Train the parts on a block.

    The loss of a batch is the mean squared difference between the quantised block on the quantised stream and the
    float block on the float stream, over the mean square of the latter's stream; the division leaves Adam's steps as
    they are and keeps its epsilon small against the gradients of any block.

    Raises:
        NumericalError: the loss is not finite after all retries; the message names the block and the rates.
    """
    with torch.no_grad():
        start = start_parts(parts, block, quant, context)
    path = choose(training, parts, start, block, quant)
    running = on_path(training.in_precision(block, context.cache), path, training)
    with torch.no_grad():
        window = look_ahead(parts, training, block, quant, context, path)
    states, epochs = start, list[Epoch]()
    for retry in range(training.retries + 1):
        attempt = Attempt(Trained(parts, states, running, quant, path), training, window, context, 0.5**retry)
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
    rates = ", ".join(f"{part.name}.lr={part.lr or '1/steps'}" for part in parts)
    raise NumericalError(
        f"block {block.index}: the loss is not finite after {training.retries} retries at ever lower rates; "
        f"lower {rates}, or set method.training.precision=float32"
    )


def _power(context: Context) -> Tensor:
    """The mean square of the float block's outputs."""
    assert context.targets is not None
    # Sequence by sequence: a stream may be as large as the host's memory.
    total = torch.zeros((), dtype=torch.float64, device=context.targets.device)
    for target in context.targets:
        total += target.float().square().mean()
        streams.release(context.targets)
    return processes.add(total).float() / context.samples


class _NotFiniteError(Exception):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch


class Attempt:
    """One try at training a block: the whole schedule at learning rates scaled by `slow`."""

    def __init__(
        self, trained: Trained, training: Training, window: LookAheadLoss, context: Context, slow: float
    ) -> None:
        assert context.inputs is not None
        assert context.targets is not None
        self.training, self.window, self.context = training, window, context
        self.trained = trained.trainable()
        self.good, self.good_epochs, self.first_epoch = self.trained.snapshot(), 0, 0
        self.first_loss = math.inf
        self.device = next(iter(trained.block.weights.values())).device
        self.power = _power(context).clamp(min=1e-12).to(self.device)
        self.stepper = None
        if any(state.parameters for state in trained.states):
            feed = BatchFeeder(
                context.inputs, window.targets, training.batch, trained.block.dtype, self.device, context.samples
            )
            self.stepper = Stepper(self.trained, training, feed, window, self.power, slow)
        self.steps = 0

    def run(self, epochs: list[Epoch], retry: int) -> Trajectory:
        """Train the epochs that `epochs` does not hold yet, adding to it."""
        # Epochs of earlier tries count: their time has passed as well.
        spent, spent_on_weights = (epochs[-1].seconds, epochs[-1].weight_seconds) if epochs else (0.0, 0.0)
        start = time.perf_counter() - spent
        self.good_epochs = self.first_epoch = len(epochs)
        best, best_epoch = (self._loss_of_stream(), self.trained.snapshot()), -1
        total = self.training.steps(self.context.samples)
        self.steps = total // max(self.training.epochs, 1) * len(epochs)
        for index in range(len(epochs), self.training.epochs if self.stepper is not None else 0):
            assert self.stepper is not None
            self._choose_trained(index)
            before = self.trained.snapshot()
            losses, gradients = self._epoch(self.stepper, total)
            self._remember(before, float(losses[0]), index)
            loss = float(losses.mean())
            if not math.isfinite(loss):
                raise _NotFiniteError(index)
            elapsed = time.perf_counter() - start
            weight_seconds = spent_on_weights + self.stepper.weight_path.seconds()
            epochs.append(Epoch(index, loss, elapsed, weight_seconds, gradients, self._increments()))
            self.context.log({"learn/epoch": index, "learn/loss": loss, "learn/block": self.trained.block.index})
            if self._keeps_best and (stream_loss := self._loss_of_stream()) < best[0]:
                best, best_epoch = (stream_loss, self.trained.snapshot()), index
            if self.training.seconds is not None and processes.from_first(elapsed) > self.training.seconds:
                break
        final = best[1] if self._keeps_best else self.trained.snapshot()
        seconds = time.perf_counter() - start
        weight_seconds = epochs[-1].weight_seconds if epochs else 0.0
        return Trajectory(final, epochs, self.steps, seconds, weight_seconds, retry, best_epoch, self.trained.path)

    @property
    def _keeps_best(self) -> bool:
        return self.training.keep == "best"

    def _remember(self, before: list[PartState], loss: float, index: int) -> None:
        """Keep the state before an epoch as the one to go back to, if its own loss had not run away by then."""
        self.first_loss = min(self.first_loss, loss)
        if loss <= 2 * self.first_loss:
            self.good, self.good_epochs = before, index

    def _epoch(self, stepper: Stepper, total: int) -> tuple[Tensor, dict[str, float]]:
        """Take one pass over the stream; return the steps' losses and the parameters' mean gradient norms."""
        order = torch.randperm(self.context.samples, generator=self.context.generator)
        batches = order.to(stepper.feed.place).split(self.training.batch)
        for samples in batches:
            stepper.step(samples, self.steps / total)
            self.steps += 1
        self.trained.tell(1.0)
        return stepper.read(len(batches))

    @torch.no_grad()
    def _loss_of_stream(self) -> float:
        """The loss over the whole stream at the present parameters, in order; infinite where nobody asks for it."""
        if not self._keeps_best:
            return math.inf
        function = self.trained.function()
        total = torch.zeros((), device=self.device)
        assert self.context.inputs is not None
        streams = [self.context.inputs, *self.window.targets]
        for x, *targets in zip(*(stream.split(self.context.batch) for stream in streams), strict=True):
            out = function(x.to(self.device, self.trained.block.dtype))
            total += self.window.loss(out, [target.to(self.device) for target in targets], self.power) * len(x)
        return (processes.add(total) / self.context.samples).item()

    def _choose_trained(self, epoch: int) -> None:
        """In a staged schedule the parts named late stand still for the first epochs."""
        if self.training.schedule != "staged":
            return
        for part, state in zip(self.trained.parts, self.trained.states, strict=True):
            waits = part.name in self.training.late and epoch < self.training.wait
            for parameter in state.parameters.values():
                parameter.requires_grad_(not waits)
        if epoch == self.training.wait and self.stepper is not None:
            self.stepper.forget_recorded()

    def _increments(self) -> dict[str, Tensor]:
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.trained.named_parameters()
            if name.endswith((":increment", ":corner", ":lower", ":upper"))
        }
