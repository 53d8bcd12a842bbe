"""The training behind `lsiq.methods.finetune.settings`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.errors import InputError, NumericalError, ResourceError
from lsiq.methods.base import Method, Traits
from lsiq.methods.finetune.form import KEPT, kept_bytes, smaller
from lsiq.methods.finetune.loss import float_loss, text_loss
from lsiq.methods.finetune.optimizers import Optimizers
from lsiq.methods.finetune.progress import Course, Progress
from lsiq.methods.finetune.recorder import Recorder, recordable
from lsiq.methods.finetune.tuned_block import TunedBlock
from lsiq.methods.finetune.windows import Group, Window, groups
from lsiq.models.block import Block, run_stream
from lsiq.models.context import Context, Need
from lsiq.models.result import BlockResult
from lsiq.results.store import BlockStore
from lsiq.runtime import processes
from lsiq.runtime.batch_exchange import fetch
from lsiq.runtime.memory import free_bytes
from lsiq.runtime.micro_batch import MicroBatch
from lsiq.runtime.precision import tf32

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.methods.finetune.settings import FineTune


@dataclass(frozen=True)
class Finished(Traits):
    """A method that hands out blocks which are done."""

    name: str
    results: Sequence[BlockResult]
    needs: frozenset[Need] = field(default_factory=frozenset)

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        del quant, context
        return self.results[block.index]


def tune(settings: FineTune, quant: QuantSettings, context: Context) -> Method:
    """Return a method that hands out the run's own early blocks and trained last ones.

    Raises:
        InputError: the run is of another model or format.
        NumericalError: the loss is not finite.
    """
    assert settings.run is not None
    assert context.ahead is not None
    store = BlockStore(Path(settings.run) / "blocks")
    results = [store.read(index) for index in range(context.ahead.depth)]
    for index, initial in enumerate(results):
        _check(initial, context.ahead.block(index), quant.in_block(index), settings.run)
        if settings.latents and set(initial.latents) != set(initial.weights):
            raise InputError(
                f"method.latents=true: {settings.run} keeps no weights as they were before rounding; make it with a "
                "learned method and method.latents=true, or use method.latents=false"
            )
    assert settings.trained != "auto"  # whoever knows the model and its device has chosen by `form`
    tuner = _Tuner(settings, results, quant, context)
    tuner.train()
    return Finished(settings.name, tuner.results)


def _check(initial: BlockResult, block: Block, quant: QuantSettings, run: str) -> None:
    """The run must be of this model and this format, for its grids are kept, and all of it in codes."""
    if initial.branches:
        raise InputError(
            f"method.run={run}: has low-rank side branches, which are not trained here; give a run without them"
        )
    for name in block.linears:
        weight = initial.weights.get(name)
        if weight is None or weight.codes.shape != block.weights[name].shape:
            raise InputError(f"method.run={run}: its blocks do not fit this model; give a run of the same model")
        if weight.format != quant.of(name):
            raise InputError(
                f"method.run={run}: was quantised to {weight.format.bits} bits in groups of {weight.format.width}; "
                "give the same quant= as that run"
            )


class _Tuner:
    """Trains groups of blocks of one model, each group through all that lies behind it."""

    def __init__(
        self, settings: FineTune, results: Sequence[BlockResult], quant: QuantSettings, context: Context
    ) -> None:
        assert context.inputs is not None
        assert context.ahead is not None
        self.settings, self.quant, self.context = settings, quant, context
        self.results, self.finished = list(results), dict[int, BlockResult]()
        self.hidden, self.reached = context.inputs, 0  # what the quantised model feeds the block `reached`
        self.sequences = processes.share(context.samples)
        block = self._block(0)
        self.device = block.device
        self.dtype = settings.training.in_precision(block, context.cache).dtype
        self.micro = MicroBatch(settings.training.batch, "fine-tuning", smaller(settings))
        with torch.no_grad():
            self.vocabulary = context.ahead.logits(self.hidden[:1, :1].to(self.device)).shape[-1]
        self.reference = self._float_outputs() if settings.loss == "float" else None
        form = {key: getattr(settings, key) for key in ("trained", "window", "window_epochs", "states")}
        self.progress = Progress(context.unfinished, form)
        self.course = self.progress.course(self.device) or Course(0, 0, self.micro.size)
        self.micro.size = self.course.size

    def train(self) -> None:
        """Train all groups and replace their blocks' results, from where an earlier try stopped."""
        self._finish(self.progress.finished())
        for number, group in enumerate(groups(self.settings, len(self.results), self.context.samples)):
            if number < self.course.group:
                continue
            if number > self.course.group:
                self.course = Course(number, 0, self.micro.size)
            with tf32(self.settings.training.precision == "tf32"):
                self._finish(self._train(group))

    def _finish(self, results: Mapping[int, BlockResult]) -> None:
        self.finished |= results
        for index, result in results.items():
            self.results[index] = result

    def _train(self, group: Group) -> dict[int, BlockResult]:
        """Return the blocks of a group, trained together: the increments window by window, all else throughout."""
        start = time.perf_counter()
        self._advance(group.blocks[0])
        place = self._resting_place(group.blocks[0])
        recorded = self._recorded(group, place)
        recomputes = not (recorded and self._keeps())
        blocks = {
            index: self._tuned(index, index not in group.blocks, place, recomputes)
            for index in range(group.blocks[0], len(self.results))
        }
        chain = [block.forward for block in blocks.values()]
        trained = [parameters for block in blocks.values() for parameters in block.groups]
        throughout = Optimizers(trained, range(group.steps), self.device, recorded)
        for index, tensors in self.progress.settled().items():
            blocks[index].take_settled(tensors)
        metrics: dict[int, dict[str, float]] = {}
        for number, window in enumerate(group.windows):
            facts = {"window": float(number)} if len(group.windows) > 1 else {}
            if self.course.steps < window.steps.stop or not window.steps:  # else an earlier try settled its blocks
                facts["step_seconds"] = self._train_window(group, number, chain, throughout, blocks, recorded)
            metrics |= dict.fromkeys(window.blocks, facts)
        shared = {"seconds": time.perf_counter() - start}
        if losses := self.course.losses:
            shared |= {"loss_first": losses[0], "loss_last": losses[-1]}
        return {index: blocks[index].result({**shared, **metrics.get(index, {})}) for index in group.blocks}

    def _train_window(
        self,
        group: Group,
        number: int,
        chain: Sequence[Callable[[Tensor], Tensor]],
        throughout: Optimizers,
        blocks: Mapping[int, TunedBlock],
        recorded: bool,
    ) -> float:
        """Train the increments of a window and settle its blocks; return the seconds that a step took.

        Its optimizer is gone when this returns, so that there is room for the next one's.
        """
        window = group.windows[number]
        opened = [blocks[index] for index in window.blocks]
        weights = [parameters for block in opened for parameters in block.open(len(window.steps))]
        increments = Optimizers(weights, window.steps, self.device, recorded, self.settings.states)
        seconds = self._steps(group, number, chain, throughout, increments, blocks)
        for block in opened:
            block.settle()
        return seconds

    def _tuned(self, index: int, rests: bool, place: torch.device, recomputes: bool) -> TunedBlock:
        quant, result = self.quant.in_block(index), self.results[index]
        return TunedBlock(self.settings, self._block(index), result, quant, self.context, rests, place, recomputes)

    def _recorded(self, group: Group, place: torch.device) -> bool:
        """Whether steps are recorded: those of small models of which all blocks are trained at once, in float32."""
        whole = len(group.windows) == 1 and group.blocks[-1] == len(self.results) - 1 and place == self.device
        weights = sum(weight.codes.numel() for result in self.results for weight in result.weights.values())
        asked = self.settings.training.graphs and self.settings.states == "float32"
        return asked and whole and recordable(self.device, weights)

    def _keeps(self) -> bool:
        """Whether there is ample room for all that the blocks leave behind on the way to the loss."""
        block, (_, seqlen, _) = self._block(0), self.hidden.shape
        size = kept_bytes(block.shape, len(self.results), block.heads[0], self.micro.size, seqlen, self.dtype.itemsize)
        return size <= KEPT * free_bytes(self.device)

    def _resting_place(self, first: int) -> torch.device:
        """Where codes lie of which no weights are trained: the device, or the host where they take half its room."""
        size = sum(weight.codes.nbytes for result in self.results[first:] for weight in result.weights.values())
        roomy = self.device.type == "cpu" or 2 * size <= free_bytes(self.device)
        return self.device if roomy else torch.device("cpu")

    def _steps(
        self,
        group: Group,
        number: int,
        chain: Sequence[Callable[[Tensor], Tensor]],
        throughout: Optimizers,
        increments: Optimizers,
        blocks: Mapping[int, TunedBlock],
    ) -> float:
        """Take the steps of a window that are left, and return the seconds that one took.

        What is stopped between two steps is kept.
        """
        window, course = group.windows[number], self.course
        optimizers, batches = [*throughout.each, *increments.each], self._batches(group)
        parameters = [p for optimizer in optimizers for rated in optimizer.param_groups for p in rated["params"]]
        if self.progress.stored is not None:
            self.progress.restore(optimizers)
        gradients = partial(self._gradients, chain, parameters)
        recorder = None
        if any(rated.get("capturable") for optimizer in optimizers for rated in optimizer.param_groups):
            recorder = Recorder(optimizers, gradients, self.settings.training.batch, self.micro)
        before, start, moving = course.steps, time.perf_counter(), False
        try:
            for step in range(course.steps, window.steps.stop):
                if self.progress.due:
                    self._write(optimizers, group.windows[:number], blocks)
                for each in (throughout, increments):
                    each.set_rates(self.settings, step)
                hidden, target, weight = self._batch(batches[step])
                if recorder is None:
                    loss = processes.add(self.micro.fitting(partial(gradients, hidden, target, weight)))
                    processes.add_gradients(parameters)
                    moving = True  # in the middle of a step there is nothing to go on from
                    for optimizer in optimizers:
                        optimizer.step()
                else:
                    moving = True
                    loss = recorder.step(hidden, target)
                course.sums.append(loss)
                course.steps, course.size = step + 1, self.micro.size
                self._end_epoch(group)
                moving = False
        except (KeyboardInterrupt, ResourceError):
            if not moving:
                self._write(optimizers, group.windows[:number], blocks)
            raise
        return (time.perf_counter() - start) / max(1, course.steps - before)

    def _write(
        self, optimizers: Sequence[torch.optim.Optimizer], behind: Sequence[Window], blocks: Mapping[int, TunedBlock]
    ) -> None:
        """Keep where training stands; the blocks of the windows `behind` are settled."""
        settled = {index: blocks[index].settled() for window in behind for index in window.blocks}
        self.progress.write(self.course, optimizers, settled, self.finished)

    def _batches(self, group: Group) -> list[Tensor]:
        """Return the indices of the sequences of each step of a group, in an order of their own for each epoch."""
        batch, samples = self.settings.training.batch, self.context.samples
        epochs = group.steps // math.ceil(samples / batch)
        generator = torch.Generator().manual_seed(self.context.generator.initial_seed() + group.blocks[0])
        orders = [torch.randperm(samples, generator=generator) for _ in range(epochs)]
        return [part for order in orders for part in order.split(batch)]

    def _end_epoch(self, group: Group) -> None:
        """Where an epoch ends, note and tell the mean of its losses."""
        course, first = self.course, group.blocks[0]
        if course.steps % math.ceil(self.context.samples / self.settings.training.batch):
            return
        epoch = len(course.losses)
        course.losses.append(torch.stack(course.sums).mean().item())
        course.sums.clear()
        if not math.isfinite(course.losses[-1]):
            raise NumericalError(
                f"block {first}: the loss is not finite in epoch {epoch}; lower the learning rates of method"
            )
        self.context.log({"finetune/loss": course.losses[-1], "finetune/block": first, "finetune/epoch": epoch})

    def _batch(self, samples: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return this process's part of a batch: what enters the group, what is to come of it, and its weight."""
        hidden, weight = fetch(self.hidden, samples, self.context.samples)
        if self.reference is not None:
            target = fetch(self.reference, samples, self.context.samples)[0]
        else:
            assert self.context.tokens is not None
            target = fetch(self.context.tokens[self.sequences], samples, self.context.samples)[0]
        return hidden.to(self.device, self.dtype), target.to(self.device), weight

    def _gradients(
        self,
        chain: Sequence[Callable[[Tensor], Tensor]],
        parameters: Sequence[Tensor],
        hidden: Tensor,
        target: Tensor,
        weight: float = 1.0,
    ) -> Tensor:
        """Leave the gradients of a batch in the parameters, and return its loss."""
        for parameter in parameters:
            parameter.grad = None
        total = torch.zeros((), device=self.device)
        for part in self.micro.parts(len(hidden)):
            share = weight * ((part.stop - part.start) / len(hidden))
            loss = self._loss(chain, hidden[part], target[part]) * share
            loss.backward()
            total += loss.detach()
        return total

    def _loss(self, chain: Sequence[Callable[[Tensor], Tensor]], hidden: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch."""
        assert self.context.ahead is not None
        for function in chain:
            hidden = function(hidden)
        loss = text_loss if self.reference is None else float_loss
        return loss(self.context.ahead.logits, hidden.to(self.hidden.dtype), target, self.vocabulary)

    def _block(self, index: int) -> Block:
        assert self.context.ahead is not None
        return self.context.ahead.block(index)

    def _advance(self, to: int) -> None:
        """Run the quantised stream up to the block `to`."""
        for index in range(self.reached, to):
            function = self._block(index).with_result(self.results[index], self.quant.running)
            self.hidden = run_stream(function, self.hidden, self.context.batch, self.device)
        self.reached = to

    def _float_outputs(self) -> Tensor:
        """What leaves the last block of the float model, `(N, T, d)`."""
        hidden = self.hidden
        for index in range(len(self.results)):
            hidden = run_stream(self._block(index).with_weights({}), hidden, self.context.batch, self.device)
        return hidden
