"""The integer grids: fake, encode and decode agree bit for bit, and the formula is the published one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.grids import weights_and_integers
from hypothesis import given, settings

from lsiq.errors import NumericalError
from lsiq.formats.integer import Integer
from lsiq.formats.tensor import quantize


@given(weights_and_integers())
@settings(max_examples=200, deadline=None)
def test_rounding_stays_within_the_step(case: tuple[torch.Tensor, Integer]) -> None:
    w, fmt = case
    if fmt.scale == "float16":
        return  # rounding the scale may clip the ends by more
    quantized = quantize(w, fmt)
    error = (fmt.grouped(quantized.decode()) - fmt.grouped(w)).abs()
    # Half a step inside the range; the rounding of the zero point may cost another half at its ends.
    assert (error <= quantized.scale * 1.0001 + 1e-37).all()


def test_grid_points_are_kept_exactly() -> None:
    fmt = Integer(bits=3, group=8)
    w = (torch.arange(8.0) - 3).repeat(4, 1) * 0.25
    assert torch.equal(quantize(w, fmt).decode(), w)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 32])
def test_asymmetric_matches_a_plain_numpy_implementation(bits: int, group: int | None) -> None:
    w = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    expected = np.empty((7, 96), np.float32)
    levels = np.float32(2**bits - 1)
    for row in range(7):
        for start in range(0, 96, group or 96):
            part = w[row, start : start + (group or 96)].numpy()
            low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
            step = (high - low) / levels
            zero = np.clip(np.rint(-low / step), 0, levels)
            expected[row, start : start + len(part)] = (np.clip(np.rint(part / step) + zero, 0, levels) - zero) * step
    assert np.array_equal(quantize(w, Integer(bits=bits, group=group)).decode().numpy(), expected)


def test_dead_and_constant_rows_decode_to_themselves() -> None:
    w = torch.zeros(3, 16)
    w[1], w[2] = 0.75, -2.5
    assert torch.allclose(quantize(w, Integer(bits=2, group=8)).decode(), w, rtol=1e-6, atol=0)


def test_average_bits_count_scales_and_zero_points() -> None:
    assert Integer(bits=4, group=128).stored_bits(256, 512) / (256 * 512) == 4 + (16 + 4) / 128
    assert Integer(bits=4, group=128, symmetric=True).stored_bits(256, 512) / (256 * 512) == 4 + 16 / 128
    assert Integer(bits=3).stored_bits(256, 512) / (256 * 512) == 3 + (16 + 3) / 512


def test_clipped_weights_get_no_gradient_and_others_pass_straight_through() -> None:
    fmt = Integer(bits=2, group=4)
    w = torch.tensor([[-1.0, 0.1, 0.4, 3.0]], requires_grad=True)
    scale, zero = fmt.fit(torch.tensor([[[-1.0]]]), torch.tensor([[[2.0]]]))
    fmt.fake(w, scale, zero).sum().backward()
    assert torch.equal(w.grad, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))


def test_half_precision_scales_are_exact_in_half_precision() -> None:
    quantized = quantize(torch.randn(4, 32), Integer(bits=4, group=16, scale="float16"))
    assert torch.equal(quantized.scale.half().float(), quantized.scale)


@pytest.mark.parametrize("scale", ["float32", "float16"])
def test_a_range_beyond_float32_stays_finite(scale: str) -> None:
    w = torch.tensor([[2.5e38, -1.3e38]])
    quantized = quantize(w, Integer(bits=2, group=2, scale=scale))  # type: ignore[arg-type]
    assert quantized.scale.isfinite().all()
    assert quantized.decode().isfinite().all()


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        quantize(torch.tensor([[1.0, float("nan")]]), Integer(bits=4))
