"""The one inner training loop: the parameters of some parts against a block's reconstruction loss."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.errors import ConfigError, NumericalError
from lsiq.learning.batches import BatchFeeder
from lsiq.learning.look_ahead import LookAheadLoss, look_ahead
from lsiq.learning.step import Stepper
from lsiq.learning.trained import Trained, start_parts
from lsiq.learning.weight_path import choose, on_path
from lsiq.models.block import Block
from lsiq.models.context import Context
from lsiq.parts.base import Part, PartState
from lsiq.runtime import processes
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
        held: the loss on the sequences held back, at its end; None where there are none.
    """

    index: int
    loss: float
    seconds: float
    weight_seconds: float
    gradients: dict[str, float]
    increments: dict[str, Tensor] = field(default_factory=dict)
    held: float | None = None


@dataclass
class Trajectory:
    """Trained parts of one block and how they got there.

    Attributes:
        best_epoch: after which the parameters were best; -1: before the first.
        held: the loss on the sequences held back before the first epoch (after a retry: where it went on from), where
            it was least and after the last epoch, and after how many epochs that was; empty where there are none.
    """

    states: list[PartState]
    epochs: list[Epoch]
    steps: int
    seconds: float
    weight_seconds: float
    retries: int
    best_epoch: int
    kernels: str = "plain"
    held: Mapping[str, float] = field(default_factory=dict)


def learn(
    parts: Sequence[Part], training: Training, block: Block, quant: QuantSettings, context: Context
) -> Trajectory:
    """Train the parts on a block.

    The loss of a batch is the mean squared difference between the quantised block on the quantised stream and the
    float block on the float stream, over the mean square of the latter's stream, or of its channels or tokens
    (`training.relative_to`). To divide by one number leaves Adam's steps as they are and keeps its epsilon small
    against the gradients of any block.

    Raises:
        NumericalError: the loss is not finite after all retries; the message names the block and the rates.
        ConfigError: keep=held would hold no sequence back, or leave none to train on.
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


def held_sequences(samples: int, count: int) -> Tensor:
    """Return which `count` of the sequences are held back: they lie evenly among all.

    They are the same for all blocks, since what enters a block has passed those before it. Which text they are the
    seed decides that draws it.
    """
    return (2 * torch.arange(count) + 1) * samples // (2 * count)


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
        self.hardening = max((part.hardening for part in self.trained.parts), default=0.0)
        self.device = trained.block.device
        self._divide()
        self.stepper = None
        if any(state.parameters for state in trained.states):
            batch = training.batch if self.learned_from is None else min(training.batch, len(self.learned_from))
            feed = BatchFeeder(context.inputs, window.targets, batch, trained.block.dtype, self.device, context.samples)
            self.stepper = Stepper(self.trained, training, feed, window, slow)
        self.steps = 0

    def _divide(self) -> None:
        """Say which sequences are trained on (None: all), and on which of this process the best epoch is chosen."""
        assert self.context.inputs is not None
        samples = self.context.samples
        try:
            count = self.training.held_back(samples)
        except ValueError as error:
            raise ConfigError(f"method.training.{error}") from error
        self.learned_from, self.judging, self.judges = None, torch.arange(len(self.context.inputs)), samples
        if count:
            held, own = held_sequences(samples, count), processes.share(samples)
            trained = torch.ones(samples, dtype=torch.bool)
            trained[held] = False
            self.learned_from, self.judges = trained.nonzero().flatten(), count
            self.judging = held[(held >= own.start) & (held < own.stop)] - own.start

    def run(self, epochs: list[Epoch], retry: int) -> Trajectory:
        """Train the epochs that `epochs` does not hold yet, adding to it."""
        # Epochs of earlier tries count: their time has passed as well.
        spent, spent_on_weights = (epochs[-1].seconds, epochs[-1].weight_seconds) if epochs else (0.0, 0.0)
        start = time.perf_counter() - spent
        self.good_epochs = self.first_epoch = len(epochs)
        best, best_epoch = (self._loss_to_choose_by(), self.trained.snapshot()), len(epochs) - 1
        held = {} if self.learned_from is None else {"held_start": best[0], "held_last": best[0]}
        total = self.training.steps(self.context.samples)
        self.steps = total // max(self.training.epochs, 1) * len(epochs)
        for index in range(len(epochs), self.training.epochs if self.stepper is not None else 0):
            assert self.stepper is not None
            self._choose_trained(index)
            before, soft = self.trained.snapshot(), self.steps < self.hardening * total
            losses, gradients = self._epoch(self.stepper, total)
            self._remember(before, float(losses[0]), index, soft)
            loss = float(losses.mean())
            if not math.isfinite(loss):
                raise _NotFiniteError(index)
            elapsed = time.perf_counter() - start
            weight_seconds = spent_on_weights + self.stepper.weight_path.seconds()
            epochs.append(Epoch(index, loss, elapsed, weight_seconds, gradients, self._increments()))
            self.context.log({"learn/epoch": index, "learn/loss": loss, "learn/block": self.trained.block.index})
            if self._chooses:
                chosen_by = self._loss_to_choose_by()
                if held:
                    epochs[-1].held = held["held_last"] = chosen_by
                    self.context.log({"learn/held": chosen_by})
                if chosen_by < best[0]:
                    best, best_epoch = (chosen_by, self.trained.snapshot()), index
            if self.training.seconds is not None and processes.from_first(elapsed) > self.training.seconds:
                break
        if held:
            held |= {"held_least": best[0], "kept_epochs": float(best_epoch + 1)}
        final = best[1] if self._chooses else self.trained.snapshot()
        seconds = time.perf_counter() - start
        weight_seconds = epochs[-1].weight_seconds if epochs else 0.0
        path = self.trained.path
        return Trajectory(final, epochs, self.steps, seconds, weight_seconds, retry, best_epoch, path, held)

    @property
    def _chooses(self) -> bool:
        """Whether the best of all epochs is kept."""
        return self.training.keep != "last"

    def _remember(self, before: list[PartState], loss: float, index: int, soft: bool) -> None:
        """Keep the state before an epoch as the one to go back to, if its own loss had not run away by then.

        While rounding sets in the loss grows by that alone, so that a finite one is enough.
        """
        if not soft:
            self.first_loss = min(self.first_loss, loss)
        if math.isfinite(loss) if soft else loss <= 2 * self.first_loss:
            self.good, self.good_epochs = before, index

    def _epoch(self, stepper: Stepper, total: int) -> tuple[Tensor, dict[str, float]]:
        """Take one pass over the stream; return the steps' losses and the parameters' mean gradient norms."""
        learned_from = self.learned_from
        count = self.context.samples if learned_from is None else len(learned_from)
        order = torch.randperm(count, generator=self.context.generator)
        order = order if learned_from is None else learned_from[order]
        batches = order.to(stepper.feed.place).split(self.training.batch)
        for samples in batches:
            stepper.step(samples, self.steps / total)
            self.steps += 1
        for trained in (self.trained, *self.window.companions):
            trained.tell(1.0)
        return stepper.read(len(batches))

    @torch.no_grad()
    def _loss_to_choose_by(self) -> float:
        """The loss at the present parameters over the whole stream, or over what of it is held back, in order.

        Infinite where nobody asks for it.
        """
        if not self._chooses:
            return math.inf
        function = self.trained.function()
        total = torch.zeros((), device=self.device)
        assert self.context.inputs is not None
        streams = [self.context.inputs, *self.window.targets]
        for rows in self.judging.split(self.context.batch) if len(self.judging) else ():
            x, *targets = (stream[rows.to(stream.device)].to(self.device) for stream in streams)
            out = function(x.to(self.trained.block.dtype))
            total += self.window.loss(out, targets) * len(x)
        return (processes.add(total) / self.judges).item()

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
