"""The loss of a block may look past it: what is compared, with what, and how far."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.configuration import compose_run
from helpers.learned import CPU, W2, fresh, schedule_of
from helpers.models import load_small

from lsiq.errors import ConfigError
from lsiq.experiment.config import parse
from lsiq.learning.learner import Attempt, learn
from lsiq.learning.look_ahead import look_ahead
from lsiq.learning.measure import measure
from lsiq.learning.schedule import LookAhead, RelativeTo, Training
from lsiq.learning.trained import Trained, start_parts
from lsiq.models.block import Block, FloatStream, run_stream
from lsiq.models.context import Ahead, Context
from lsiq.models.rounding import round_to_nearest
from lsiq.parts.clip import Clip
from lsiq.parts.dense import Dense
from lsiq.parts.equivalent import Equivalent
from lsiq.parts.singular import Singular


def first_block(checkpoint: Path, depth: int = 2) -> tuple[Block, Block, Context]:
    """The model's first block, its second, and the first one's context."""
    model = load_small(checkpoint)
    tokens = torch.randint(0, 4096, (8, 24), generator=torch.Generator().manual_seed(3))
    hidden, kwargs = model.embed(tokens, batch=4)
    block = model.block(0, kwargs)
    stream = FloatStream(lambda index: model.block(index, kwargs), hidden, 4)
    ahead = Ahead(depth, lambda index: model.block(index, kwargs), model.logits, stream.after)
    targets = run_stream(block.with_weights({}), hidden, 4, CPU)
    context = Context(hidden, targets, fresh(), 4, lambda values: None, tokens, ahead)
    return block, model.block(1, kwargs), context


def looking(blocks: int, **changes: object) -> Training:
    return schedule_of(ahead=LookAhead(blocks=blocks, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("later", ["float", "rtn"])
def test_the_loss_is_the_weighted_sum_of_what_the_blocks_make_of_it(checkpoint: Path, later: str) -> None:
    block, second, context = first_block(checkpoint)
    assert context.inputs is not None
    assert context.targets is not None
    window = look_ahead((), looking(1, weights=[0.5, 2.0], later=later), block, W2, context)
    out = context.targets + 0.1 * torch.randn(context.targets.shape, generator=fresh())
    result = round_to_nearest(second, W2)
    function = second.with_weights({}) if later == "float" else second.with_result(result)
    far = function(out) - second.with_weights({})(context.targets)
    expected = 0.5 * (out - context.targets).square().mean() + 2.0 * far.square().mean()
    found = window.loss(out, window.targets)
    assert torch.allclose(found, expected / context.targets.square().mean(), rtol=1e-5)


@pytest.mark.parametrize("form", ["channel", "token", "both"])
def test_each_output_is_measured_by_its_own_stream(checkpoint: Path, form: RelativeTo) -> None:
    block, second, context = first_block(checkpoint)
    assert context.targets is not None
    training = schedule_of(ahead=LookAhead(blocks=1), relative_to=form)
    window = look_ahead((), training, block, W2, context)
    out = context.targets + 0.1 * torch.randn(context.targets.shape, generator=fresh())
    pairs = [(out, context.targets), (second.with_weights({})(out), window.targets[1])]
    own = [measure(target, form, context.samples, CPU) for _, target in pairs]
    expected = sum(found.mean(*pair) / found.power for found, pair in zip(own, pairs, strict=True))
    assert torch.allclose(window.loss(out, window.targets), torch.as_tensor(expected), rtol=1e-5)


def test_the_window_shrinks_where_the_model_ends(checkpoint: Path) -> None:
    block, _, context = first_block(checkpoint)
    window = look_ahead((), looking(5, weights=[1, 2, 3, 4, 5, 6]), block, W2, context)
    assert (len(window.targets), len(window.later), list(window.weights)) == (2, 1, [1, 2])
    last = look_ahead((), looking(5), replace(block, index=1), W2, context)
    assert (len(last.targets), len(last.later)) == (1, 0)


def test_a_loss_of_the_farthest_block_alone_reaches_the_last_blocks_too(checkpoint: Path) -> None:
    block, _, context = first_block(checkpoint)
    only = looking(2, weights=[0, 0, 1])
    assert list(look_ahead((), only, block, W2, context).weights) == [0, 1]
    last = replace(block, index=1)
    assert list(look_ahead((), only, last, W2, context).weights) == [1]
    assert learn((Clip(lr=1e-2),), only, last, W2, context).epochs[0].loss > 0


def test_looking_at_no_later_block_is_the_plain_loss_bit_for_bit(checkpoint: Path) -> None:
    block, _, context = first_block(checkpoint)
    plain = learn((Clip(lr=1e-2),), schedule_of(), block, W2, replace(context, ahead=None))
    none = learn((Clip(lr=1e-2),), looking(0), block, W2, replace(context, generator=fresh()))
    assert [epoch.loss for epoch in plain.epochs] == [epoch.loss for epoch in none.epochs]


def test_training_on_the_far_output_lowers_the_far_error(checkpoint: Path) -> None:
    block, _, context = first_block(checkpoint)

    def far_error(training: Training) -> float:
        learned = learn(
            (Singular(lr=0.02, corner=0), Clip(lr=0.1)), training, block, W2, replace(context, generator=fresh())
        )
        return learned.epochs[-1].loss / learned.epochs[0].loss

    longer = schedule_of(epochs=10, ahead=LookAhead(blocks=1, weights=[0, 1]))
    assert far_error(longer) < 0.9  # measured: 0.6 to 0.8


def test_later_blocks_can_be_trained_along(checkpoint: Path) -> None:
    block, second, context = first_block(checkpoint)
    parts = (Equivalent(weight_only_families=None), Clip(lr=0.1))
    training = schedule_of(epochs=8, ahead=LookAhead(blocks=1, later="learned"))
    window = look_ahead(parts, training, block, W2, context)
    (companion,) = window.companions
    assert companion.block.index == second.index
    assert any(parameter.requires_grad for _, parameter in companion.named_parameters())
    learned = learn(parts, training, block, W2, context)
    fixed = schedule_of(epochs=8, ahead=LookAhead(blocks=1, later="rtn"))
    against = learn(parts, fixed, block, W2, replace(context, generator=fresh()))
    assert learned.epochs[-1].loss < against.epochs[-1].loss


def test_rounding_has_set_in_everywhere_when_an_epoch_is_judged(checkpoint: Path) -> None:
    block, _, context = first_block(checkpoint)
    parts = (Dense(lr=1e-3, hardening=1.0), Clip(lr=1e-2))
    training = schedule_of(epochs=2, keep="best", ahead=LookAhead(blocks=1, later="learned"))
    window = look_ahead(parts, training, block, W2, context)
    attempt = Attempt(
        Trained(parts, start_parts(parts, block, W2, context), block, W2), training, window, context, slow=1.0
    )
    attempt.run([], retry=0)
    for trained in (attempt.trained, *window.companions):
        assert trained.states[0].constants["done"] == 1


@pytest.mark.parametrize("later", ["rtn", "learned"])
def test_rounded_later_blocks_are_refused_behind_online_rotations(later: str) -> None:
    looking_ahead = ("blocks=1", f"later={later}")
    for host, refused in (
        (["method=duquant"], True),
        (["method=rotate"], True),
        (["method=rotate", "method.places=[residual,value]"], False),
        (["method=prefix"], False),
    ):
        ahead = [f"method.then.training.ahead.{setting}" for setting in looking_ahead]
        config = compose_run(*host, "method@method.then=sde", *ahead)
        if not refused:
            parse(config)
            continue
        with pytest.raises(ConfigError, match=rf"ahead\.later={later} rounds later blocks .* use later=float"):
            parse(config)


def test_weights_must_fit_the_window() -> None:
    for overrides, message in (
        (["blocks=2", "weights=[1,1]"], r"blocks=2 needs 3 of them"),
        (["blocks=1", "weights=[0,0]"], r"one of them more"),
        (["blocks=-1"], r"ahead\.blocks=-1"),
        (["later=gptq"], r"ahead\.later=gptq: .*float, rtn"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(compose_run("method=lsi", *(f"method.training.ahead.{override}" for override in overrides)))
