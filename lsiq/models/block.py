"""One transformer block as a function of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lsiq.formats import ActivationFormat
from lsiq.models.attention import activations
from lsiq.models.branch import Factors, side_branches
from lsiq.models.spec import ModelSpec

if TYPE_CHECKING:
    from lsiq.methods.base import BlockResult


class BlockFunction(Protocol):
    """A block with its weights: `(batch, T, d) -> (batch, T, d)`.

    `kwargs` replace the keyword arguments that the block was read with, for sequences of another length.
    """

    def __call__(self, hidden: Tensor, kwargs: Mapping[str, Any] | None = None, /) -> Tensor: ...


@dataclass(frozen=True)
class Block:
    """An immutable view of one transformer block.

    Attributes:
        module: the untouched layer of transformers, on the meta device: structure without weights.
        spec: what is known of its family.
        index: its place in the model, from 0.
        weights: by dotted name inside the block, float32 on the compute device.
        kwargs: the keyword arguments that the model passes to every block (mask, positions, rotary embedding), at
            batch 1; they broadcast over any batch.
        dtype: the precision in which the block runs.
        unfoldable: why scales cannot be folded into its norms; None where they can.
    """

    module: nn.Module
    spec: ModelSpec
    index: int
    weights: Mapping[str, Tensor]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype
    unfoldable: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Dotted names of the weights to quantise, in the order in which a token meets them."""
        return tuple(f"{name}.weight" for name in self.spec.linears)

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.module.get_submodule(self.spec.query.rpartition(".")[0]).head_dim  # type: ignore[return-value]

    def in_dtype(self, dtype: torch.dtype) -> Block:
        """Return the block running in another precision, rotary embeddings and float masks included."""

        def cast(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cast(item) for item in value)
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return replace(self, dtype=dtype, kwargs={name: cast(value) for name, value in self.kwargs.items()})

    def with_weights(
        self,
        weights: Mapping[str, Tensor],
        activation: ActivationFormat | None = None,
        branches: Factors | None = None,
    ) -> BlockFunction:
        """Return the block as a function `(batch, T, d) -> (batch, T, d)` in which `weights` replace the block's own.

        With `activation`, the inputs of the linears and queries, keys and values are put into that format. Linears
        named in `branches` have their low-rank product added.
        Differentiable in the weights. Nothing is written: the layer of transformers runs through `functional_call`.
        """
        cast = {name: weight.to(self.dtype) for name, weight in {**self.weights, **weights}.items()}
        # The function outlives the block, and must not keep its float32 weights alive.
        module, linears, own = self.module, self.spec.linears, self.kwargs
        beside = {name: (up.to(self.dtype), down.to(self.dtype)) for name, (up, down) in (branches or {}).items()}

        def run(hidden: Tensor, kwargs: Mapping[str, Any] | None = None, /) -> Tensor:
            with activations(module, linears, activation), side_branches(module, beside, activation):
                return functional_call(module, cast, (hidden,), dict(own if kwargs is None else kwargs))

        return run

    def with_result(self, result: BlockResult, activation: ActivationFormat | None = None) -> BlockFunction:
        """Return the block with the weights that a result stands for."""
        device = next(iter(self.weights.values())).device
        factors = {name: branch.decode() for name, branch in result.branches.items()}
        branches = {name: (up.to(device), down.to(device)) for name, (up, down) in factors.items()}
        return self.with_weights(result_weights(result, self.weights), activation, branches)


def result_weights(result: BlockResult, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decode a result to the weights it stands for, on the device of `like`."""
    device = next(iter(like.values())).device
    decoded = {name: tensor.decode().to(device) for name, tensor in result.weights.items()}
    return decoded | {name: tensor.to(device) for name, tensor in result.floats.items()}


@torch.no_grad()
def run_stream(block: BlockFunction, stream: Tensor, batch: int, device: torch.device) -> Tensor:
    """Return the block's outputs for a stream `(N, T, d)` kept on the CPU, `batch` sequences at a time."""
    out = torch.empty_like(stream)
    for start in range(0, len(stream), batch):
        part = slice(start, start + batch)
        out[part] = block(stream[part].to(device, non_blocking=True)).to(stream.device)
    return out
