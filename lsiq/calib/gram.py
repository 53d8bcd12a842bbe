"""The second moments of the inputs of linears, which decide how much an error in their weights matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lsiq.calib.input_statistics import visit_inputs
from lsiq.errors import NumericalError
from lsiq.formats.base import ActivationFormat
from lsiq.models.block import Block
from lsiq.runtime import processes
from lsiq.runtime.precision import tf32

# Rows of a Gram matrix made by one product: enough to fill a GPU, and more than most small models have, which keep
# their sums to the last digit.
STRIP = 2048


def input_grams(
    block: Block,
    weights: Mapping[str, Tensor],
    inputs: Tensor,
    batch: int,
    linears: Sequence[str],
    activation: ActivationFormat,
    product: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return the Gram matrix `XᵀX / tokens (in, in)` in float64 of the inputs of some linears, by name.

    Args:
        weights: replace the block's own while the stream `inputs (N, T, d)` runs through it.
        linears: dotted names without `.weight`, one for each input that is wanted.
        activation: where it is in force, `X` is what the linears get after their inputs were rounded to it.
        product: the precision of the products of one batch; sums over batches and processes are float64.

    Raises:
        NumericalError: an input is not finite.
    """
    grams: dict[str, Tensor] = {}

    def update(name: str, x: Tensor) -> None:
        gram = gram_matrix(activation.fake(x.float()) if activation.active else x, product)
        grams[name] = gram.double() if name not in grams else grams[name].add_(gram)  # which adds in float64

    visit_inputs(block, weights, inputs, batch, linears, update, activation)
    tokens = int(processes.add_number(inputs.shape[0] * inputs.shape[1]))
    for name, gram in grams.items():
        check_finite(processes.add(gram), block, name)
        gram /= tokens
    return grams


def gram_matrix(x: Tensor, product: torch.dtype = torch.float32) -> Tensor:
    """Return `XᵀX (in, in)` of `x (tokens, in)`, multiplied and added up in the precision `product`.

    A GPU multiplies inputs of 16 bits in TF32: its ten bits of mantissa and eight of exponent hold every number of
    float16 and bfloat16, so nothing is rounded that float32 would keep, and sums are float32.
    """
    with tf32(x.dtype.itemsize == 2 and product == torch.float32):
        return _product(x.to(product))


def _product(x: Tensor) -> Tensor:
    """Return `XᵀX`; of wide inputs only what lies on and above the diagonal is multiplied.

    Below it is the mirror image, block by block of `STRIP` rows: 3/4 of the products at 4096 inputs, 0.59 at 11008.
    """
    width = x.shape[1]
    if width <= STRIP:
        return x.t() @ x
    gram = x.new_empty(width, width)
    for start in range(0, width, STRIP):
        stop = min(start + STRIP, width)
        torch.mm(x[:, start:stop].t(), x[:, start:], out=gram[start:stop, start:])
        gram[stop:, start:stop] = gram[start:stop, stop:].t()
    return gram


def check_finite(statistic: Tensor, block: Block, name: str) -> None:
    """Raise NumericalError unless what was gathered of the inputs of the linear `name` is finite."""
    if not statistic.isfinite().all():
        raise NumericalError(
            f"block {block.index}, {name}: its inputs are not finite; try model.dtype=float32 or model.dtype=bfloat16"
        )


def output_error(w: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Return the mean over tokens of `‖(W - Ŵ) x‖²`, summed over outputs, for `w` and `rounded (out, in)`."""
    difference = (w - rounded).to(gram.dtype)
    return ((difference @ gram) * difference).sum().item()
