"""Methods on grids whose steps differ from number to number: no method's code knows which grid it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.configuration import ROOT, compose_run
from helpers.learned import setting
from helpers.models import load_small
from torch import Tensor

from lsiq.calib.gram import output_error
from lsiq.errors import ConfigError
from lsiq.experiment.config import parse
from lsiq.formats.base import WeightFormat
from lsiq.formats.fp8 import FP8, FP8Activation
from lsiq.formats.integer import Integer
from lsiq.formats.mxfp import MXFP, MXFPActivation
from lsiq.formats.nvfp4 import NVFP4, NVFP4Activation, split_scale
from lsiq.formats.quant import QuantSettings
from lsiq.formats.tensor import QuantizedTensor, quantize
from lsiq.learning.encode import latents_of, merge
from lsiq.methods.gptq.columns import factorise, round_with_feedback
from lsiq.methods.lqer import LQER
from lsiq.parts.base import Draft

FORMATS: dict[str, WeightFormat] = {
    "mxfp4": MXFP(element="e2m1"),
    "mxfp6": MXFP(element="e3m2"),
    "nvfp4": NVFP4(),
    "fp8": FP8(),
    "fp8-tensor": FP8(per="tensor"),
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def layer() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(24, 96, generator=generator) * 0.1
    x = torch.randn(400, 96, generator=generator, dtype=torch.float64)
    x = x @ (torch.randn(96, 96, generator=generator, dtype=torch.float64) / 96**0.5 + torch.eye(96))
    x[:, ::17] *= 6
    return w, x.t() @ x / 400


def test_no_code_of_methods_parts_or_learning_names_a_format() -> None:
    kinds = r"integer|mxint|mxfp|nvfp4|fp8|activation|minifloat"
    named = rf"formats\.({kinds})\b|isinstance\([^)]*\b(Integer|MX\w*|FP8|NVFP4)\b"
    for package in ("methods", "parts", "learning", "calib"):
        for file in (ROOT / "lsiq" / package).rglob("*.py"):
            assert not re.search(named, file.read_text(encoding="utf-8")), file


@every_format
@pytest.mark.parametrize("static", [True, False], ids=["static", "late"])
def test_feedback_beats_rounding_to_nearest_and_stays_on_the_grid(fmt: WeightFormat, static: bool) -> None:
    w, gram = layer()
    curvature = factorise(gram, static, 0.01, "float64", "here")
    found = round_with_feedback(w, curvature, fmt, static, 32)
    nearest = quantize(w, fmt)
    ratio = output_error(w, found.decode(), gram) / output_error(w, nearest.decode(), gram)
    assert ratio < 0.8  # measured: 0.23 to 0.66
    assert torch.equal(fmt.encode(found.decode(), found.scale, found.zero), found.codes)
    if isinstance(fmt, NVFP4):
        block, shared = split_scale(found.scale)
        assert torch.equal(block / shared, found.scale)


@every_format
def test_latent_weights_round_to_their_codes_and_stand_where_they_stood(fmt: WeightFormat, checkpoint: Path) -> None:
    block, _ = setting(checkpoint)
    quant = QuantSettings(weight=fmt, activation=FP8Activation())
    draft = Draft(block.weights)
    result = merge(draft, block, quant)
    for name, latent in latents_of(draft, result, quant).items():
        stored = result.weights[name]
        assert latent.dtype == torch.float16
        assert latent.abs().max() <= 0.5
        again = fmt.placed(fmt.grouped(stored.codes), fmt.grouped(latent), stored.scale, stored.zero)
        again = again.reshape(stored.codes.shape)
        assert torch.equal(fmt.encode(again, stored.scale, stored.zero), stored.codes)
        # What saturates stands at the edge of the last cell; all else where it was, but for half precision.
        off = fmt.grouped(again - block.weights[name]).abs() / fmt.spacing(
            fmt.grouped(block.weights[name]), stored.scale
        )
        assert (off < 3e-3).float().mean() > 0.95  # measured: 0.97 (mxfp4) to 1


@every_format
def test_an_offset_of_half_a_step_chooses_between_the_neighbours(fmt: WeightFormat) -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    scale, zero = fmt.fit(*fmt.extremes(w))
    step = fmt.spacing(fmt.grouped(w), scale).expand_as(fmt.grouped(w)).reshape(w.shape)
    up, down = (fmt.fake(w + sign * 0.499 * step, scale, zero) for sign in (1, -1))
    middle = fmt.fake(w, scale, zero)
    assert ((down <= middle) & (middle <= up)).all()
    # Just above a power of two it reaches further, as the steps below are half as wide; measured: 0.90 to 0.99.
    assert ((up == middle) | (down == middle)).float().mean() > 0.85
    assert (up != down).float().mean() > 0.9  # measured: 0.96 (mxfp4, at the ends) to 1


@pytest.mark.parametrize(
    ("activation", "width"),
    [(MXFPActivation(element="e2m1"), "mxfp8"), (NVFP4Activation(), "fp8"), (FP8Activation(), "fp8")],
    ids=["mxfp4", "nvfp4", "fp8"],
)
def test_factors_are_stored_in_what_activations_are_multiplied_with(activation, width: str, checkpoint: Path) -> None:
    block, context = setting(checkpoint)
    quant = QuantSettings(weight=MXFP(element="e2m1"), activation=activation)
    for factors in ("auto", "float16"):
        method = LQER(scale="rms", rank=8, factors=factors)
        result = method.quantize_block(block, quant, context)
        assert result.metrics["error_left"] < 0.95  # measured: 0.77 to 0.8
        for branch in result.branches.values():
            assert isinstance(branch.up, QuantizedTensor) == (factors == "auto")
            if isinstance(branch.up, QuantizedTensor):
                assert branch.bits == 8
                assert branch.up.format.suffix.startswith(width)


def test_factors_that_there_are_none_of_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.factors=mxint4: no such format of factors; use auto, float16"):
        parse(compose_run("method=lqer", "method.factors=mxint4"))


@pytest.mark.parametrize(("quant", "trained"), [("nvfp4", False), ("mxfp4", False), ("fp8", True)])
def test_step_sizes_are_trained_where_they_are_numbers_of_their_own(quant: str, trained: bool) -> None:
    words = ("method=e2e", "method.run=some", "method.scales=1e-3", f"quant={quant}")
    if trained:
        parse(compose_run(*words))
    else:
        with pytest.raises(ConfigError, match=f"step sizes of quant={quant} are stored in a few bits"):
            parse(compose_run(*words))


def test_mean_steps_are_the_step_itself_where_all_are_alike(checkpoint: Path) -> None:
    block = load_small(checkpoint).block(0, {})
    w = block.weights[block.linears[0]]
    fmt = Integer(bits=3, group=32)
    assert torch.equal(fmt.mean_steps(w), fmt.fit(*fmt.extremes(w))[0])
    assert torch.equal(NVFP4().mean_steps(2 * w), 2 * NVFP4().mean_steps(w))
    assert MXFP(element="e2m3").mean_steps(w).mean() < 0.5 * MXFP(element="e2m1").mean_steps(w).mean()  # measured: 0.25
