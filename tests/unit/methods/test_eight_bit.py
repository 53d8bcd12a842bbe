"""Adam with moments of 8 bits: what rounding does to them, the step itself, and how far it departs from float32."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lsiq.methods.finetune import eight_bit
from lsiq.methods.finetune.eight_bit import BLOCK, FIRST, MOMENT_BYTES, SECOND, SMALL, CodeBook, EightBitAdam

HALF = torch.tensor(0.5)


def adam(parameter: Tensor, rate: float = 1e-2) -> EightBitAdam:
    return EightBitAdam([{"params": [parameter], "lr": rate}])


def test_moments_differ_from_what_is_rounded_by_a_share_of_themselves_and_no_second_moment_becomes_0() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(200, 1, generator=generator).mul_(20).exp_()  # of blocks, over thirty decades
    values = sizes * torch.randn(200, BLOCK, generator=generator) * torch.randn(200, BLOCK, generator=generator).exp_()
    values[:, 7] = 0
    codes, scale = FIRST.encode(values, HALF)
    error = (FIRST.decode(codes, scale) - values).abs() / scale
    nearest = (FIRST.growth - 1) / (FIRST.growth + 1)
    bound = torch.maximum(nearest * values.abs() / scale, torch.tensor(0.5e-4))  # measured: 0.0365 of itself
    assert (error <= bound * 1.0001).all()
    assert torch.equal(FIRST.decode(codes, scale).abs().amax(1, keepdim=True), scale)
    squares = values.abs()
    codes, scale = SECOND.encode(squares, torch.rand(BLOCK, generator=generator))
    decoded = SECOND.decode(codes, scale)
    above = squares > 1e-7 * scale
    assert ((decoded - squares).abs() <= (SECOND.growth - 1.0) * squares * 1.0001)[above].all()  # measured: 0.0655
    torch.testing.assert_close(decoded[~above], (1e-7 * scale).expand_as(decoded)[~above] * (squares > 0)[~above])
    assert torch.equal(decoded == 0, squares == 0)


def test_the_threshold_is_right_in_the_mean_over_steps() -> None:
    value = torch.full((1, BLOCK), 0.3)
    value[0, 0] = 1.0
    moves = (eight_bit._Move(step, 0.0, 0.9, 0.999, 0.0) for step in range(100))
    decoded = torch.stack([SECOND.decode(*SECOND.encode(value, move.threshold(value.device))) for move in moves])
    # Each is off by up to 6.6 %; of a hundred steps each lane's mean by 0.07 %.
    torch.testing.assert_close(decoded.mean(0), value, rtol=1e-3, atol=0)


def test_steps_are_those_that_tables_of_codes_and_the_formulas_of_adam_give() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, SMALL, generator=generator, dtype=torch.float64)
    parameter = torch.zeros(SMALL, requires_grad=True)
    optimizer = adam(parameter, 0.125)
    first = second = expected = torch.zeros(SMALL, dtype=torch.float64)
    for number, gradient in enumerate(gradients, 1):
        parameter.grad = gradient.float()
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        root = (second / (1 - 0.999**number)).sqrt() + 1e-8
        expected = expected - 0.125 * first / (1 - 0.9**number) / root
        lanes = [(lane * 0.7548776662466927 + number * 0.6180339887498949) % 1 for lane in range(BLOCK)]
        first = by_table(first, [10 ** (-4 * (127 - code) / 126) for code in range(1, 128)], [0.5] * BLOCK, 0.5)
        second = by_table(second, [10 ** (-7 * (255 - code) / 254) for code in range(1, 256)], lanes, 0.0)
    # Measured: 4e-7. A code that falls to the other side of its threshold would show as 1e-3.
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def by_table(values: Tensor, magnitudes: list[float], thresholds: list[float], least: float) -> Tensor:
    """Round each number to one of the two magnitudes beside it, and what is below `least` times the least to 0."""
    rounded = []
    for block in values.split(BLOCK):
        largest = float(block.abs().max())
        for value, threshold in zip(block.tolist(), thresholds, strict=True):
            below = min(bisect_right(magnitudes, abs(value) / largest), len(magnitudes) - 1) - 1
            if below < 0:
                magnitude = magnitudes[0] if abs(value) / largest > magnitudes[0] * least else 0.0
            else:
                low, high = magnitudes[below : below + 2]
                magnitude = high if (abs(value) / largest - low) / (high - low) > threshold else low
            rounded.append(largest * magnitude * (1 if value > 0 else -1))
    return torch.tensor(rounded, dtype=torch.float64)


def drifting(steps: int, size: int) -> Iterator[Tensor]:
    """Gradients with noise, which have become up to twenty times larger and smaller at the end."""
    generator = torch.Generator().manual_seed(1)
    mean = 0.3 * torch.randn(size, generator=generator)
    start, growth = (torch.randn(size, generator=generator) for _ in range(2))
    for step in range(steps):
        amount = (0.7 * start + growth * step / steps).exp_()
        yield amount * (mean + torch.randn(size, generator=generator))


def test_parameters_go_where_adamw_takes_them_and_second_moments_follow() -> None:
    ours, theirs = (torch.zeros(64 * BLOCK, requires_grad=True) for _ in range(2))
    optimizer, reference = adam(ours), torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    for gradient in drifting(600, len(ours)):
        ours.grad, theirs.grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
    state, exact = optimizer.state[ours], reference.state[theirs]
    assert (ours - theirs).norm() / theirs.norm() < 0.055  # measured: 0.047
    first = FIRST.decode(state["exp_avg"], state["exp_avg_scale"]).view(-1)
    assert (first - exact["exp_avg"]).norm() / exact["exp_avg"].norm() < 0.045  # measured: 0.035
    second = SECOND.decode(state["exp_avg_sq"], state["exp_avg_sq_scale"]).view(-1)
    ratio = (second / exact["exp_avg_sq"]).sqrt().log()
    # Rounded to nearest, second moments stand still, and these are 0.34 and 0.29.
    assert abs(ratio.mean()) < 0.03  # measured: -0.016
    assert ratio.std() < 0.12  # measured: 0.102


def after(optimizer: EightBitAdam, parameter: Tensor, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach().clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_from_a_state_to_the_same_bits(dtype: torch.dtype) -> None:
    gradients = list(drifting(6, SMALL + 3))
    parameter = torch.zeros(SMALL + 3, dtype=dtype, requires_grad=True)
    optimizer = adam(parameter)
    halfway = after(optimizer, parameter, gradients[:3]).requires_grad_()
    other = adam(halfway)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = other.state[halfway]
    assert [state[name].dtype for name in ("exp_avg", "exp_avg_sq")] == [torch.int8, torch.uint8]
    assert state["exp_avg_scale"].dtype == torch.float32
    assert torch.equal(after(other, halfway, gradients[3:]), after(optimizer, parameter, gradients[3:]))


def test_a_tensor_moves_alike_in_one_chunk_and_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, results = list(drifting(3, 5 * SMALL + 3)), []
    for chunk in (2**24, 2 * SMALL):
        monkeypatch.setattr(eight_bit, "CHUNK", chunk)
        parameter = torch.zeros(5 * SMALL + 3, requires_grad=True)
        results.append(after(adam(parameter), parameter, gradients))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


def test_moments_take_as_many_bytes_as_the_estimate_says_and_small_tensors_keep_float32() -> None:
    large, small = torch.zeros(40, 256, requires_grad=True), torch.zeros(SMALL - 1, requires_grad=True)
    optimizer = EightBitAdam([{"params": [large, small], "lr": 1e-2}])
    theirs = torch.zeros(SMALL - 1, requires_grad=True)
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    for gradient in drifting(5, SMALL - 1):
        large.grad = torch.ones_like(large)
        small.grad, theirs.grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
    held = sum(value.nbytes for name, value in optimizer.state[large].items() if name != "step")
    assert held == MOMENT_BYTES * large.numel()
    torch.testing.assert_close(small, theirs, rtol=1e-5, atol=1e-8)


def test_what_had_no_gradient_stands_still_and_what_is_not_finite_is_not_hidden() -> None:
    still, moved = (torch.zeros(SMALL, requires_grad=True) for _ in range(2))
    optimizer = EightBitAdam([{"params": [still, moved], "lr": 1e-2}])
    moved.grad = torch.zeros(SMALL)
    moved.grad[0] = float("nan")
    optimizer.step()
    assert torch.equal(still, torch.zeros(SMALL))
    assert still not in optimizer.state
    moved.grad = torch.ones(SMALL)
    optimizer.step()
    assert moved[:BLOCK].isnan().all()
    assert moved[BLOCK:].isfinite().all()


@pytest.mark.parametrize("book", [FIRST, SECOND])
def test_each_code_stands_for_a_magnitude_of_its_own_and_is_its_code(book: CodeBook) -> None:
    codes = torch.arange(book.levels + 1).to(book.dtype)
    decoded = book.decode(codes[None], torch.ones(1, 1))
    assert all(a < b for a, b in pairwise(decoded[0].tolist()))
    assert decoded[0, 1].item() == pytest.approx(10**-book.decades, rel=1e-5)
    assert torch.equal(book.encode(decoded, HALF)[0][0], codes)
