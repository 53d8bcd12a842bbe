"""What an error counts relative to: the stream, its channels, its tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers.configuration import compose_run
from helpers.learned import W2, fresh, schedule_of, setting
from torch import Tensor

from lsiq.experiment.config import parse
from lsiq.learning.learner import learn
from lsiq.learning.measure import Measure, measure
from lsiq.learning.schedule import LookAhead, RelativeTo
from lsiq.methods.learned import Learned
from lsiq.parts.clip import Clip

CPU = torch.device("cpu")
FORMS: tuple[RelativeTo, ...] = get_args(RelativeTo)


def stream() -> Tensor:
    """Four sequences of tokens in 16 channels of unit level."""
    return torch.randn(4, 32, 16, generator=fresh())


def error(found: Measure, out: Tensor, target: Tensor) -> float:
    return (found.mean(out, target) / found.power).item()


@pytest.mark.parametrize("form", FORMS)
def test_an_error_as_large_as_the_target_comes_to_one(form: RelativeTo) -> None:
    target = stream()
    target[..., 3] *= 50
    target[0, 0] *= 1000
    assert error(measure(target, form, 4, CPU), 2 * target, target) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_formula_of_each_form(form: RelativeTo) -> None:
    target = stream()
    target[..., 3] *= 50
    out = target + 0.1 * torch.randn(target.shape, generator=fresh())
    token = target.square().mean(-1, keepdim=True) if form in ("token", "both") else torch.ones(4, 32, 1)
    normed = target / token.sqrt()
    v = normed.abs().mean((0, 1)).square()
    channel = 1 / (v + v.mean()) if form in ("channel", "both") else torch.ones(16)
    expected = (channel * (out - target).square() / token).sum() / (channel * normed.square()).sum()
    assert error(measure(target, form, 4, CPU), out, target) == pytest.approx(expected.item(), rel=1e-5)


def test_errors_in_a_loud_channel_and_in_a_loud_token_count_less() -> None:
    target = stream()
    target[..., 3] *= 100
    target[0, 0] *= 100
    in_channel, in_token, elsewhere = (torch.zeros_like(target) for _ in range(3))
    in_channel[1, :, 3], in_token[0, 0], elsewhere[1, :, 4] = 1, 1, 1

    def over_elsewhere(form: RelativeTo, change: Tensor) -> float:
        found = measure(target, form, 4, CPU)
        return error(found, target + change, target) / error(found, target + elsewhere, target)

    assert over_elsewhere("stream", in_channel) == pytest.approx(1, rel=1e-4)
    assert over_elsewhere("channel", in_channel) < 0.1
    assert over_elsewhere("both", in_channel) < 0.1
    for form in ("token", "both"):
        assert over_elsewhere(form, in_token) < 0.01 * over_elsewhere("stream", in_token)


def test_one_loud_token_leaves_its_channel_its_weight() -> None:
    target = stream().repeat(16, 1, 1)
    target[0, 0, 3] = 1000
    assert target[..., 3].square().mean() > 100 * target[..., 4].square().mean()
    weights = measure(target, "channel", len(target), CPU).channels
    assert weights is not None
    assert weights[3] > 0.5 * weights[4]


def test_a_stream_of_zeros_has_a_finite_measure() -> None:
    zeros = torch.zeros(4, 32, 16)
    for form in FORMS:
        assert error(measure(zeros, form, 4, CPU), zeros + 1, zeros) > 0


@pytest.mark.product
@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_error_equals_the_plain_one(form: RelativeTo) -> None:
    target = stream()
    found = measure(target, form, 4, CPU)
    outcomes = []
    for compile_it in (False, True):
        out = (target + 0.1).requires_grad_()
        error = found.mean(out, target, compile_it)
        error.backward()
        assert out.grad is not None
        outcomes.append((error.item(), out.grad))
    assert outcomes[1][0] == pytest.approx(outcomes[0][0], rel=1e-5)
    assert torch.allclose(outcomes[1][1], outcomes[0][1], rtol=1e-4)  # measured: equal to 7 digits


@pytest.mark.parametrize("form", FORMS)
def test_training_lowers_the_loss_in_every_form(checkpoint: Path, form: RelativeTo) -> None:
    block, context = setting(checkpoint)
    training = schedule_of(epochs=6, relative_to=form, keep="best", aug_loss=form == "both")
    learned = learn((Clip(lr=5e-2),), training, block, W2, replace(context, generator=fresh()))
    assert learned.epochs[-1].loss < 0.97 * learned.epochs[0].loss


def test_the_setting_is_part_of_every_blockwise_training() -> None:
    plain = parse(compose_run("method=lsi")).method
    other = parse(compose_run("method=lsi", "method.training.relative_to=channel", "method.training.ahead.blocks=1"))
    assert isinstance(plain, Learned)
    assert plain.training.relative_to == "stream"
    assert isinstance(other.method, Learned)
    assert other.method.training.relative_to == "channel"
    assert other.method.training.ahead == LookAhead(blocks=1, weights=None, later="float")
