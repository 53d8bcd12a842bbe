"""What is trained is what is stored; gradients are right; the learner learns, and fails loudly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.configuration import compose_run
from helpers.learned import PARTS, W2, W4A4, fresh, schedule_of, setting

from lsiq.errors import ConfigError, InputError, NumericalError
from lsiq.experiment.config import parse
from lsiq.learning.batches import BatchFeeder
from lsiq.learning.learner import Attempt, held_sequences, learn
from lsiq.learning.look_ahead import look_ahead
from lsiq.learning.trained import Trained, start_parts
from lsiq.parts.base import PartState
from lsiq.parts.clip import Clip
from lsiq.parts.dense import Dense
from lsiq.parts.equivalent import Equivalent
from lsiq.parts.singular import Singular


def test_the_increment_gradient_is_the_published_one() -> None:
    """∂L/∂I_k = u_kᵀ P v_k with P = ∂L/∂W' (LSI, arXiv 2406.16299)."""
    w = torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    increment = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    changed = w + (u * increment) @ vh
    changed.retain_grad()
    changed.sin().sum().backward()
    assert torch.allclose(increment.grad, torch.einsum("ok,oi,ki->k", u, changed.grad, vh))


def test_half_precision_products_keep_tiny_increments(checkpoint: Path) -> None:
    block, context = setting(checkpoint)
    exact, half = Singular(corner=4, lr=1e-3), Singular(corner=4, product="float16", lr=1e-3)
    state = exact.start(block, W2, context)
    state = PartState({k: torch.full_like(p, 1e-6) for k, p in state.parameters.items()}, state.constants)
    name = block.linears[0]
    full = exact._update(state, name, torch.float32)
    error = (half._update(state, name, torch.float16) - full).norm() / full.norm()
    assert error < 2e-3  # measured: 4e-4; 0.21 without the scaling


def test_only_the_chosen_linears_and_directions_are_trained(checkpoint: Path) -> None:
    block, context = setting(checkpoint)
    part = Singular(linears=["self_attn.q_proj"], top=5, lr=1e-3, corner=0)
    state = part.start(block, W2, context)
    assert {k: tuple(p.shape) for k, p in state.parameters.items()} == {"self_attn.q_proj.weight:increment": (5,)}
    with pytest.raises(Exception, match="has no nonsense"):
        Singular(linears=["nonsense"], lr=1e-3, corner=0).start(block, W2, context)


@pytest.mark.parametrize("name", ["clip", "all"])
def test_learning_lowers_the_loss_of_rounding(checkpoint: Path, name: str) -> None:
    block, context = setting(checkpoint, samples=16)
    training = schedule_of(epochs=15, batch=4, keep="best")
    parts = tuple(replace(part, lr=0.1) if isinstance(part, Clip) else part for part in PARTS[name])
    learned = learn(parts, training, block, W2, context)
    losses = [epoch.loss for epoch in learned.epochs]
    assert losses[-1] < 0.8 * losses[0]
    assert learned.steps == 15 * 4


def test_best_is_never_worse_than_the_start(checkpoint: Path) -> None:
    block, context = setting(checkpoint)
    wild = (Singular(lr=10.0, corner=0),)  # a rate that ruins the block
    learned = learn(wild, schedule_of(epochs=2, batch=4, keep="best"), block, W2, context)
    assert learned.best_epoch == -1
    assert all(p.abs().max() == 0 for p in learned.states[0].parameters.values())


def test_sequences_held_back_are_in_no_batch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, context = setting(checkpoint, samples=16)
    seen: list[int] = []
    load = BatchFeeder.load

    def noting(self: BatchFeeder, samples: torch.Tensor) -> tuple[int, float]:
        seen.extend(samples.tolist())
        return load(self, samples)

    monkeypatch.setattr(BatchFeeder, "load", noting)
    learned = learn((Clip(lr=1e-2),), schedule_of(epochs=3, batch=4, keep="held", held=0.25), block, W2, context)
    held = held_sequences(16, 4).tolist()
    assert held == [2, 6, 10, 14]
    assert sorted(seen) == sorted(3 * [index for index in range(16) if index not in held])
    assert learned.steps == 3 * 3
    assert len(learned.epochs) == 3


def test_what_is_held_back_moves_no_parameter(checkpoint: Path) -> None:
    block, context = setting(checkpoint, samples=16)
    assert context.inputs is not None
    training = schedule_of(epochs=2, batch=4, keep="held")
    noisy = context.inputs.clone()
    noisy[held_sequences(16, 2)] += 0.3
    one, other = (
        learn((Clip(lr=1e-2),), training, block, W2, replace(context, inputs=inputs, generator=fresh()))
        for inputs in (context.inputs, noisy)
    )
    assert [epoch.loss for epoch in one.epochs] == [epoch.loss for epoch in other.epochs]
    assert [epoch.held for epoch in one.epochs] != [epoch.held for epoch in other.epochs]


def test_the_epoch_kept_is_that_of_the_least_loss_on_what_is_held_back(checkpoint: Path) -> None:
    """Of the sequences held back the targets are as they are; of the others they are those of other weights."""
    block, context = setting(checkpoint, samples=16)
    assert context.targets is not None
    wrong = 3 * context.targets
    held = held_sequences(16, 4)
    wrong[held] = context.targets[held]
    context = replace(context, targets=wrong)
    parts = (Dense(lr=1e-2),)
    training = schedule_of(epochs=6, batch=4, keep="held", held=0.25)
    learned = learn(parts, training, block, W2, context)
    losses = [epoch.held for epoch in learned.epochs]
    everything = [learned.held["held_start"], *losses]
    assert everything.index(min(everything)) == learned.best_epoch + 1 == learned.held["kept_epochs"] < 6
    assert learned.held["held_least"] == min(everything)
    assert learned.held["held_last"] == losses[-1]
    assert learned.epochs[-1].loss < learned.epochs[0].loss  # training itself went on
    shorter = schedule_of(epochs=learned.best_epoch + 1, batch=4, keep="held", held=0.25)
    again = learn(parts, shorter, block, W2, replace(context, generator=fresh()))
    assert all(torch.equal(p, again.states[0].parameters[n]) for n, p in learned.states[0].parameters.items())


def test_held_is_last_where_the_last_epoch_is_best(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, context = setting(checkpoint, samples=16)
    falling = iter(range(9, 0, -1))  # what the losses are does not depend on the processor
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "_loss_to_choose_by", lambda attempt: float(next(falling)))
        held = learn((Clip(lr=1e-2),), schedule_of(epochs=4, batch=4, keep="held"), block, W2, context)
    assert held.best_epoch == 3
    monkeypatch.setattr(Attempt, "_chooses", False)
    last = learn(
        (Clip(lr=1e-2),),
        schedule_of(epochs=4, batch=4, keep="held"),
        block,
        W2,
        replace(context, generator=fresh()),
    )
    assert all(torch.equal(p, last.states[0].parameters[name]) for name, p in held.states[0].parameters.items())


def test_too_few_sequences_to_hold_any_back_are_refused(checkpoint: Path) -> None:
    block, context = setting(checkpoint, samples=3)
    with pytest.raises(ConfigError, match=r"method\.training\.held=0\.125: is less than one of 3 sequences"):
        learn((Clip(lr=1e-2),), schedule_of(keep="held"), block, W2, context)


def test_a_staged_schedule_lets_late_parts_wait(checkpoint: Path) -> None:
    block, context = setting(checkpoint)
    training = schedule_of(epochs=4, batch=4, schedule="staged", wait=2)
    learned = learn((Singular(lr=1e-3, corner=0), Clip(lr=1e-2)), training, block, W2, context)
    name = f"singular:{block.linears[0]}:increment"
    assert learned.epochs[1].increments[name].abs().max() == 0
    assert learned.epochs[2].increments[name].abs().max() > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_precision_trains_to_about_the_same_loss(checkpoint: Path, precision: str) -> None:
    block, context = setting(checkpoint)
    training = schedule_of(epochs=6, batch=4, precision=precision)
    learned = learn((Clip(lr=1e-2),), training, block, W2, context)
    reference = learn((Clip(lr=1e-2),), schedule_of(epochs=6, batch=4), block, W2, replace(context, generator=fresh()))
    assert learned.epochs[-1].loss == pytest.approx(reference.epochs[-1].loss, rel=0.05)


def test_the_augmented_loss_is_larger_and_trains(checkpoint: Path) -> None:
    block, context = setting(checkpoint)
    plain = learn((Clip(lr=1e-2),), schedule_of(epochs=1, batch=4), block, W2, context)
    both = learn(
        (Clip(lr=1e-2),), schedule_of(epochs=1, batch=4, aug_loss=True), block, W2, replace(context, generator=fresh())
    )
    assert both.epochs[0].loss > plain.epochs[0].loss


def test_a_loss_that_is_not_finite_is_retried_and_then_stops_with_block_and_knob(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block, context = setting(checkpoint)
    assert context.targets is not None
    spoiled = replace(context, targets=context.targets.clone().index_fill_(0, torch.tensor([0]), float("nan")))
    with pytest.raises(NumericalError, match=r"block 0: .*clip\.lr"):
        learn((Clip(lr=1e-2),), schedule_of(epochs=2, batch=4, retries=2), block, W2, spoiled)
    assert "try 1 of 2" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("hardening", [0.0, 0.5, 1.0])
def test_a_loss_that_grows_as_rounding_sets_in_has_not_run_away(checkpoint: Path, hardening: float) -> None:
    block, context = setting(checkpoint)
    parts = (Dense(lr=1e-3, hardening=hardening), Clip(form="linear", lr=1e-2))
    training = schedule_of(epochs=8)
    window = look_ahead(parts, training, block, W2, context)
    attempt = Attempt(
        Trained(parts, start_parts(parts, block, W2, context), block, W2), training, window, context, slow=1.0
    )
    learned = attempt.run([], retry=0)
    if hardening:
        assert learned.epochs[-1].loss > 2 * learned.epochs[0].loss
    assert attempt.good_epochs == 7, "a loss that is not finite in the last epoch costs that epoch alone"


def test_a_rate_that_blows_up_recovers_at_a_lower_one(checkpoint: Path) -> None:
    block, context = setting(checkpoint)
    learned = learn(
        (Equivalent(lr=40.0, weight_only_families=None),),
        schedule_of(epochs=3, batch=4, retries=12),
        block,
        W2,
        context,
    )
    assert all(p.isfinite().all() for p in learned.states[0].parameters.values())


def test_dead_channels_constant_inputs_and_duplicated_rows_train(checkpoint: Path) -> None:
    block, context = setting(checkpoint)
    weights = {name: weight.clone() for name, weight in block.weights.items()}
    first = block.linears[0]
    weights[first][:, :7] = 0
    weights[first][3:6] = weights[first][0]
    assert context.inputs is not None
    inputs = context.inputs.clone()
    inputs[:, :, 10:20] = 0.5
    learned = learn(
        PARTS["all"],
        schedule_of(epochs=2, batch=4),
        replace(block, weights=weights),
        W4A4,
        replace(context, inputs=inputs),
    )
    assert all(p.isfinite().all() for state in learned.states for p in state.parameters.values())


def test_models_that_cannot_be_folded_are_refused_with_the_reason(checkpoint: Path) -> None:
    block, context = setting(checkpoint)
    with pytest.raises(InputError, match="folds scales into norms, but its blocks are post-norm"):
        Equivalent(weight_only_families=None).start(replace(block, unfoldable="its blocks are post-norm"), W2, context)


def test_training_for_seconds_stops_after_the_epoch_that_passes_them(checkpoint: Path) -> None:
    block, context = setting(checkpoint)
    learned = learn((Clip(lr=1e-2),), schedule_of(epochs=1000, batch=4, seconds=0.05), block, W2, context)
    assert len(learned.epochs) in range(1, 1000)


def test_method_files_say_what_their_names_say() -> None:
    def parts(method: str) -> list[str]:
        return [part.name for part in parse(compose_run(f"method={method}")).method.parts]  # type: ignore[attr-defined]

    assert parts("lwc") == ["clip"]
    assert parts("sde") == ["expansion", "equivalent", "clip"]
    assert parts("autoround") == ["rounding", "clip"]
    assert parts("dense") == ["dense", "clip"]
    assert parts("omniquant") == ["equivalent", "clip"]
    assert parts("lsi") == ["singular", "equivalent", "clip", "rounding"]
    assert parts("lsi-corner") == parts("lsi-diagonal") == ["singular", "equivalent", "clip"]
    assert parts("lsi-only") == ["singular"]
    assert parts("lsi-random") == ["random", "equivalent", "clip"]
