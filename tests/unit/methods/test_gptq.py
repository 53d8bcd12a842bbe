"""GPTQ computes what its paper says, on the grid it was given, and never does worse than rounding to nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import load_small
from torch import Tensor

from lsiq.calib.gram import input_grams, output_error
from lsiq.errors import ConfigError, NumericalError
from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.formats.quant import QuantSettings
from lsiq.formats.tensor import quantize
from lsiq.methods.gptq import GPTQ
from lsiq.methods.gptq.columns import factorise, round_with_feedback
from lsiq.models.block import Block
from lsiq.models.context import Context
from lsiq.models.result import BlockResult
from lsiq.settings import fill


def make_layer(out: int = 24, width: int = 96, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Weights `(out, in)` and the Gram matrix of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(out, width, generator=generator) * 0.1
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(width))
    x[:, ::17] *= 6
    return w, x.t() @ x / tokens


def plain_gptq(
    w: Tensor, gram: Tensor, bits: int, group: int | None, act_order: bool, static: bool, damping: float
) -> Tensor:
    """The paper's update without its speed: the inverse Hessian is inverted, then shrunk after every column.

    Equations 2 and 3 of arXiv 2210.17323 in float64: quantise one column, spread its error over all that remain,
    remove its row and column from the inverse by one step of Gaussian elimination.
    """
    out, width = w.shape
    group, levels = group or width, 2**bits - 1
    hessian = 2 * gram.double()
    hessian = hessian + torch.eye(width, dtype=torch.float64) * damping * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian)
    remaining = w.double().clone()
    codes = torch.zeros(out, width, dtype=torch.uint8)
    order = sorted(range(width), key=lambda c: -gram[c, c].item()) if act_order else list(range(width))
    grids: dict[int, tuple[Tensor, Tensor]] = {}
    for column in order:
        index = column // group
        if index not in grids:
            source = w if static else remaining.float()
            part = source[:, index * group : (index + 1) * group]
            lo, hi = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=0)
            step = (hi - lo) / levels
            grids[index] = step, (-lo / step).round()
        step, zero = grids[index]
        code = ((remaining[:, column] / step).round() + zero).clamp(0, levels)
        codes[:, column] = code.byte()
        error = (remaining[:, column] - (code - zero) * step.double()) / inverse[column, column]
        remaining -= error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[None, column] / inverse[column, column]
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16, 24, 96])
@pytest.mark.parametrize(("act_order", "static"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("block_size", [20, 128])
def test_codes_equal_the_plain_column_by_column_reference(
    bits: int, group: int | None, act_order: bool, static: bool, block_size: int
) -> None:
    w, gram = make_layer()
    curvature = factorise(gram, act_order, 0.01, "float64", "layer")
    found = round_with_feedback(w, curvature, Integer(bits=bits, group=group), static, block_size)
    assert torch.equal(found.codes, plain_gptq(w, gram, bits, group, act_order, static, 0.01))


def test_float32_differs_from_float64_in_few_codes() -> None:
    w, gram = make_layer(out=200)
    found = {
        precision: round_with_feedback(w, factorise(gram, True, 0.01, precision, ""), Integer(bits=4), True, 128)
        for precision in ("float32", "float64")
    }
    share = (found["float32"].codes != found["float64"].codes).float().mean()
    assert share < 1e-3  # measured: 0.0


def test_precision_is_chosen_by_need() -> None:
    _, gram = make_layer()
    assert factorise(gram, True, 0.01, "auto", "").factor.dtype == torch.float32
    gram[0, 0] *= 1e6
    assert factorise(gram, True, 1e-6, "auto", "").factor.dtype == torch.float64


def small_block(checkpoint: Path) -> tuple[Block, Tensor]:
    model = load_small(checkpoint)
    tokens = torch.randint(0, 4096, (8, 64), generator=torch.Generator().manual_seed(2))
    hidden, kwargs = model.embed(tokens, batch=4)
    return model.block(1, kwargs), hidden


def run(method: GPTQ, block: Block, hidden: Tensor, quant: QuantSettings, batch: int = 4) -> BlockResult:
    context = Context(hidden, None, torch.Generator().manual_seed(0), batch, lambda values: None)
    return method.quantize_block(block, quant, context)


def formats(bits: int, group: int | None = 32, activation: int = 16) -> QuantSettings:
    return QuantSettings(weight=Integer(bits=bits, group=group), activation=Activation(bits=activation))


@pytest.mark.parametrize("method", [GPTQ(), GPTQ(act_order=False), GPTQ(act_order=False, static_groups=False)])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 32])
def test_output_error_is_below_that_of_rounding_to_nearest(
    checkpoint: Path, method: GPTQ, bits: int, group: int | None
) -> None:
    block, hidden = small_block(checkpoint)
    quant = formats(bits, group)
    result = run(method, block, hidden, quant)
    done: dict[str, Tensor] = {}
    for stage in block.spec.stages:  # each stage on the inputs it was rounded for
        gram = input_grams(block, done, hidden, 4, [stage[0]], quant.activation)[stage[0]]
        for name in (f"{linear}.weight" for linear in stage):
            w = block.weights[name]
            nearest = output_error(w, quantize(w, quant.weight).decode(), gram)
            assert output_error(w, result.weights[name].decode(), gram) < nearest, name  # measured: 0.11 to 0.91 of it
            done[name] = result.weights[name].decode()


def test_codes_do_not_depend_on_how_the_stream_is_batched(checkpoint: Path) -> None:
    block, hidden = small_block(checkpoint)
    one, all_at_once = (run(GPTQ(precision="float64"), block, hidden, formats(3), batch) for batch in (1, 8))
    for name in block.linears:
        share = (one.weights[name].codes != all_at_once.weights[name].codes).float().mean()
        assert share < 1e-3, name  # the block itself runs in float32; measured: 0.0


def test_true_sequential_shows_later_stages_the_rounded_earlier_ones(checkpoint: Path) -> None:
    block, hidden = small_block(checkpoint)
    sequential, at_once = (
        run(GPTQ(true_sequential=choice), block, hidden, formats(2)).weights for choice in (True, False)
    )
    first, last = block.linears[0], block.linears[-1]
    assert torch.equal(sequential[first].codes, at_once[first].codes)
    assert not torch.equal(sequential[last].codes, at_once[last].codes)


def test_the_result_says_what_rounded_the_columns(checkpoint: Path) -> None:
    block, hidden = small_block(checkpoint)
    assert run(GPTQ(), block, hidden[:2], formats(4)).kernels == "plain"  # it lies on a CPU


def test_inputs_are_those_after_activation_rounding(checkpoint: Path) -> None:
    block, hidden = small_block(checkpoint)
    fmt, first = Activation(bits=4), block.spec.stages[0][0]
    shown: list[Tensor] = []
    handle = block.module.get_submodule(first).register_forward_hook(lambda module, args, out: shown.append(args[0]))
    block.with_weights({}, fmt)(hidden)
    handle.remove()
    x = shown[0].flatten(0, 1).double()
    found = input_grams(block, {}, hidden, 8, [first], fmt, torch.float64)[first]
    assert torch.allclose(found, x.t() @ x / len(x), rtol=1e-12, atol=1e-14)  # measured: 0.0


def test_dead_channels_are_rounded_to_nearest() -> None:
    w, gram = make_layer()
    dead = torch.zeros(96, dtype=torch.bool)
    dead[[3, 40, 95]] = True
    gram[dead] = 0
    gram[:, dead] = 0
    fmt = Integer(bits=3, group=32)
    for act_order in (True, False):
        found = round_with_feedback(w, factorise(gram, act_order, 0.01, "auto", ""), fmt, True, 128)
        assert torch.equal(found.codes[:, dead], quantize(w, fmt).codes[:, dead])
    everywhere = round_with_feedback(w, factorise(gram * 0, True, 0.01, "auto", ""), fmt, True, 128)
    assert torch.equal(everywhere.codes, quantize(w, fmt).codes)


def test_a_singular_hessian_is_refused_with_the_damping_to_try(checkpoint: Path) -> None:
    block, hidden = small_block(checkpoint)
    with pytest.raises(NumericalError, match=r"block 1, .*q_proj.*damping=0; try damping=0\.01"):
        run(GPTQ(damping=0), block, hidden[:1], formats(3))  # 64 tokens in 96 channels


def test_inputs_that_are_not_finite_are_refused(checkpoint: Path) -> None:
    block, hidden = small_block(checkpoint)
    hidden[0, 0, 0] = torch.inf
    with pytest.raises(NumericalError, match=r"block 1, self_attn\.q_proj: its inputs are not finite"):
        run(GPTQ(), block, hidden, formats(3))


def test_act_order_without_static_groups_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"method\.static_groups=false.*set static_groups=true or act_order=false"):
        fill(GPTQ, {"static_groups": False}, "method")
