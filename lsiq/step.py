"""One optimizer step on a block: the weights made, the tokens passed, the gradients brought back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq import distributed
from lsiq.clock import Stopwatch
from lsiq.descent import Descent
from lsiq.feed import Feed
from lsiq.methods.base import Context
from lsiq.microbatch import MicroBatch
from lsiq.models.block import Block, BlockFunction
from lsiq.parts.base import Draft, Part, PartState, rounded

if TYPE_CHECKING:
    from lsiq.config import QuantSettings
    from lsiq.kernels.choice import WeightPath
    from lsiq.kernels.weights import FusedWeights
    from lsiq.methods.learned import Training
    from lsiq.window import Window

# Steps taken before one is recorded: libraries allocate their workspaces and the optimizer its state in the first.
WARM_STEPS = 2


def apply_parts(parts: Sequence[Part], states: Sequence[PartState], block: Block) -> Draft:
    """Return the draft that all parts make of a block, in their order. The one function that is trained and stored."""
    draft = Draft(block.weights)
    for part, state in zip(parts, states, strict=True):
        draft = part.apply(draft, state, block)
    return draft


def plain_weights(
    parts: Sequence[Part], states: Sequence[PartState], block: Block, quant: QuantSettings
) -> dict[str, Tensor]:
    """Return every tensor of the block with its parts in these states, its linears on their grids."""
    return rounded(apply_parts(parts, states, block), block.linears, quant)


def compiled_weights(
    parts: Sequence[Part], states: Sequence[PartState], block: Block, quant: QuantSettings
) -> dict[str, Tensor]:
    """`plain_weights`, compiled when it is first called for blocks of a shape."""
    from lsiq.kernels.compiled import compiled

    bare = replace(block, weights={})  # what is compiled outlives the block

    def make(
        parameters: list[dict[str, Tensor]], constants: list[dict[str, Tensor]], weights: dict[str, Tensor]
    ) -> Any:
        held = [PartState(p, c) for p, c in zip(parameters, constants, strict=True)]
        return plain_weights(parts, held, replace(bare, weights=weights), quant)

    # Which weight is a group's largest must come out the same on the way back.
    run = compiled(make, (tuple(map(repr, parts)), repr(quant), block.identity, block.dtype), keep_all=True)
    return run([s.parameters for s in states], [s.constants for s in states], dict(block.weights))


def start_parts(parts: Sequence[Part], block: Block, quant: QuantSettings, context: Context) -> list[PartState]:
    """Return where the parts start, each on the block as the parts before it start it."""
    draft, states = Draft(block.weights), list[PartState]()
    for part in parts:
        state = part.start(replace(block, weights=draft.weights), quant, context)
        draft = part.apply(draft, state, block)
        states.append(state)
    distributed.take_from_first(p for state in states for p in state.parameters.values())
    return states


@dataclass(frozen=True)
class Trained:
    """What is trained, and how the block is run with it."""

    parts: Sequence[Part]
    states: Sequence[PartState]
    block: Block
    quant: QuantSettings
    path: WeightPath = "plain"
    fused: FusedWeights | None = None

    def weights(self) -> dict[str, Tensor]:
        """Return every tensor of the block at the present parameters, its linears on their grids."""
        if self.fused is not None:
            return self.fused.weights()
        make = compiled_weights if self.path == "compile" else plain_weights
        return make(self.parts, self.states, self.block, self.quant)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters, as `part:name`."""
        for part, state in zip(self.parts, self.states, strict=True):
            for name, parameter in state.parameters.items():
                yield f"{part.name}:{name}", parameter

    def tell(self, done: float) -> None:
        """Let parts that follow a schedule know that the share `done` of the steps is behind; 1 is the end."""
        for state in self.states:
            if (clock := state.constants.get("done")) is not None:
                clock.fill_(done)

    def function(self) -> BlockFunction:
        """Return the block at the present parameters."""
        return self.block.with_weights(self.weights(), self.quant.activation)

    def snapshot(self) -> list[PartState]:
        """A copy of the parameters that training does not move."""
        return [
            replace(state, parameters={name: p.detach().clone() for name, p in state.parameters.items()})
            for state in self.states
        ]

    def own(self) -> Trained:
        """The same with parameters of its own, which gather gradients."""
        states = self.snapshot()
        for state in states:
            for parameter in state.parameters.values():
                parameter.requires_grad_()
        fused = None
        if self.path == "triton":
            from lsiq.kernels.weights import FusedWeights

            fused = FusedWeights(self.parts, states, self.block, self.quant)
        return replace(self, states=states, fused=fused)


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
        feed: Feed,
        window: Window,
        power: Tensor,
        slow: float,
    ) -> None:
        self.trained, self.training, self.feed, self.window, self.power = trained, training, feed, window, power
        self.device = power.device
        cuda = self.device.type == "cuda"
        states = [trained.states, *(companion.states for companion in window.companions)]
        self.descent = Descent(
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
        self.norms = {name: torch.zeros((), device=self.device) for name, _ in trained.named()}

    def step(self, samples: Tensor, done: float) -> None:
        """Take one step on the sequences `samples (n,)`, with the share `done` of all steps behind."""
        self.descent.set_rates(self.training.rate_factor(done))
        for trained in (self.trained, *self.window.companions):
            trained.tell(done)
        count, weight = self.feed.load(samples)
        full = len(samples) == self.feed.batch
        if not (self.record_steps and full and self.warm >= WARM_STEPS):
            self.gradients(count, weight)
            distributed.add_gradients(self.descent.parameters())
            self.move()
            self.warm += full
            return
        if not self.graphs:
            self._record(count, weight)
        for position, graph in enumerate(self.graphs):
            if position:
                distributed.add_gradients(self.descent.parameters())
            graph.replay()
        self.replays += 1

    def _record(self, count: int, weight: float) -> None:
        """Record a step: in one piece, or with a gap in which several processes add up their gradients."""
        # Another thread waits for what the processes send each other, which must not spoil the recording.
        mode = "global" if distributed.size() == 1 else "thread_local"
        first = torch.cuda.CUDAGraph()
        self.graphs = [first]
        with torch.cuda.graph(first, capture_error_mode=mode):
            self.gradients(count, weight)
            if distributed.size() == 1:
                self.move()
        if distributed.size() > 1:
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
        losses = distributed.add(self.losses[:steps].clone()).cpu()
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
        made, leaves = self.make_weights()
        total = torch.zeros((), device=self.device)
        for part in self.micro.parts(count):
            loss = self.loss(part, made, leaves) * (weight * ((part.stop - part.start) / count))
            self.backward_tokens(loss)
            total += loss.detach()
        self.backward_weights(made, leaves)
        return total

    def make_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the rounded weights, and those that have gradients as leaves.

        The tokens see the leaves, so that the two paths' backward passes stand apart and can be timed.
        """
        with self.weight_path.running():
            made = self.trained.weights()
        return made, {name: w.detach().requires_grad_() for name, w in made.items() if w.requires_grad}

    def loss(self, part: slice, made: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss of some of the sequences in the feed's buffers."""
        x, targets = self.feed.x[part], [target[part] for target in self.feed.targets]
        out = self.trained.block.with_weights({**made, **leaves}, self.trained.quant.activation)(x)
        loss = self.window.loss(out, targets, self.power)
        if self.float_function is not None:
            with torch.no_grad():
                same_input = self.float_function(x).float()
            loss = loss + (out.float() - same_input).square().mean() / self.power
        return loss

    def backward_tokens(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the leaves, at the scale of half precision."""
        self.scaler.scale(loss).backward()

    def backward_weights(self, made: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> None:
        """Add the leaves' gradients, taken back through the weight path, to the parameters."""
        with self.weight_path.running():
            used = [name for name, leaf in leaves.items() if leaf.grad is not None]
            torch.autograd.backward([made[name] for name in used], [leaves[name].grad for name in used])

    def move(self) -> None:
        """Let the optimizers move the parameters by the gradients of the whole batch; note loss and gradient norms."""
        self.descent.unscale(self.scaler)
        self._gather(self.last_loss)
        self.descent.step(self.scaler)

    @torch.no_grad()
    def _gather(self, loss: Tensor) -> None:
        self.losses.index_copy_(0, self.position, loss[None].to(self.losses.dtype))
        self.position += 1
        moved = [(self.norms[name], p.grad) for name, p in self.trained.named() if p.grad is not None]
        lengths = torch._foreach_norm([gradient for _, gradient in moved])  # pyright: ignore[reportPrivateImportUsage]
        totals, added = [total for total, _ in moved], [length.float() for length in lengths]
        torch._foreach_add_(totals, added)  # pyright: ignore[reportPrivateImportUsage]
