"""The training behind `lsiq.methods.finetune.settings`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.errors import InputError, NumericalError
from lsiq.methods.base import Method, Traits
from lsiq.methods.finetune.tuned_block import TunedBlock
from lsiq.models.block import Block, BlockFunction, run_stream
from lsiq.models.context import Context, Need
from lsiq.models.result import BlockResult
from lsiq.results.store import BlockStore
from lsiq.runtime import processes
from lsiq.runtime.batch_exchange import fetch
from lsiq.runtime.micro_batch import MicroBatch

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
    first = max(0, len(results) - (settings.blocks or len(results)))
    indices = list(range(first, len(results)))
    tuner = _Tuner(settings, results, quant, context)
    for group in [indices] if settings.together else [[index] for index in indices]:
        tuner.train(group)
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
        self.settings, self.quant, self.context = settings, quant, context
        self.results = list(results)
        self.hidden, self.reached = context.inputs, 0  # what the quantised model feeds the block `reached`
        self.sequences = processes.share(context.samples)
        block = self._block(0)
        self.device = next(iter(block.weights.values())).device
        self.dtype = settings.training.in_precision(block, context.cache).dtype
        self.micro = MicroBatch(settings.training.batch, "fine-tuning")
        self.reference = self._float_outputs() if settings.loss == "float" else None

    def train(self, group: Sequence[int]) -> None:
        """Train the blocks of consecutive indices together and replace their results."""
        assert self.context.tokens is not None
        start = time.perf_counter()
        self._advance(group[0])
        tuned = [
            TunedBlock(self.settings, self._block(i), self.results[i], self.quant.in_block(i), self.context)
            for i in group
        ]
        behind = [
            self.settings.training.in_precision(self._block(index), self.context.cache).with_result(
                self.results[index], self.quant.running
            )
            for index in range(group[-1] + 1, len(self.results))
        ]
        chain = [*(block.forward for block in tuned), *behind]
        optimizer = torch.optim.AdamW([group for block in tuned for group in block.groups], weight_decay=0.0)
        losses = self._epochs(group[0], chain, optimizer)
        metrics = {"seconds": time.perf_counter() - start}
        if losses:
            metrics |= {"loss_first": losses[0], "loss_last": losses[-1]}
        for index, block in zip(group, tuned, strict=True):
            self.results[index] = block.result(metrics)

    def _epochs(self, first: int, chain: Sequence[BlockFunction], optimizer: torch.optim.Optimizer) -> list[float]:
        """Train through `chain`, the blocks from `first` on; return the epochs' mean losses."""
        training, samples = self.settings.training, self.context.samples
        generator = torch.Generator().manual_seed(self.context.generator.initial_seed() + first)
        rates = [group["lr"] for group in optimizer.param_groups]
        steps, total = 0, training.steps(samples)
        losses: list[float] = []
        for epoch in range(training.epochs):
            sums = []
            for indices in torch.randperm(samples, generator=generator).split(training.batch):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * training.rate_factor(steps / total)
                sums.append(self.micro.fitting(lambda indices=indices: self._gradients(chain, indices, optimizer)))
                processes.add_gradients(p for group in optimizer.param_groups for p in group["params"])
                optimizer.step()
                steps += 1
            losses.append(processes.add(torch.stack(sums).mean()).item())
            if not math.isfinite(losses[-1]):
                raise NumericalError(
                    f"block {first}: the loss is not finite in epoch {epoch}; lower the learning rates of method"
                )
            self.context.log({"finetune/loss": losses[-1], "finetune/block": first, "finetune/epoch": epoch})
        return losses

    def _gradients(self, chain: Sequence[BlockFunction], samples: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """Leave the gradients of a batch in the parameters, and return its loss."""
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in self.micro.parts(len(samples)):
            loss = self._loss(chain, samples[part]) * ((part.stop - part.start) / len(samples))
            loss.backward()
            total += loss.detach()
        return total

    def _loss(self, chain: Sequence[BlockFunction], samples: Tensor) -> Tensor:
        """The loss of a batch; of several processes each returns its part of it."""
        assert self.context.tokens is not None
        assert self.context.ahead is not None
        logits_of = self.context.ahead.logits
        hidden, weight = fetch(self.hidden, samples, self.context.samples)
        hidden = hidden.to(self.device, self.dtype)
        for function in chain:
            hidden = function(hidden)
        hidden = hidden.to(self.hidden.dtype)
        if self.reference is None:
            tokens = fetch(self.context.tokens[self.sequences], samples, self.context.samples)[0]
            targets = tokens[:, 1:].to(self.device)
            loss = torch.nn.functional.cross_entropy(logits_of(hidden[:, :-1]).flatten(0, 1), targets.flatten())
            return loss * weight
        with torch.no_grad():
            reference = fetch(self.reference, samples, self.context.samples)[0].to(self.device)
            expected = logits_of(reference).flatten(0, 1).log_softmax(-1)
        log_probabilities = logits_of(hidden).flatten(0, 1).log_softmax(-1)
        return torch.nn.functional.kl_div(log_probabilities, expected, reduction="batchmean", log_target=True) * weight

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
