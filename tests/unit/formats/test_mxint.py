"""Blocks with a shared exponent: fake, encode and decode agree bit for bit, and the formula is the published one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.configuration import compose_run
from helpers.grids import weights_and_blocks
from hypothesis import given, settings

from lsiq.errors import NumericalError
from lsiq.experiment.config import parse
from lsiq.formats.mxint import MXActivation, MXInt, power_of_two_step
from lsiq.formats.tensor import quantize


@given(weights_and_blocks())
@settings(max_examples=200, deadline=None)
def test_rounding_costs_half_a_step_and_saturation_at_most_one(case: tuple[torch.Tensor, MXInt]) -> None:
    w, fmt = case
    fmt = MXInt(bits=fmt.bits, block=fmt.block, exponent=8)  # with 4 bits values beyond 2^8 saturate by more
    quantized = quantize(w, fmt)
    groups, step = fmt.grouped(w), quantized.scale
    error = (fmt.grouped(quantized.decode()) - groups).abs()
    inside = groups.abs() <= (2 ** (fmt.bits - 1) - 0.5) * step
    assert (error[inside] <= (step / 2).expand_as(error)[inside]).all()
    assert (error <= step).all()


@given(weights_and_blocks())
@settings(max_examples=100, deadline=None)
def test_steps_are_powers_of_two_just_large_enough(case: tuple[torch.Tensor, MXInt]) -> None:
    w, fmt = case
    reach = fmt.grouped(w).abs().amax(-1)
    step = power_of_two_step(reach, fmt.bits, 8)
    for largest, found in zip(reach.flatten().tolist(), step.flatten().tolist(), strict=True):
        if largest > 1e-35:
            assert found == 2.0 ** (math.ceil(math.log2(largest)) - fmt.bits + 1)


def test_a_hand_computed_block() -> None:
    # The largest weight, 0.9, lies below 2^0: with 4 bits the step is 1/8 and codes reach from -7 to 7.
    w = torch.tensor([[0.9, -0.9, 0.06, 0.07, 0.0, 0.5, -0.19, 1.0]])
    expected = torch.tensor([[0.875, -0.875, 0.0, 0.125, 0.0, 0.5, -0.25, 0.875]])
    assert torch.equal(quantize(w, MXInt(bits=4, block=8)).decode(), expected)


def test_zeros_stay_zeros() -> None:
    assert torch.equal(quantize(torch.zeros(3, 32), MXInt(bits=2)).decode(), torch.zeros(3, 32))
    assert torch.equal(MXActivation(bits=6).fake(torch.zeros(3, 32)), torch.zeros(3, 32))


def test_a_narrow_exponent_saturates_large_blocks_and_coarsens_small_ones() -> None:
    fmt = MXInt(bits=8, exponent=4)
    assert quantize(torch.full((1, 16), 1e4), fmt).decode().max() == (1 - 2**-7) * 2**8
    assert quantize(torch.full((1, 16), 1e-5), fmt).decode().max() == 0


def test_average_bits_count_the_shared_exponents() -> None:
    assert MXInt(bits=4).stored_bits(256, 512) / (256 * 512) == 4.5
    assert MXInt(bits=4, exponent=4).stored_bits(256, 512) / (256 * 512) == 4.25
    assert MXInt(bits=2, block=32).stored_bits(256, 512) / (256 * 512) == 2.25


def test_clipping_moves_the_step_and_gets_a_gradient() -> None:
    fmt = MXInt(bits=3, block=4)
    hi = torch.tensor([[[1.01]]], requires_grad=True)
    scale, _ = fmt.fit(torch.tensor([[[-0.5]]]), hi)
    assert scale.item() == 0.5
    scale.sum().backward()
    assert hi.grad.item() == pytest.approx(0.5 / 1.01)
    assert fmt.fit(torch.tensor([[[-0.5]]]), torch.tensor([[[0.99]]]))[0].item() == 0.25


@pytest.mark.parametrize("channels", [16, 40, 7])
def test_activations_are_rounded_block_by_block_and_the_last_may_be_short(channels: int) -> None:
    x = torch.randn(2, 5, channels, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 3, channels)
    rounded = MXActivation(bits=8).fake(x)
    for start in range(0, channels, 16):
        block = x[..., start : start + 16].reshape(-1, len(range(start, min(start + 16, channels))))
        expected = quantize(block, MXInt(bits=8, block=block.shape[1])).decode()
        assert torch.equal(rounded[..., start : start + 16].reshape(block.shape), expected)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["quant=w4a8-mxint"], "w4a8-mxint"),
        (["quant=w2a8-mxint", "quant.weight.block=32", "quant.weight.exponent=4"], "w2a8-mxint32e4-amxint"),
        (["quant=w4a6-mxint", "quant.weight.exponent=4", "quant.activation.exponent=4"], "w4a6-mxinte4"),
    ],
)
def test_the_name_of_a_setting_says_its_formats(overrides: list[str], name: str) -> None:
    assert parse(compose_run(*overrides)).quant.name == name


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        quantize(torch.full((1, 16), float("inf")), MXInt(bits=4))
