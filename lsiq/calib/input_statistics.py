"""What a method may ask of the inputs of each linear: gathered in one pass over the stream, batch by batch.

All of it is a sum or a maximum over tokens, so it does not depend on how the stream is cut into batches beyond the
order of summation. Several processes reduce what each gathered of its sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lsiq.formats.base import ActivationFormat
from lsiq.models.block import Block
from lsiq.runtime import processes, streams
from lsiq.runtime.micro_batch import MicroBatch

Update = Callable[[str, Tensor], None]


class _AllShown(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    pass


@torch.no_grad()
def visit_inputs(
    block: Block,
    weights: Mapping[str, Tensor],
    inputs: Tensor,
    batch: int,
    linears: Sequence[str],
    update: Update,
    activation: ActivationFormat | None = None,
) -> None:
    """Run a stream `(N, T, d)` through the block, as far as needed, and show `update` the inputs of some linears.

    Args:
        weights: replace the block's own, as in `Block.with_weights`.
        linears: dotted names of linears, without `.weight`. Of linears that share an input only the first is shown.
        update: takes the linear's name and its inputs `(tokens, in)` in the precision in which the block runs.
        activation: the format in force inside the block; inputs are shown rotated, where the block rotates them, and as
            they are before the format rounds them.
    """
    device = block.device
    function = block.with_weights(weights, activation)  # before the hooks: it runs the prefix, which is not shown
    micro = MicroBatch(batch, f"gathering the inputs of block {block.index}")

    def visit(part: Tensor, shown_names: frozenset[str]) -> None:
        showing = _Showing(block, linears, update, set(shown_names))
        reason = ""
        try:
            with showing.hooked(), contextlib.suppress(_AllShown):
                function(part.to(device, non_blocking=True))  # a GPU that waited here for the host would run dry
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(".")[0]
        if reason:  # what was shown of this part is not shown again
            micro.halve(reason)
            for smaller in part.split(micro.size):
                visit(smaller, frozenset(showing.shown_names))

    for whole in inputs.split(batch):
        for part in micro.parts(len(whole)):
            visit(whole[part], frozenset())
        streams.release(inputs)


class _Showing:
    """One pass of some sequences through a block, and the linears whose inputs were shown."""

    def __init__(self, block: Block, linears: Sequence[str], update: Update, shown_names: set[str]) -> None:
        self.block, self.linears, self.update, self.shown_names = block, linears, update, shown_names
        self.shown_inputs: list[Tensor] = []

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [
            self.block.module.get_submodule(name).register_forward_pre_hook(self._hook(name)) for name in self.linears
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            repeated = any(args[0] is earlier for earlier in self.shown_inputs)
            self.shown_inputs.append(args[0])
            if name not in self.shown_names and not repeated:
                rotation = self.block.rotation_of(name)
                rotated = args[0] if rotation is None else rotation.apply(args[0])
                self.update(name, rotated.flatten(0, -2))
            self.shown_names.add(name)
            if self.shown_names.issuperset(self.linears):
                raise _AllShown

        return hook


def extremes(block: Block, inputs: Tensor, batch: int) -> dict[str, Tensor]:
    """Return the smallest and the largest input per channel of the float block, stacked as `(2, in)`, by linear.

    Linears of one stage share an input, so it is looked at once.
    """
    bounds: dict[str, Tensor] = {}

    def update(name: str, x: Tensor) -> None:
        lo, hi = x.amin(0).float(), x.amax(0).float()
        if name in bounds:
            lo, hi = lo.minimum(bounds[name][0]), hi.maximum(bounds[name][1])
        bounds[name] = torch.stack([lo, hi])

    visit_inputs(block, {}, inputs, batch, [stage[0] for stage in block.spec.stages], update)
    for ranges in bounds.values():
        processes.least(ranges[0])
        processes.largest(ranges[1])
    return {name: bounds[stage[0]] for stage in block.spec.stages for name in stage}


def peak_inputs(block: Block, inputs: Tensor, batch: int, linears: Sequence[str]) -> dict[str, Tensor]:
    """Return, by linear, the inputs `(in, in)` of the token at which each channel is largest, one row per channel."""
    peaks: dict[str, tuple[Tensor, Tensor]] = {}

    def update(name: str, x: Tensor) -> None:
        size, token = x.float().abs().max(0)
        rows = x[token].float()
        if name in peaks:
            before, peak_rows = peaks[name]
            rows = torch.where((size > before)[:, None], rows, peak_rows)
            size = size.maximum(before)
        peaks[name] = (size, rows)

    visit_inputs(block, {}, inputs, batch, linears, update)
    return {name: _of_largest(size, rows) for name, (size, rows) in peaks.items()}


def _of_largest(size: Tensor, rows: Tensor) -> Tensor:
    """Return of each row `(in,)` that of the process whose `size` is largest, the first of equals."""
    rank = processes.rank()
    holds = size == processes.largest(size.clone())
    winner = processes.least(torch.where(holds, rank, processes.size()))
    return processes.add(torch.where((winner == rank)[:, None], rows, 0))
