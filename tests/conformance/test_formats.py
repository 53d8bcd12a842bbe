"""What every number format must keep; a new file under conf/quant/ is tested here for free."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.configuration import CONF
from helpers.grids import weights_and_blocks, weights_and_floats, weights_and_integers
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from lsiq.errors import ConfigError
from lsiq.formats.activation import Activation
from lsiq.formats.base import ActivationFormat, WeightFormat
from lsiq.formats.fit import check_format
from lsiq.formats.integer import Integer
from lsiq.formats.minifloat import ELEMENTS
from lsiq.formats.mxfp import MXFP, MXFPActivation
from lsiq.formats.mxint import MXActivation, MXInt
from lsiq.formats.names import named_format, short_name
from lsiq.formats.nvfp4 import NVFP4, NVFP4Activation
from lsiq.formats.quant import QuantSettings
from lsiq.settings import build, describe_settings, fill

WIDTH = 256  # what the groups of every file divide


def quant_of(name: str) -> QuantSettings:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / "quant" / f"{name}.yaml"))
    return fill(QuantSettings, build(node))


QUANTS = {file.stem: quant_of(file.stem) for file in sorted((CONF / "quant").glob("*.yaml"))}
WEIGHTS: dict[str, WeightFormat] = {name: quant.weight for name, quant in QUANTS.items() if quant.weight.bits < 16} | {
    "symmetric": Integer(bits=4, group=32, symmetric=True),
    "half-scales": Integer(bits=3, group=64, scale="float16"),
    "symmetric-half": Integer(bits=8, symmetric=True, scale="float16"),
    "narrow-exponent": MXInt(bits=4, exponent=4),
    "wide-blocks": MXInt(bits=8, block=64),
    "mxfp4-floor": MXFP(element="e2m1", rule="floor"),
    "mxfp6-e3m2": MXFP(element="e3m2", rule="ceil"),
    "mxfp8-e5m2": MXFP(element="e5m2", block=64),
    "nvfp4-wide": NVFP4(block=32),
}
ACTIVATIONS: dict[str, ActivationFormat] = {
    name: quant.activation for name, quant in QUANTS.items() if quant.activation.active
} | {
    "symmetric": Activation(bits=4, symmetric=True),
    "tensor": Activation(bits=8, per="tensor"),
    "symmetric-tensor": Activation(bits=6, per="tensor", symmetric=True),
    "narrow-exponent": MXActivation(bits=4, exponent=4),
    "wide-blocks": MXActivation(bits=8, block=64),
    "mxfp4-floor": MXFPActivation(element="e2m1", rule="floor"),
    "mxfp6-e3m2": MXFPActivation(element="e3m2", rule="ceil"),
    "mxfp8-e5m2": MXFPActivation(element="e5m2", block=64),
    "nvfp4-tensor": NVFP4Activation(above="tensor"),
    "nvfp4-fixed": NVFP4Activation(above=64.0),
}
every_weight_format = pytest.mark.parametrize("fmt", WEIGHTS.values(), ids=WEIGHTS)
every_activation_format = pytest.mark.parametrize("fmt", ACTIVATIONS.values(), ids=ACTIVATIONS)


def precision(fmt: ActivationFormat) -> int:
    """The width of integers that are as fine: of floating-point numbers, what the mantissa leaves of theirs."""
    element = getattr(fmt, "element", "e2m1") if fmt.family else None
    return fmt.bits if element is None else ELEMENTS[element].mantissa + 3


def some_weights(rows: int = 16) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, rows)[:, None]


def assert_one_function(w: Tensor, fmt: WeightFormat) -> None:
    """What is trained (`fake`), stored (`encode`) and read (`decode`) is the same, bit for bit."""
    scale, zero = fmt.fit(*fmt.extremes(w))
    fake, codes = fmt.fake(w, scale, zero), fmt.encode(w, scale, zero)
    assert (codes.dtype, codes.shape) == (torch.uint8, w.shape)
    assert fmt.lowest <= int(codes.min()) <= int(codes.max()) <= fmt.levels
    assert fake.isfinite().all()
    assert torch.equal(fmt.decode(codes, scale, zero), fake)
    assert torch.equal(fmt.encode(fake, scale, zero), codes), "what is on the grid stays where it is"
    trained = w.clone().requires_grad_()  # rounding that lets gradients through
    assert torch.equal(fmt.fake(trained, scale, zero).detach(), fake)
    assert torch.equal(fmt.fake(trained, *fmt.fit(*fmt.extremes(trained))).detach(), fake)


@given(weights_and_integers())
@settings(max_examples=400, deadline=None)
def test_integers_fake_encode_and_decode_agree_bit_for_bit(case: tuple[Tensor, Integer]) -> None:
    assert_one_function(*case)


@given(weights_and_blocks())
@settings(max_examples=300, deadline=None)
def test_blocks_fake_encode_and_decode_agree_bit_for_bit(case: tuple[Tensor, MXInt]) -> None:
    assert_one_function(*case)


@given(weights_and_floats())
@settings(max_examples=300, deadline=None)
def test_floats_fake_encode_and_decode_agree_bit_for_bit(case: tuple[Tensor, WeightFormat]) -> None:
    assert_one_function(*case)


@every_weight_format
def test_fake_encode_and_decode_agree_bit_for_bit(fmt: WeightFormat) -> None:
    assert_one_function(some_weights(), fmt)


@every_weight_format
def test_a_grid_spans_its_weights(fmt: WeightFormat) -> None:
    w = some_weights()
    scale, zero = fmt.fit(*fmt.extremes(w))
    assert scale.shape == zero.shape == (len(w), WIDTH // (fmt.width or WIDTH), 1)
    assert torch.equal(zero, zero.round())
    assert torch.equal(fmt.storable(scale), scale)
    # Half a step, another half where a zero point is rounded or a block saturates, and what 16 bits do to a scale.
    error = (fmt.grouped(fmt.fake(w, scale, zero)) - fmt.grouped(w)).abs()
    assert (error <= fmt.spacing(fmt.grouped(w), scale) * (1 + 2.0**-11 * fmt.levels)).all()


@given(
    st.one_of(weights_and_integers(), weights_and_blocks(), weights_and_floats()),
    st.floats(0.05, 1.0),
    st.floats(0.05, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_limits_are_ends_whose_grid_is_the_one_that_was_fitted(
    case: tuple[Tensor, WeightFormat], low: float, high: float
) -> None:
    w, fmt = case
    lo, hi = fmt.extremes(w)
    ends = low * lo, high * hi
    for mine, fitted in zip(fmt.fit(*fmt.limits(*ends)), fmt.fit(*ends), strict=True):
        assert torch.equal(mine, fitted)


@every_weight_format
def test_gradients_reach_the_weights_inside_the_range_and_both_ends(fmt: WeightFormat) -> None:
    w = some_weights().requires_grad_()
    lo, hi = (end.detach().requires_grad_() for end in fmt.extremes(w))
    rounded = fmt.fake(w, *fmt.fit(lo, hi))
    (rounded * some_weights()).sum().backward()
    for tensor in (w, lo, hi):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert w.grad is not None
    assert w.grad.any()
    one_for_all = getattr(fmt, "per", "") == "tensor"  # then only the very largest weight stands for the scale
    assert (any if one_for_all else all)(end.grad.any() for end in (lo, hi))  # type: ignore[union-attr]
    assert (torch.isclose(w.grad, some_weights(), rtol=1e-5) | (w.grad == 0)).all()  # straight through, or clipped
    assert (w.grad != 0).float().mean() > 0.9  # measured: 0.96 (w2a8-mxint) to 1


@every_weight_format
def test_stored_bits_grow_with_the_rows_and_hold_more_than_the_codes(fmt: WeightFormat) -> None:
    one, ten = fmt.stored_bits(1, WIDTH), fmt.stored_bits(10, WIDTH)
    assert 10 * one - ten in (0, 9 * 32)  # a scale that a whole matrix shares
    assert fmt.bits * WIDTH < one < 16 * WIDTH


@every_weight_format
def test_a_width_that_the_groups_do_not_divide_is_refused_with_the_format_that_fits(fmt: WeightFormat) -> None:
    check_format(fmt, {"in_features=256 of q_proj": WIDTH})
    if fmt.width is None:
        check_format(fmt, {"in_features=257 of q_proj": WIDTH + 1})
        return
    places = {"in_features of q_proj": fmt.width * 2, "in_features of down_proj": fmt.width * 3 // 2}
    words = rf"the {fmt.width_key} of {short_name(fmt)} does not divide in_features of down_proj; use ([^,]+), "
    with pytest.raises(ConfigError, match=words) as why:
        check_format(fmt, places)
    assert "\n" not in str(why.value)
    named = re.search(words, str(why.value))
    assert named is not None
    narrower = replace(fmt, **{fmt.width_key: fmt.width // 2})  # type: ignore[type-var]
    if named[1] != f"a format with {fmt.width_key}={fmt.width // 2}":  # which has no name
        assert named_format(named[1]).width == fmt.width // 2
    check_format(narrower, places)


@pytest.mark.parametrize("fmt", [*WEIGHTS.values(), *ACTIVATIONS.values()], ids=[*WEIGHTS, *ACTIVATIONS])
def test_a_format_says_what_it_is_and_is_made_again_from_its_settings(fmt: WeightFormat | ActivationFormat) -> None:
    assert str(fmt.bits) in fmt.words
    assert "\n" not in fmt.words
    assert build(describe_settings(fmt)) == fmt


def test_every_quant_file_has_the_name_of_its_formats() -> None:
    assert {name: quant.name for name, quant in QUANTS.items()} == {name: name for name in QUANTS}


def some_inputs() -> Tensor:
    """Tokens of several sizes whose ranges stay what they are when they are rounded.

    A block whose largest value rounds down to a power of two gets a finer grid the second time, and a range whose ends
    both round inwards, as -0.9 … 0.9 does, a narrower one.
    """
    x = (0.4 * torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(0))).clamp(-0.8, 0.8)
    x[..., ::16] = 0.9
    return x * torch.tensor([1.0, 4.0, 16.0, 0.25])[:, None]


@every_activation_format
def test_rounding_activations_again_changes_nothing(fmt: ActivationFormat) -> None:
    x = some_inputs()
    rounded = fmt.fake(x)
    assert not torch.equal(rounded, x)
    assert torch.equal(x, some_inputs())
    assert torch.allclose(fmt.fake(rounded), rounded, rtol=1e-5, atol=1e-5)  # measured: 0.0
    assert (rounded - x).norm() / x.norm() < 2.0 ** (2 - precision(fmt))  # measured: at most 2.4 · 2^-precision


@every_activation_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_keep_shape_and_dtype(fmt: ActivationFormat, dtype: torch.dtype) -> None:
    x = some_inputs().to(dtype)
    rounded = fmt.fake(x)
    assert (rounded.dtype, rounded.shape) == (x.dtype, x.shape)
    assert rounded.isfinite().all()
    assert torch.equal(fmt.fake(torch.zeros_like(x)), torch.zeros_like(x))


@every_activation_format
def test_gradients_pass_through_the_rounding_of_activations(fmt: ActivationFormat) -> None:
    x, direction = some_inputs().requires_grad_(), torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(1))
    (fmt.fake(x) * direction).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    # Every 16th value is 1.8 of a power of two: more than the largest number under `floor`, and of e3m2 (1.75) under
    # `even` too, which turns to the next scale at 1.875. Measured: 0.93.
    saturating = getattr(fmt, "rule", "") == "floor" or fmt.suffix == "mxfp6e3m2"
    least = 0.9 if saturating else 0.99  # measured: 0.9998 to 1
    assert torch.cosine_similarity(x.grad.flatten(), direction.flatten(), 0) > least


@every_activation_format
def test_attention_weights_stay_shares(fmt: ActivationFormat) -> None:
    shares = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    rounded = fmt.fake_softmax(shares)
    assert (rounded.dtype, rounded.shape) == (shares.dtype, shares.shape)
    assert rounded.min() >= 0
    assert rounded.max() <= 1
    assert (rounded - shares).abs().max() < 2.0 ** -precision(fmt)  # measured: at most 0.54 · 2^-precision


@pytest.mark.parametrize("fmt", [quant.activation for quant in QUANTS.values() if not quant.activation.active][:1])
def test_float_activations_are_left_alone(fmt: ActivationFormat) -> None:
    x = some_inputs()
    assert fmt.fake(x) is x
