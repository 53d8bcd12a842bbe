"""Rotations, prefixes and planted outliers leave the float function as it was, and do what they are for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.hosts import CPU, W4A4, Seen, first_block, hosts, logits, quantised, seeded, some_tokens
from helpers.models import SHAPES, load_small, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from lsiq.assets import bundled_model
from lsiq.calib.gram import input_grams
from lsiq.calib.normed_states import normed_states
from lsiq.calib.outlier_tokens import outlier_tokens
from lsiq.errors import InputError
from lsiq.formats.activation import Activation
from lsiq.linalg.narrow_rotation import squared_range
from lsiq.linalg.rotation import factored_hadamard
from lsiq.methods.base import Method
from lsiq.methods.duquant import DuQuant
from lsiq.methods.rotate import Rotate
from lsiq.methods.rtn import RTN
from lsiq.methods.smoothquant import SmoothQuant
from lsiq.models.attention import activations, attend
from lsiq.models.block import Block, run_stream
from lsiq.models.outliers import PlantedOutliers
from lsiq.models.residual import residual_rotation
from lsiq.models.rounding import round_to_nearest
from lsiq.results.store import BlockStore


def block_error(method: Method, block: Block, hidden: Tensor) -> float:
    result = quantised(method, block, hidden)
    target = run_stream(block.with_weights({}), hidden, 2, CPU)
    found = run_stream(block.with_result(result, W4A4.activation), hidden, 2, CPU)
    return ((found - target).square().mean() / (target - hidden).square().mean()).item()


@pytest.mark.parametrize("host", sorted(hosts(RTN())))
def test_a_host_hands_on_a_block_with_the_same_float_function(host: str, checkpoint: Path) -> None:
    block, hidden = first_block(load_small(checkpoint))
    seen = Seen()
    result = quantised(hosts(seen)[host], block, hidden)
    expected = block.with_weights({})(hidden)
    assert torch.allclose(seen.block.with_weights({})(hidden), expected, atol=1e-4)  # measured: at most 3.4e-6
    # And what is stored runs as what was handed on and rounded.
    rounded = seen.block.with_result(round_to_nearest(seen.block, W4A4), W4A4.activation)
    assert torch.equal(block.with_result(result, W4A4.activation)(hidden), rounded(hidden))


@pytest.mark.parametrize("shape", [{"model_type": "qwen3", "head_dim": 32}, {"model_type": "qwen2"}], ids=str)
def test_rotations_are_exact_with_normalised_queries_and_biases(shape: dict[str, object], tmp_path: Path) -> None:
    model = load_small(save_model(SHAPES["llama"] | shape, tmp_path / "model"))
    rotated = replace(model, residual=residual_rotation(96, False, seeded()))
    # Measured: at most 6.3e-6.
    assert torch.allclose(logits(rotated, some_tokens()), logits(model, some_tokens()), atol=1e-4)
    block, hidden = first_block(model)
    seen = Seen()
    quantised(Rotate(then=seen), block, hidden)
    # Measured: at most 2.6e-6.
    assert torch.allclose(seen.block.with_weights({})(hidden), block.with_weights({})(hidden), atol=1e-4)


def test_a_turned_residual_stream_leaves_the_model_as_it_was(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    rotated = Rotate(then=RTN()).prepare_model(model, None, 2, seeded())
    assert rotated.residual is not None
    found, expected = logits(rotated, some_tokens()), logits(model, some_tokens())
    assert torch.allclose(found, expected, atol=1e-4)  # measured: 2.6e-6 (llama), 4.7e-6 (opt)
    block, _ = first_block(rotated)
    norm = next(group.producer for group in block.spec.groups if group.kind == "norm")
    assert torch.equal(block.weights[f"{norm}.weight"], torch.ones(96))
    assert not torch.allclose(first_block(rotated)[1], first_block(model)[1], atol=0.1)


def test_a_trained_residual_rotation_leaves_the_model_as_it_was_and_narrows_what_norms_hand_on(
    checkpoint: Path,
) -> None:
    model, tokens = load_small(checkpoint), some_tokens()
    with pytest.raises(ValueError, match="which is not among the places; add residual"):
        Rotate(places=["value"], steps=40, then=RTN())
    with pytest.raises(ValueError, match="set block=null or steps=0"):
        Rotate(block=32, steps=40, then=RTN())
    method = Rotate(steps=40, then=RTN())
    assert method.needs == {"inputs"}
    rotated = method.prepare_model(model, tokens, 2, seeded())
    assert torch.allclose(logits(rotated, tokens), logits(model, tokens), atol=1e-4)
    random = Rotate(then=RTN()).prepare_model(model, None, 2, seeded())
    # Of states that differ from channel to channel as much as from token to token little can be gained.
    ranges = [squared_range(normed_states(made, tokens, 2, 4096, seeded())) for made in (random, rotated)]
    assert ranges[1] < 0.9 * ranges[0]


def test_states_behind_norms_are_bare_and_the_same_in_any_batch(checkpoint: Path) -> None:
    model, tokens = load_small(checkpoint), some_tokens()
    rotated = Rotate(then=RTN()).prepare_model(model, None, 2, seeded())
    states = normed_states(rotated, tokens, 2, 64, seeded())
    norms = sum(group.kind == "norm" for group in first_block(rotated)[0].groups)
    assert states.shape == (model.depth * norms * -(-64 // (model.depth * norms)), 96)
    assert torch.allclose(states.norm(dim=1), torch.full((len(states),), 96**0.5), rtol=1e-2)  # but for the norm's eps
    assert torch.allclose(states, normed_states(rotated, tokens, 1, 64, seeded()), atol=1e-4)
    # They are what the norm itself makes, turned.
    bare = replace(model, residual=torch.eye(96))
    assert torch.allclose(states, normed_states(bare, tokens, 2, 64, seeded()) @ rotated.residual, atol=1e-4)


def test_smoothing_every_place_undoes_planted_outliers(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    planted = replace(model, planting=PlantedOutliers(4, 30.0))
    everywhere, norms = (SmoothQuant(places=places, then=RTN()) for places in (["norm", "value", "down"], ["norm"]))
    plain = block_error(everywhere, *first_block(model))
    # Scales are equivariant, so what was planted cancels; measured: 0 and 1e-7 of the error.
    assert block_error(everywhere, *first_block(planted)) == pytest.approx(plain, rel=1e-3)
    assert block_error(norms, *first_block(planted)) > 2 * plain  # measured: 11 and 15 times


def test_a_model_that_normalises_after_its_layers_is_not_rotated(tmp_path: Path) -> None:
    model = load_small(save_model(SHAPES["opt"] | {"do_layer_norm_before": False}, tmp_path / "model"))
    with pytest.raises(InputError, match="residual stream cannot be rotated"):
        Rotate(then=RTN()).prepare_model(model, None, 2, seeded())
    block, hidden = first_block(model)
    seen = Seen()
    quantised(Rotate(places=["value", "down"], then=seen), block, hidden)
    # Measured: 1.4e-6.
    assert torch.allclose(seen.block.with_weights({})(hidden), block.with_weights({})(hidden), atol=1e-4)


def test_scales_are_not_folded_across_an_online_rotation(checkpoint: Path) -> None:
    block, _ = first_block(load_small(checkpoint))
    first = block.spec.stages[0][0]
    rotated = block.rotated({first: factored_hadamard(96, seeded())})
    assert first in {name for group in block.groups for name in group.consumers}
    assert first not in {name for group in rotated.groups for name in group.consumers}
    assert len(rotated.groups) == len(block.groups) - 1


def test_statistics_are_those_of_turned_inputs(checkpoint: Path) -> None:
    block, hidden = first_block(load_small(checkpoint))
    _, last = block.spec.writers
    rotation = factored_hadamard(160, seeded())
    plain = input_grams(block, {}, hidden, 2, [last], Activation())[last]
    rotated = input_grams(block.rotated({last: rotation}), {}, hidden, 2, [last], Activation())[last]
    q = rotation.apply(torch.eye(160)).double()
    # Measured: 1e-7 of the largest.
    assert torch.allclose(rotated, q.t() @ plain @ q, atol=1e-5 * plain.abs().max().item())


def test_a_prefix_is_the_plain_model_on_longer_sequences(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    tokens, prefix = some_tokens(), torch.tensor([5, 900, 0])
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = plain(torch.cat([prefix.expand(2, -1), tokens], 1), use_cache=False).logits[:, 3:]
    after = model.with_prefix(prefix)
    assert torch.allclose(logits(after, tokens), expected, atol=1e-4)  # measured: 2.4e-6
    rotated = Rotate(then=RTN()).prepare_model(after, None, 2, seeded())
    assert torch.allclose(logits(rotated, tokens), expected, atol=1e-4)  # measured: 5.0e-6
    assert not torch.allclose(logits(model, tokens), expected, atol=0.1)


@pytest.mark.parametrize("host", ["value", "query_key", "all", "smoothed-duquant"])
def test_what_is_folded_into_values_holds_for_the_prefix(host: str, checkpoint: Path) -> None:
    model = load_small(checkpoint).with_prefix(torch.tensor([5, 900]))
    block, hidden = first_block(model)
    seen = Seen()
    quantised(hosts(seen)[host], block, hidden)
    # Measured: at most 2.3e-6.
    assert torch.allclose(seen.block.with_weights({})(hidden), block.with_weights({})(hidden), atol=1e-4)


def test_the_prefix_is_not_quantised(checkpoint: Path) -> None:
    block, _ = first_block(load_small(checkpoint))
    fmt = Activation(bits=4)
    query, key, value = (torch.randn(1, 2, n, 16, generator=seeded(n)) for n in (5, 8, 9))
    value = value[:, :, :8]
    mask = torch.ones(1, 1, 5, 8, dtype=torch.bool).tril(3)
    attention = block.module.get_submodule("self_attn")
    attention = replace_groups(attention)
    with activations(block.module, block.spec.linears, fmt, prefix=3):
        found, _ = attend(attention, query, key, value, mask, scaling=0.25)
    on_grid = [torch.cat([x[:, :, :3], fmt.fake(x[:, :, 3:])], 2) for x in (key, value)]
    expected, _ = attend(attention, fmt.fake(query), *on_grid, mask, scaling=0.25)
    assert torch.equal(found, expected)


def replace_groups(attention: torch.nn.Module) -> torch.nn.Module:
    """An attention module's structure for as many key heads as query heads."""
    plain = torch.nn.Module()
    plain.is_causal, plain.num_key_value_groups, plain.training = True, 1, False
    return plain


def test_statistics_leave_the_prefix_out(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    block, hidden = first_block(model)
    after = replace(block, prefix=first_block(model.with_prefix(torch.tensor([7])))[0].prefix)
    first = block.spec.stages[0][0]
    with_prefix = input_grams(after, {}, hidden, 2, [first], Activation())[first]
    assert torch.equal(with_prefix, input_grams(block, {}, hidden, 2, [first], Activation())[first])


def test_gradients_reach_the_weights_through_the_prefix(checkpoint: Path) -> None:
    block, hidden = first_block(load_small(checkpoint).with_prefix(torch.tensor([7, 8])))
    value = next(group.producer for group in block.spec.groups if group.kind == "value")
    weight = block.weights[f"{value}.weight"].clone().requires_grad_()
    only_prefix = block.with_weights({f"{value}.weight": weight})(hidden)[:, :1].sum()
    (gradient,) = torch.autograd.grad(only_prefix, weight)
    alone = replace(block, prefix=None, kwargs=first_block(load_small(checkpoint))[0].kwargs)
    (without,) = torch.autograd.grad(alone.with_weights({f"{value}.weight": weight})(hidden)[:, :1].sum(), weight)
    assert gradient.abs().sum() > 0
    assert not torch.allclose(gradient, without)


def test_outlier_tokens_are_those_of_the_plain_model(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    tokens = some_tokens(6, 32) % 50  # few kinds, so that some are outliers more than once
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    sizes: list[Tensor] = []
    for name, module in plain.named_modules():
        if name.endswith(model.spec.writers[1]):
            module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].abs().amax(-1).view(6, 32)))
    with torch.no_grad():
        plain(tokens, use_cache=False)
    ratios = torch.stack([size / size.median() for size in sizes]).amax(0)
    ratios[:, 0] = 0
    largest = ratios.flatten().sort(descending=True).values
    threshold = (largest[11] + largest[12]).item() / 2  # twelve outliers, two for each sequence
    counted = Counter(tokens[ratios > threshold].tolist())
    found = outlier_tokens(model, tokens, 2, threshold)
    assert len(found) == 2
    assert sum(counted[token] for token in found) == sum(count for _, count in counted.most_common(2))
    assert outlier_tokens(model, tokens, 2, threshold=1e9) == []


def test_planted_outliers_leave_the_model_as_it_was(checkpoint: Path) -> None:
    model = load_small(checkpoint)
    planted = replace(model, planting=PlantedOutliers(2, 30.0))
    assert torch.allclose(logits(planted, some_tokens()), logits(model, some_tokens()), atol=1e-4)  # measured: 2e-6
    assert not torch.allclose(
        planted.block(0, {}).weights["self_attn.v_proj.weight"], model.block(0, {}).weights["self_attn.v_proj.weight"]
    )


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_planted_outliers_hurt_rounding_and_rotations_help(name: str) -> None:
    plain = load_small(bundled_model(name))
    model = replace(plain, planting=PlantedOutliers(4, 30.0))
    rotated = Rotate(then=RTN()).prepare_model(model, None, 2, seeded())
    duquant = SmoothQuant(then=DuQuant(steps=32, then=RTN()))
    # Measured, tiny-llama and tiny-opt: 0.046 and 0.006 unplanted; planted 0.68 and 0.28 rounded, 0.20 and 0.065
    # smoothed, 0.078 and 0.011 rotated, 0.080 and 0.012 smoothed and rotated in blocks.
    planted = block_error(RTN(), *first_block(model))
    assert planted > 5 * block_error(RTN(), *first_block(plain))
    assert block_error(Rotate(places=["value", "down", "query_key"], then=RTN()), *first_block(rotated)) < planted / 4
    assert block_error(duquant, *first_block(model)) < planted / 4


def test_hosts_pass_through_the_store(checkpoint: Path, tmp_path: Path) -> None:
    model = load_small(checkpoint)
    prepared = Rotate(then=RTN()).prepare_model(model.with_prefix(torch.tensor([3, 4])), None, 2, seeded())
    store = BlockStore(tmp_path / "blocks")
    store.open()
    store.write_model(prepared)
    block, hidden = first_block(prepared)
    result = quantised(hosts(RTN())["all"], block, hidden)
    store.write(0, result)
    again, hidden_again = first_block(store.read_model(model))
    assert torch.equal(hidden_again, hidden)
    found = again.with_result(store.read(0), W4A4.activation)(hidden)
    assert torch.equal(found, block.with_result(result, W4A4.activation)(hidden))
