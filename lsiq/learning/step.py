"""One optimizer step on a block: the weights made, the tokens passed, the gradients brought back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.learning.batches import BatchFeeder
from lsiq.learning.optimizers import Optimizers
from lsiq.learning.trained import Trained
from lsiq.runtime import processes
from lsiq.runtime.micro_batch import MicroBatch
from lsiq.runtime.timing import Stopwatch

if TYPE_CHECKING:
    from lsiq.learning.look_ahead import LookAheadLoss
    from lsiq.learning.schedule import Training


# Steps taken before one is recorded: libraries allocate their workspaces and the optimizer its state in the first.
WARM_STEPS = 2


class Stepper:
    """Takes optimizer steps on a block's reconstruction loss.

    On a GPU a step of a small block is hundreds of launches that take longer than their work. So one step is recorded
    as a CUDA graph after the first few and replayed from then on, with the same result. Nothing in a step waits for
    the device: losses and gradient norms are gathered there and read once an epoch.
    """

    def __init__(
        self,
        trained: Trained,
        training: Training,
        feed: BatchFeeder,
        window: LookAheadLoss,
        slow: float,
    ) -> None:
        self.trained, self.training, self.feed, self.window = trained, training, feed, window
        self.device = trained.block.device
        cuda = self.device.type == "cuda"
        states = [trained.states, *(companion.states for companion in window.companions)]
        self.descent = Optimizers(
            trained.parts,
            list(zip(*states, strict=True)),
            training,
            training.steps(feed.total),
            slow,
            self.device,
        )
        half = trained.block.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half, init_scale=2.0**16, growth_interval=200)
        self.float_function = trained.block.with_weights({}) if training.aug_loss else None
        self.weight_path = Stopwatch(self.device)
        self.record_steps = cuda and training.graphs
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.micro = MicroBatch(len(feed.x), f"training block {trained.block.index}")
        self.warm = self.replays = 0
        self.losses = torch.zeros(feed.total, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.last_loss = torch.zeros((), device=self.device)
        self.norms = {name: torch.zeros((), device=self.device) for name, _ in trained.named_parameters()}

    def step(self, samples: Tensor, progress: float) -> None:
        """Take one step on the sequences `samples (n,)`, with the share `progress` of all steps behind."""
        self.descent.set_rates(self.training.rate_factor(progress))
        for trained in (self.trained, *self.window.companions):
            trained.tell(progress)
        count, weight = self.feed.load(samples)
        full = len(samples) == self.feed.batch
        if not (self.record_steps and full and self.warm >= WARM_STEPS):
            self.gradients(count, weight)
            processes.add_gradients(self.descent.parameters())
            self.move()
            self.warm += full
            return
        if not self.graphs:
            self._record(count, weight)
        for position, graph in enumerate(self.graphs):
            if position:
                processes.add_gradients(self.descent.parameters())
            graph.replay()
        self.replays += 1

    def _record(self, count: int, weight: float) -> None:
        """Record a step: in one piece, or with a gap in which several processes add up their gradients."""
        # Another thread waits for what the processes send each other, which must not spoil the recording.
        mode = "global" if processes.size() == 1 else "thread_local"
        first = torch.cuda.CUDAGraph()
        self.graphs = [first]
        with torch.cuda.graph(first, capture_error_mode=mode):
            self.gradients(count, weight)
            if processes.size() == 1:
                self.move()
        if processes.size() > 1:
            self.graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(self.graphs[1], pool=first.pool(), capture_error_mode=mode):
                self.move()

    def forget_recorded(self) -> None:
        """Record anew before the next replay: what is trained has changed."""
        self.graphs, self.warm = [], 0
        self.weight_path.forget_recorded()

    def read(self, steps: int) -> tuple[Tensor, dict[str, float]]:
        """Return the losses and the mean gradient norms of the last `steps` steps, and begin to gather anew."""
        self.weight_path.replayed(self.replays)
        losses = processes.add(self.losses[:steps].clone()).cpu()
        totals = torch.stack(list(self.norms.values())).tolist()
        for tensor in (self.position, *self.norms.values()):
            tensor.zero_()
        self.replays = 0
        return losses, {name: total / steps for name, total in zip(self.norms, totals, strict=True)}

    def take(self, count: int) -> None:
        """Launch one step on the first `count` sequences of the feed's buffers."""
        self.gradients(count, 1.0)
        self.move()

    def gradients(self, count: int, weight: float) -> None:
        """Launch the way to the gradients on the first `count` sequences of the feed's buffers, `weight` of a batch."""
        self.last_loss = self.micro.fitting(lambda: self._in_parts(count, weight))

    def _in_parts(self, count: int, weight: float) -> Tensor:
        """Gather the gradients of some sequences after others where they do not fit together; return the loss."""
        self.descent.forget_gradients()
        weights, leaves = self.make_weights()
        total = torch.zeros((), device=self.device)
        for part in self.micro.parts(count):
            loss = self.loss(part, weights, leaves) * (weight * ((part.stop - part.start) / count))
            self.backward_tokens(loss)
            total += loss.detach()
        self.backward_weights(weights, leaves)
        return total

    def make_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the rounded weights, and those that have gradients as leaves.

        The tokens see the leaves, so that the two paths' backward passes stand apart and can be timed.
        """
        with self.weight_path.running():
            weights = self.trained.weights()
        return weights, {name: w.detach().requires_grad_() for name, w in weights.items() if w.requires_grad}

    def loss(self, part: slice, weights: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss of some of the sequences in the feed's buffers."""
        x, targets = self.feed.x[part], [target[part] for target in self.feed.targets]
        out = self.trained.block.with_weights({**weights, **leaves}, self.trained.quant.running)(x)
        loss = self.window.loss(out, targets)
        if self.float_function is not None:
            with torch.no_grad():
                same_input = self.float_function(x).float()
            loss = loss + self.window.error(out, same_input)
        return loss

    def backward_tokens(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the leaves, at the scale of half precision."""
        self.scaler.scale(loss).backward()

    def backward_weights(self, weights: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> None:
        """Add the leaves' gradients, taken back through the weight path, to the parameters."""
        with self.weight_path.running():
            names = [name for name, leaf in leaves.items() if leaf.grad is not None]
            torch.autograd.backward([weights[name] for name in names], [leaves[name].grad for name in names])

    def move(self) -> None:
        """Let the optimizers move the parameters by the gradients of the whole batch; note loss and gradient norms."""
        self.descent.unscale(self.scaler)
        self._gather(self.last_loss)
        self.descent.step(self.scaler)

    @torch.no_grad()
    def _gather(self, loss: Tensor) -> None:
        self.losses.index_copy_(0, self.position, loss[None].to(self.losses.dtype))
        self.position += 1
        pairs = [(self.norms[name], p.grad) for name, p in self.trained.named_parameters() if p.grad is not None]
        lengths = torch._foreach_norm([gradient for _, gradient in pairs])  # pyright: ignore[reportPrivateImportUsage]
        totals, norms = [total for total, _ in pairs], [length.float() for length in lengths]
        torch._foreach_add_(totals, norms)  # pyright: ignore[reportPrivateImportUsage]
