"""The training behind `lsiq.methods.finetune.settings`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq.errors import InputError, NumericalError, ResourceError
from lsiq.methods.base import Method, Traits
from lsiq.methods.finetune.loss import float_loss, text_loss
from lsiq.methods.finetune.progress import Course, Progress
from lsiq.methods.finetune.recorder import Recorder, recordable
from lsiq.methods.finetune.tuned_block import Trained, TunedBlock
from lsiq.methods.finetune.windows import Window, windows
from lsiq.models.block import Block, BlockFunction, run_stream
from lsiq.models.context import Context, Need
from lsiq.models.result import BlockResult
from lsiq.results.store import BlockStore
from lsiq.runtime import processes
from lsiq.runtime.batch_exchange import fetch
from lsiq.runtime.memory import free_bytes
from lsiq.runtime.micro_batch import AGAIN, MicroBatch

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
    for window in tuner.left():
        tuner.train(window)
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


def _smaller(settings: FineTune) -> str:
    """What to do where not even one sequence fits."""
    again = "method.memory=GIB chooses a smaller form by trained=auto and keeps the finished blocks"
    if not settings.together or settings.trained == "grid":
        return f"this is the least form; use a shorter calib.seqlen, or {AGAIN}"
    if settings.trained == "window" and settings.window != 1:
        fewer = "fewer" if settings.window is None else str(settings.window // 2)
        return f"use method.window={fewer}, or method.trained=grid; {again}; or {AGAIN}"
    smaller = "window" if settings.trained == "all" else "grid"
    return f"use method.trained={smaller}; {again}; or {AGAIN}"


class _Tuner:
    """Trains windows of blocks of one model, each through all that lies behind it."""

    def __init__(
        self, settings: FineTune, results: Sequence[BlockResult], quant: QuantSettings, context: Context
    ) -> None:
        assert context.inputs is not None
        assert context.ahead is not None
        self.settings, self.quant, self.context = settings, quant, context
        self.results = list(results)
        self.hidden, self.reached = context.inputs, 0  # what the quantised model feeds the block `reached`
        self.sequences = processes.share(context.samples)
        block = self._block(0)
        self.device = next(iter(block.weights.values())).device
        self.dtype = settings.training.in_precision(block, context.cache).dtype
        self.micro = MicroBatch(settings.training.batch, "fine-tuning", _smaller(settings))
        with torch.no_grad():
            self.vocabulary = context.ahead.logits(self.hidden[:1, :1].to(self.device)).shape[-1]
        self.reference = self._float_outputs() if settings.loss == "float" else None
        self.windows = windows(settings, len(results), context.samples)
        self.progress = Progress(context.unfinished, {"trained": settings.trained, "window": settings.window})

    def left(self) -> list[Window]:
        """Return the windows that are to be trained, once the results of those that were are taken up."""
        for window in self.windows[:-1]:
            finished = self.progress.read_window(window.number)
            if finished is None:
                return self.windows[window.number :]
            for index, result in finished.items():
                self.results[index] = result
        return self.windows[-1:]

    def train(self, window: Window) -> None:
        """Train the blocks of a window together and replace their results."""
        start = time.perf_counter()
        self._advance(window.blocks[0])
        trained = "grid" if self.settings.trained == "grid" else "all"
        tuned = {index: self._tuned(index, trained, len(window.steps)) for index in window.blocks}
        resting = self._resting_place(window)
        behind = [
            self._tuned(index, "nothing", 0, resting) for index in range(window.blocks[-1] + 1, len(self.results))
        ]
        chain = [block.forward for block in (*tuned.values(), *behind)]
        optimizer = self._optimizer([group for block in (*tuned.values(), *behind) for group in block.groups], behind)
        losses = self._steps(window, chain, optimizer)
        metrics: dict[str, float] = {"seconds": time.perf_counter() - start}
        if losses:
            metrics |= {"loss_first": losses[0], "loss_last": losses[-1]}
        if self.settings.trained == "window":
            metrics["window"] = window.number
        results = {index: block.result(metrics) for index, block in tuned.items()}
        if window.number < len(self.windows) - 1:
            self.progress.write_window(window.number, results)
        for index, result in results.items():
            self.results[index] = result

    def _optimizer(self, groups: list[dict[str, Any]], behind: Sequence[TunedBlock]) -> torch.optim.Optimizer:
        parameters = [parameter for group in groups for parameter in group["params"]]
        if self.settings.training.graphs and recordable(self.device, parameters, len(behind)):
            # A recorded step reads its rates where they lie.
            groups = [{**group, "lr": torch.tensor(group["lr"], device=self.device)} for group in groups]
            return torch.optim.AdamW(groups, weight_decay=0.0, fused=True, capturable=True)
        fused = self.device.type == "cuda" and sum(p.numel() for p in parameters) >= FUSED
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=fused or None)

    def _tuned(self, index: int, trained: Trained, steps: int, place: torch.device | None = None) -> TunedBlock:
        quant, result = self.quant.in_block(index), self.results[index]
        return TunedBlock(self.settings, self._block(index), result, quant, self.context, trained, steps, place)

    def _resting_place(self, window: Window) -> torch.device:
        """Where the codes of blocks lie that are not trained: the device, or the host where they take half its room."""
        behind = self.results[window.blocks[-1] + 1 :]
        size = sum(weight.codes.nbytes for result in behind for weight in result.weights.values())
        roomy = self.device.type == "cpu" or 2 * size <= free_bytes(self.device)
        return self.device if roomy else torch.device("cpu")

    def _steps(self, window: Window, chain: Sequence[BlockFunction], optimizer: torch.optim.Optimizer) -> list[float]:
        """Take the steps of a window that are left, and return the means of the losses of its epochs.

        What is stopped between two steps is kept.
        """
        batches, rates = self._batches(window), [float(group["lr"]) for group in optimizer.param_groups]
        course = self.progress.read_state(window.number, optimizer) or Course(window.steps.start, self.micro.size)
        self.micro.size = course.size
        recorder = None
        if any(group["capturable"] for group in optimizer.param_groups):
            gradients = partial(self._gradients, chain, optimizer)
            recorder = Recorder(optimizer, gradients, self.settings.training.batch, self.micro)
        moving = False  # in the middle of a step there is nothing to go on from
        try:
            for step in range(course.steps, window.steps.stop):
                if self.progress.due:
                    self.progress.write_state(window.number, optimizer, course)
                factor = self.settings.training.rate_factor((step - window.steps.start) / len(window.steps))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    _set_rate(group, rate * factor)
                hidden, target, weight = self._batch(batches[step])
                if recorder is not None:
                    moving = True
                    loss = recorder.step(hidden, target)
                else:
                    gradients = partial(self._gradients, chain, optimizer, hidden, target, weight)
                    loss = processes.add(self.micro.fitting(gradients))
                    processes.add_gradients(p for group in optimizer.param_groups for p in group["params"])
                    moving = True
                    optimizer.step()
                course.sums.append(loss)
                course.steps, course.size = step + 1, self.micro.size
                self._end_epoch(window, course)
                moving = False
        except (KeyboardInterrupt, ResourceError):
            if not moving:
                self.progress.write_state(window.number, optimizer, course)
            raise
        return course.losses

    def _batches(self, window: Window) -> list[Tensor]:
        """Return the indices of the sequences of each step of the schedule, in an order of their own for each epoch."""
        training, samples = self.settings.training, self.context.samples
        generator = torch.Generator().manual_seed(self.context.generator.initial_seed() + window.drawn)
        orders = [torch.randperm(samples, generator=generator) for _ in range(training.epochs)]
        return [batch for order in orders for batch in order.split(training.batch)]

    def _end_epoch(self, window: Window, course: Course) -> None:
        """Where an epoch ends, or the window, note and tell the mean of its losses."""
        per_epoch = math.ceil(self.context.samples / self.settings.training.batch)
        if course.steps % per_epoch and course.steps != window.steps.stop:
            return
        first, epoch = window.blocks[0], len(course.losses)
        course.losses.append(torch.stack(course.sums).mean().item())
        course.sums.clear()
        if not math.isfinite(course.losses[-1]):
            raise NumericalError(
                f"block {first}: the loss is not finite in epoch {epoch}; lower the learning rates of method"
            )
        self.context.log({"finetune/loss": course.losses[-1], "finetune/block": first, "finetune/epoch": epoch})

    def _batch(self, samples: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return this process's part of a batch: what enters the window, what is to come of it, and its weight."""
        hidden, weight = fetch(self.hidden, samples, self.context.samples)
        if self.reference is not None:
            target = fetch(self.reference, samples, self.context.samples)[0]
        else:
            assert self.context.tokens is not None
            target = fetch(self.context.tokens[self.sequences], samples, self.context.samples)[0]
        return hidden.to(self.device, self.dtype), target.to(self.device), weight

    def _gradients(
        self,
        chain: Sequence[BlockFunction],
        optimizer: torch.optim.Optimizer,
        hidden: Tensor,
        target: Tensor,
        weight: float = 1.0,
    ) -> Tensor:
        """Leave the gradients of a batch in the parameters, and return its loss."""
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in self.micro.parts(len(hidden)):
            share = weight * ((part.stop - part.start) / len(hidden))
            loss = self._loss(chain, hidden[part], target[part]) * share
            loss.backward()
            total += loss.detach()
        return total

    def _loss(self, chain: Sequence[BlockFunction], hidden: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch."""
        assert self.context.ahead is not None
        logits_of = self.context.ahead.logits
        for function in chain:
            hidden = function(hidden)
        hidden = hidden.to(self.hidden.dtype)
        loss = text_loss if self.reference is None else float_loss
        return loss(logits_of, hidden, target, self.vocabulary)

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


def _set_rate(group: dict[str, Any], rate: float) -> None:
    """Let the next step run at a rate; a recorded one reads it where it lies."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
