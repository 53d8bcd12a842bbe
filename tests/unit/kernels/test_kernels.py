"""The Triton kernels equal the plain path in results and gradients, whatever they are run by; on a CPU, interpreted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.configuration import compose_run
from helpers.learned import W2, fresh, schedule_of, setting
from helpers.marks import product, slow_but
from helpers.models import SHAPES, load_small, save_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lsiq.errors import ConfigError
from lsiq.experiment.config import parse
from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.formats.mxint import MXInt
from lsiq.formats.quant import QuantSettings
from lsiq.kernels.compiled import COMPILED
from lsiq.learning.learner import learn
from lsiq.learning.trained import compiled_weights, plain_weights, start_parts
from lsiq.learning.weight_path import choose
from lsiq.models.block import Block
from lsiq.parts.base import Part, PartState
from lsiq.parts.clip import Clip
from lsiq.parts.dense import Dense
from lsiq.parts.equivalent import Equivalent
from lsiq.parts.expansion import Expansion
from lsiq.parts.rounding import Rounding
from lsiq.parts.singular import Singular

pytest.importorskip("triton", reason="Triton is not installed")

from lsiq.kernels import band, fakequant
from lsiq.kernels.activation import FusedActivation
from lsiq.learning.fused_weights import FusedWeights, Scaled, uncovered

A16 = Activation()
ALL: tuple[Part, ...] = (Singular(corner=8, lr=1e-3), Equivalent(weight_only_families=None), Clip(lr=1e-2))
CASES: dict[str, tuple[tuple[Part, ...], Integer]] = {
    "2 bits": (ALL, Integer(bits=2, group=32)),
    "3 bits, symmetric": (ALL, Integer(bits=3, group=32, symmetric=True)),
    "4 bits, by channel": (ALL, Integer(bits=4, group=None)),
    "8 bits, scales in half precision": ((Clip(lr=1e-2),), Integer(bits=8, group=16, scale="float16")),
    "corner given as a share": ((Singular(lr=1e-3, corner=0.5), Clip(lr=1e-2)), Integer(bits=4, group=32)),
    "symmetric by channel, full range": ((Singular(lr=1e-3, corner=0),), Integer(bits=4, group=None, symmetric=True)),
    "linear clipping alone": ((Clip(form="linear", lr=1e-2),), Integer(bits=3, group=32)),
    "scales alone": ((Equivalent(weight_only_families=None),), Integer(bits=4, group=32)),
    "band": ((Expansion(width=3, corner=8, lr=1e-3), Clip(lr=1e-2)), Integer(bits=3, group=32)),
    "upper band, few directions, larger corner": (
        (Expansion(width=2, sides="upper", top=20, corner=30, lr=1e-3), Clip(lr=1e-2)),
        Integer(bits=2, group=32),
    ),
    "offsets, ranges": (
        (Rounding(), Clip(form="linear", start_logit=None, lr=None)),
        Integer(bits=3, group=32),
    ),
    "diagonal and offsets": (
        (Singular(corner=0, lr=1e-3), Equivalent(weight_only_families=None), Clip(lr=1e-2), Rounding()),
        Integer(bits=2, group=32),
    ),
    "offsets alone, symmetric by channel": ((Rounding(),), Integer(bits=4, group=None, symmetric=True)),
    "every weight, in steps": ((Dense(lr=1e-3, unit="step"), Clip(lr=1e-2)), Integer(bits=2, group=32)),
    "every weight, scales, offsets": (
        (Dense(lr=1e-3), Equivalent(weight_only_families=None), Clip(lr=1e-2), Rounding()),
        Integer(bits=4, group=None),
    ),
    "one linear": (
        (Singular(linears=["self_attn.q_proj"], lr=1e-3, corner=0), Clip(lr=1e-2)),
        Integer(bits=4, group=32),
    ),
}
# These have all parts, both ways to clip, a band with a corner, and scales in half precision.
QUICK = (
    "3 bits, symmetric",
    "8 bits, scales in half precision",
    "linear clipping alone",
    "upper band, few directions, larger corner",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of two or three groups a row: an interpreter takes its time for each."""
    narrow = {"hidden_size": 64, "intermediate_size": 96, "ffn_dim": 96, "num_attention_heads": 4}
    root = tmp_path_factory.mktemp("small")
    return {
        family: save_model({**shape, **{k: v for k, v in narrow.items() if k in shape}} | wide, root / family)
        for family, shape in SHAPES.items()
        for wide in [{"word_embed_proj_dim": 64} if family == "opt" else {}]
    }


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter takes as long for a small tile as for a large one."""
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(fakequant, "TILE", 1 << 16)
    monkeypatch.setattr(fakequant, "ROWS_PER_SUM", 128)
    monkeypatch.setattr(band, "DIAGONAL_TILE", 64)
    monkeypatch.setattr(band, "DIAGONAL_COLUMNS", 256)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(block: Block, dtype: torch.dtype) -> Block:
    weights = {name: w.to(device(), dtype) for name, w in block.weights.items()}
    return replace(block, weights=weights, dtype=dtype)


def shaken(
    parts: Sequence[Part], checkpoint: Path, quant: QuantSettings, dtype: torch.dtype
) -> tuple[Block, list[PartState]]:
    """A block and its parts away from their start."""
    block, context = setting(checkpoint)
    generator = torch.Generator().manual_seed(5)

    def moved(p: Tensor) -> Tensor:
        return (p + 0.02 * torch.randn(p.shape, generator=generator)).clamp(max=4.02).to(device(), dtype)

    states = [
        PartState(
            {name: moved(p).requires_grad_() for name, p in state.parameters.items()},
            {name: c.to(device(), dtype) for name, c in state.constants.items()},
        )
        for state in start_parts(parts, block, quant, context)
    ]
    return on_device(block, dtype), states


def gradients(made: dict[str, Tensor], states: Sequence[PartState]) -> dict[str, Tensor]:
    """What random gradients of the weights are, of the parameters."""
    generator = torch.Generator().manual_seed(1)
    names = [name for name in sorted(made) if made[name].requires_grad]
    upstream = [torch.randn(made[n].shape, generator=generator, dtype=torch.float64).to(made[n]) for n in names]
    torch.autograd.backward([made[name] for name in names], upstream)
    found = {f"{i}:{name}": p.grad for i, s in enumerate(states) for name, p in s.parameters.items()}
    for state in states:
        for parameter in state.parameters.values():
            parameter.grad = None
    return found  # type: ignore[return-value]


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_weights_and_gradients_equal_the_plain_path_in_float64(small: dict[str, Path], case: str) -> None:
    parts, fmt = CASES[case]
    quant = QuantSettings(weight=fmt, activation=A16)
    block, states = shaken(parts, small["llama"], quant, torch.float64)
    assert uncovered(parts, states, block, quant) is None
    plain, fused = plain_weights(parts, states, block, quant), FusedWeights(parts, states, block, quant).weights()
    assert max(distance(fused[name], plain[name]) for name in plain) < 1e-13  # measured: 2e-16
    expected, found = gradients(plain, states), gradients(fused, states)
    assert max(distance(found[name], expected[name]) for name in expected) < 1e-12  # measured: 3e-15


SHIFTS = Equivalent(shift="always", weight_only_families=None)
SHIFTED: dict[str, tuple[Part, ...]] = {
    "alone": (SHIFTS,),
    "every weight, clip first": (Dense(lr=1e-3, unit="step"), Clip(lr=1e-2), SHIFTS),
    "diagonal and offsets": (Singular(corner=0, lr=1e-3), SHIFTS, Clip(lr=1e-2), Rounding()),
    "corner": (Singular(corner=8, lr=1e-3), SHIFTS, Clip(lr=1e-2)),
    "band with a corner": (Expansion(width=3, corner=8, lr=1e-3), SHIFTS, Clip(lr=1e-2)),
    "upper band, few directions, larger corner": (
        Expansion(width=2, sides="upper", top=20, corner=30, lr=1e-3),
        SHIFTS,
        Clip(lr=1e-2),
    ),
}


@pytest.mark.parametrize("case", slow_but(("every weight, clip first", "band with a corner"), SHIFTED))
def test_folded_shifts_and_their_gradients_equal_the_plain_path(small: dict[str, Path], case: str) -> None:
    quant = QuantSettings(weight=Integer(bits=3, group=32), activation=Activation(bits=4))
    block, states = shaken(SHIFTED[case], small["opt"], quant, torch.float64)
    assert any(name.endswith(":shift") for state in states for name in state.parameters)
    assert uncovered(SHIFTED[case], states, block, quant) is None
    plain = plain_weights(SHIFTED[case], states, block, quant)
    fused = FusedWeights(SHIFTED[case], states, block, quant).weights()
    assert max(distance(fused[name], plain[name]) for name in plain) < 1e-13
    expected, found = gradients(plain, states), gradients(fused, states)
    assert max(distance(found[name], expected[name]) for name in expected) < 1e-12


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_weights_and_gradients_equal_the_plain_path_in_float32(small: dict[str, Path], family: str) -> None:
    block, states = shaken(ALL, small[family], W2, torch.float32)
    plain, fused = plain_weights(ALL, states, block, W2), FusedWeights(ALL, states, block, W2).weights()
    assert max(distance(fused[name], plain[name]) for name in plain) < 1e-4  # measured: 6e-8; more where one flips
    expected, found = gradients(plain, states), gradients(fused, states)
    assert max(distance(found[name], expected[name]) for name in expected) < 1e-3  # measured: 1e-6


@pytest.mark.product
def test_weights_are_compiled_though_nothing_was_rounded_before(
    small: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (Equivalent(lr=1e-3, weight_only_families=None), Clip(lr=1e-2))
    block, states = shaken(parts, small["opt"], W2, torch.float32)
    monkeypatch.delitem(sys.modules, "lsiq.formats.rounding", raising=False)
    fast = compiled_weights(parts, states, block, W2)
    plain = plain_weights(parts, states, block, W2)
    assert max(distance(fast[name], plain[name]) for name in plain) < 1e-4


def test_half_precision_products_lie_within_their_rounding(small: dict[str, Path]) -> None:
    parts = (Expansion(width=2, product="float16", lr=1e-3, corner=0), Clip(lr=1e-2))
    quant = QuantSettings(weight=Integer(bits=4, group=32), activation=A16)
    block, states = shaken(parts, small["llama"], quant, torch.float32)
    half = replace(block, dtype=torch.float16)
    plain, fused = plain_weights(parts, states, block, quant), FusedWeights(parts, states, half, quant).weights()
    assert fused[block.linears[0]].dtype == torch.float16
    assert max(distance(fused[n].float(), plain[n]) for n in block.linears) < 5e-3  # measured: 4e-4
    expected, found = gradients(plain, states), gradients(fused, states)
    worst = max(distance(found[name], expected[name]) for name in expected)
    assert worst < 2e-2  # measured: 3e-3, from weights that fall the other way


def test_the_fused_product_keeps_tiny_increments(small: dict[str, Path]) -> None:
    parts = (Singular(product="float16", lr=1e-3, corner=0),)
    block, states = shaken(parts, small["llama"], W2, torch.float32)
    states = [replace(states[0], parameters={k: torch.full_like(p, 1e-6) for k, p in states[0].parameters.items()})]
    fused = FusedWeights(parts, states, block, W2)
    stack = fused.stacks[0]
    product = stack.product(
        [fused._learned(name, Scaled(block.weights[name].shape, torch.zeros_like)) for name in stack.names]
    )
    assert product is not None
    for name, found in zip(stack.names, product.float() * stack.rounding.unscale, strict=True):
        assert distance(found, parts[0]._update(states[0], name, torch.float32)) < 2e-3  # measured: 4e-4


def test_dead_groups_and_ties_have_the_plain_gradients_and_nan_stays(small: dict[str, Path]) -> None:
    parts = (Clip(lr=1e-2),)
    block, states = shaken(parts, small["llama"], W2, torch.float64)
    name = block.linears[0]
    weight = block.weights[name].clone()
    weight[:4], weight[4:8], weight[8:12, ::2] = 0, 0.25, weight[8:12].amax()
    block = replace(block, weights={**block.weights, name: weight})
    plain, fused = plain_weights(parts, states, block, W2), FusedWeights(parts, states, block, W2).weights()
    assert torch.allclose(plain[name], fused[name], rtol=1e-12)
    expected, found = gradients(plain, states), gradients(fused, states)
    assert all(torch.allclose(found[key], expected[key], rtol=1e-9, atol=1e-12) for key in expected)
    weight[0, 0] = float("nan")
    assert FusedWeights(parts, states, block, W2).weights()[name][0, 0].isnan()


@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activations_and_their_gradients_equal_the_plain_ones(dtype: torch.dtype, symmetric: bool, clip: float) -> None:
    plain = Activation(bits=4, symmetric=symmetric, clip=clip)
    x = torch.randn(3, 5, 48, generator=fresh()).to(device(), dtype)
    x[0, 0], x[0, 1, ::2], x[0, 2] = 0, 1.5, x[0, 2].abs()
    upstream = torch.randn(x.shape, generator=fresh()).to(device(), dtype)
    outcomes = []
    for fmt in (plain, FusedActivation(plain)):
        leaf = x.clone().requires_grad_()
        out = fmt.fake(leaf)
        out.backward(upstream)
        outcomes.append((out.detach().float(), leaf.grad.float()))  # type: ignore[union-attr]
    assert distance(outcomes[1][0], outcomes[0][0]) < 1e-6  # measured: equal
    assert distance(outcomes[1][1], outcomes[0][1]) < 1e-6  # measured: 2e-7; equal in half


@pytest.mark.parametrize(("family", "computed_again"), [("llama", False), ("opt", False), ("llama", True)])
def test_a_block_whose_tokens_a_kernel_rounds_equals_the_plain_one(
    small: dict[str, Path], family: str, computed_again: bool
) -> None:
    """Also where the outputs are computed again on the way back, as in training through the whole model."""
    block, context = setting(small[family])
    block, fmt = on_device(block, torch.float32), Activation(bits=4)
    assert context.inputs is not None
    outcomes = []
    for running, again in ((block, False), (replace(block, fused_rounding=True), computed_again)):
        weights = {name: w.clone().requires_grad_() for name, w in running.weights.items()}
        function = running.with_weights(weights, fmt)
        inputs = context.inputs.to(device())
        out = checkpoint(function, inputs, use_reentrant=False) if again else function(inputs)
        assert isinstance(out, Tensor)
        out.square().mean().backward()
        with torch.no_grad():
            unseen = function(context.inputs.to(device()))
        outcomes.append((out.detach(), unseen, torch.cat([w.grad.flatten() for w in weights.values()])))  # type: ignore[union-attr]
    (plain, plain_unseen, plain_gradient), (fused, unseen, gradient) = outcomes
    assert distance(fused, plain) < 1e-5  # measured: equal
    assert distance(gradient, plain_gradient) < 1e-4  # measured: 3e-7
    assert torch.equal(unseen, plain_unseen)  # what is measured is the plain version


@pytest.mark.slow
@pytest.mark.parametrize("quant", [W2, QuantSettings(weight=W2.weight, activation=Activation(bits=4))], ids=str)
def test_learning_with_the_kernels_learns_what_the_plain_path_learns(
    small: dict[str, Path], quant: QuantSettings
) -> None:
    block, context = setting(small["llama"])
    parts = (Singular(corner=8, lr=1e-3), Clip(lr=1e-2))
    outcomes = []
    for kernels in ("plain", "triton"):
        training = schedule_of(epochs=3, batch=8, kernels=kernels)
        learned = learn(parts, training, block, quant, replace(context, generator=fresh()))
        assert learned.kernels == kernels
        outcomes.append([epoch.loss for epoch in learned.epochs])
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-4)  # measured: 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks of blocks on a CPU, which the interpreter alone takes")
def test_what_the_kernels_do_not_cover_is_refused_with_the_reason(
    small: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, context = setting(small["llama"])
    asked = schedule_of(kernels="triton")
    mx = QuantSettings(weight=MXInt(bits=4), activation=A16)
    for parts, quant, reason in (
        ((Clip(lr=1e-2),), mx, "integers of 2 to 8 bits"),
        ((Rounding(hardening=0.5), Clip(lr=1e-2)), W2, "hardening=0"),
        ((Dense(lr=1e-3, hardening=0.5), Clip(lr=1e-2)), W2, "hardening=0"),
        ((Dense(lr=1e-3), Singular(lr=1e-3, corner=0)), W2, "not both"),
        ((Equivalent(weight_only_families=None), Singular(lr=1e-3, corner=0)), W2, "in this order"),
    ):
        states = start_parts(parts, block, quant, context)
        with pytest.raises(ConfigError, match=rf"kernels=triton: .*{reason}.*use kernels=auto"):
            choose(asked, parts, states, block, quant)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="on a GPU"):
        choose(asked, (Clip(lr=1e-2),), start_parts((Clip(lr=1e-2),), block, W2, context), block, W2)
    assert choose(schedule_of(), (Clip(lr=1e-2),), [], block, W2) == "plain"


def test_an_unknown_way_to_make_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.training\.kernels=fast: .*auto"):
        parse(compose_run("method=lsi", "method.training.kernels=fast"))


@pytest.mark.parametrize(("family", "activation"), [product("llama", Activation(bits=4)), product("opt", A16)])
def test_a_compiled_block_equals_the_plain_one_and_is_compiled_once(
    small: dict[str, Path], family: str, activation: Activation
) -> None:
    block, context = setting(small[family])
    other = load_small(small[family]).block(1, block.kwargs)
    assert context.inputs is not None
    for index, plain in enumerate((block, other)):
        before = len(COMPILED)
        outcomes = []
        for running in (plain, replace(plain, compiled=True)):
            weights = {name: w.clone().requires_grad_() for name, w in plain.weights.items()}
            out = running.with_weights(weights, activation)(context.inputs)
            out.square().mean().backward()
            outcomes.append((out.detach(), torch.cat([w.grad.flatten() for w in weights.values()])))  # type: ignore[union-attr]
        assert distance(outcomes[1][0], outcomes[0][0]) < 1e-5  # measured: 2e-7
        assert distance(outcomes[1][1], outcomes[0][1]) < 1e-4  # measured: 6e-7
        assert len(COMPILED) - before == (index == 0)


@pytest.mark.product
def test_compiled_weights_equal_the_plain_ones(small: dict[str, Path]) -> None:
    parts = (Singular(lr=1e-3, corner=0), Clip(lr=1e-2), Rounding())
    block, states = shaken(parts, small["llama"], W2, torch.float32)
    plain, fast = plain_weights(parts, states, block, W2), compiled_weights(parts, states, block, W2)
    assert max(distance(fast[name], plain[name]) for name in plain) < 1e-4  # measured: 4e-7
    expected, found = gradients(plain, states), gradients(fast, states)
    assert max(distance(found[name], expected[name]) for name in expected) < 1e-3  # measured: 1e-6
