"""Keys and values have a format of their own, and are attended to as a cache would hold them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.configuration import compose_run
from helpers.models import load_small

from lsiq.data.tokens import random_windows
from lsiq.errors import ConfigError
from lsiq.experiment.config import parse
from lsiq.formats.activation import Activation
from lsiq.formats.cache_scales import CacheScales
from lsiq.formats.integer import Integer
from lsiq.formats.key_value import KeyValue, Running, under_scales
from lsiq.formats.quant import QuantSettings
from lsiq.models.attention import activations, attend
from lsiq.models.loading import Model
from lsiq.models.result import BlockResult


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> Model:
    return load_small(checkpoints["llama"])


def block_output(model: Model, kv: KeyValue | None, activation: Activation) -> torch.Tensor:
    quant = QuantSettings(weight=Integer(bits=4), activation=activation, kv=kv or KeyValue())
    hidden, kwargs = model.embed(random_windows(model.config.vocab_size, 2, 12, 0), 2)
    return model.block(0, kwargs).with_weights({}, quant.running)(hidden)


def test_without_a_format_of_their_own_nothing_changes() -> None:
    activation = Activation(bits=8)
    assert QuantSettings(weight=Integer(bits=8), activation=activation).running is activation


def test_the_width_of_activations_for_keys_and_values_is_what_activations_do(model: Model) -> None:
    activation = Activation(bits=6)
    assert torch.equal(block_output(model, KeyValue(bits=6), activation), block_output(model, None, activation))
    assert not torch.equal(block_output(model, KeyValue(bits=4), activation), block_output(model, None, activation))


def test_float_keys_and_values_stand_beside_rounded_activations(model: Model) -> None:
    linears_only = Activation(bits=6, attention=False)
    kept = block_output(model, KeyValue(bits=16), linears_only)
    assert torch.equal(kept, block_output(model, None, linears_only))
    assert not torch.equal(
        block_output(model, KeyValue(bits=16), Activation(bits=6)), block_output(model, None, Activation(bits=6))
    )


def test_groups_of_channels_have_their_own_ranges() -> None:
    x = torch.randn(2, 3, 5, 16)
    grouped = KeyValue(bits=3, group=4).fake(x)
    for start in range(0, 16, 4):
        part = slice(start, start + 4)
        assert torch.equal(grouped[..., part], KeyValue(bits=3).fake(x[..., part].contiguous()))
    assert (grouped - x).square().mean() < (KeyValue(bits=3).fake(x) - x).square().mean()


@pytest.mark.parametrize("grouped_queries", [False, True])
def test_ranges_shared_by_tokens_are_those_of_a_cache_that_grows(grouped_queries: bool) -> None:
    """One pass over the sequence gives each query what a decoder that appends token by token would see."""
    torch.manual_seed(0)
    tokens, group = 11, 4
    heads, own = 4, 2 if grouped_queries else 4
    query, key, value = torch.randn(1, heads, tokens, 8), torch.randn(1, own, tokens, 8), torch.randn(1, own, tokens, 8)
    kv = KeyValue(bits=2, per="channel", group=group)
    module = torch.nn.Module()
    with activations(module, (), Running(Activation(), kv)):
        whole, _ = attend(module, query, key, value, None)
    for at in range(tokens):
        kept = [kv.fake(x[:, :, : at + 1]).repeat_interleave(heads // own, 1) for x in (key, value)]
        scores = query[:, :, at : at + 1] @ kept[0].transpose(-1, -2) / 8**0.5
        assert torch.allclose(whole[:, at], (scores.softmax(-1) @ kept[1])[:, :, 0], atol=1e-6), at
    assert torch.equal(kv.fake(key)[:, :, 8:], key[:, :, 8:]), "the newest tokens stay in float"


def test_a_cache_of_a_prefix_stays_in_float_before_groups_of_tokens() -> None:
    torch.manual_seed(0)
    kv = KeyValue(bits=2, per="channel", group=2)
    query, key, value = (torch.randn(1, 2, size, 8) for size in (4, 7, 7))
    module = torch.nn.Module()
    with activations(module, (), Running(Activation(), kv), prefix=3):
        found, _ = attend(module, query, key, value, None)
    kept = [torch.cat([x[:, :, :3], kv.fake(x[:, :, 3:])], 2) for x in (key, value)]
    scores = query[:, :, -1:] @ kept[0].transpose(-1, -2) / 8**0.5
    assert torch.allclose(found[:, -1], (scores.softmax(-1) @ kept[1])[:, :, 0], atol=1e-6)


def test_keys_and_values_are_clipped_to_a_share_of_their_own_ranges() -> None:
    x = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(KeyValue(bits=4, clip=0.95).fake(x), Activation(bits=4, clip=0.95).fake(x))
    assert torch.equal(KeyValue(bits=4, clip=1).fake(x), KeyValue(bits=4).fake(x))
    turned = KeyValue(bits=4, per="channel", group=8, clip=0.95).fake(x)
    assert torch.equal(turned, Activation(bits=4, clip=0.95).fake(x.mT).mT)
    assert KeyValue(bits=4, group=4, clip=0.95).suffix == "-kv4g4-clip0.95"
    assert KeyValue(bits=4, clip=1).suffix == "-kv4"
    assert KeyValue(bits=4, clip=0.95).words.endswith("a range for all channels of a head, 0.95 of it kept")


def test_a_share_alone_stands_in_place_of_that_of_activations(model: Model) -> None:
    whole, clipped = Activation(bits=6), Activation(bits=6, clip=0.8)
    own = block_output(model, KeyValue(clip=0.8), whole)
    assert torch.equal(own, block_output(model, KeyValue(bits=6, clip=0.8), whole))
    assert not torch.equal(own, block_output(model, None, whole))
    assert torch.equal(block_output(model, KeyValue(clip=0.8), clipped), block_output(model, None, clipped))
    assert torch.equal(block_output(model, KeyValue(clip=1), clipped), block_output(model, KeyValue(bits=6), clipped))
    symmetric = Activation(bits=6, symmetric=True)
    assert torch.equal(
        block_output(model, KeyValue(clip=0.8), symmetric),
        block_output(model, KeyValue(bits=6, symmetric=True, clip=0.8), symmetric),
    )
    assert KeyValue(clip=0.95).suffix == "-kv-clip0.95"
    assert KeyValue(clip=0.95).words == "as activations, 0.95 of each range kept"


def test_a_named_format_of_activations_serves_keys_and_values() -> None:
    x = torch.randn(1, 2, 3, 16)
    kv = KeyValue(format="w4a8-mxint")
    assert torch.equal(kv.fake(x), kv.named.fake(x))
    assert kv.named is kv.named, "its file is read once"
    assert kv.suffix == "-kv-w4a8-mxint"


def test_fp8_under_a_fixed_scale_is_torchs_cast_and_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 16) * torch.tensor([1e-4, 0.01, 1.0, 300.0]).repeat(16)[:, None]
    for scale in (1.0, 0.5, 0.37):
        found = KeyValue(format="fp8", scale=scale).fake(x)
        cast = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(found, cast)
        scheme = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor", dynamic=False)
        theirs = fake_quantize(x, torch.tensor([scale]), torch.zeros(1), scheme)
        assert torch.equal(found, theirs)
    assert found.abs().max() == 448 * torch.tensor(0.37), "what lies beyond the largest number saturates"


def test_a_fixed_scale_serves_a_cache_that_grows(model: Model) -> None:
    kv = KeyValue(format="fp8", scale=1.0)
    x = torch.randn(1, 2, 5, 8)
    assert torch.equal(kv.fake(x)[:, :, :3], kv.fake(x[:, :, :3])), "no token decides another's numbers"
    assert not torch.equal(block_output(model, kv, Activation()), block_output(model, None, Activation()))
    assert kv.suffix == "-kv-fp8s1"
    assert kv.words == "8-bit floating point (e4m3) under a fixed scale of 1"


def test_calibrated_scales_are_those_of_the_block_that_runs(model: Model) -> None:
    kv = KeyValue(format="fp8", scale="calibrated")
    quant = QuantSettings(weight=Integer(bits=4), activation=Activation(), kv=kv)
    hidden, kwargs = model.embed(random_windows(model.config.vocab_size, 2, 12, 0), 2)
    block = model.block(0, kwargs)
    with pytest.raises(AssertionError, match="scales are measured before"):
        block.with_weights({}, quant.running)(hidden)
    block = replace(block, cache_scales=CacheScales(key=0.5, value=0.125))
    x = torch.randn(1, 2, 5, 8)
    running = under_scales(quant.running, block.cache_scales)
    assert isinstance(running, Running)
    assert torch.equal(running.fake_keys(x), KeyValue(format="fp8", scale=0.5).fake(x))
    assert torch.equal(running.fake_values(x), KeyValue(format="fp8", scale=0.125).fake(x))
    found = block.with_weights({}, quant.running)(hidden)
    other = replace(block, cache_scales=CacheScales(key=0.125, value=0.5))
    assert not torch.equal(found, other.with_weights({}, quant.running)(hidden))
    made = BlockResult({}, cache_scales=block.cache_scales)
    assert torch.equal(found, other.with_result(made, quant.running)(hidden)), "those of a result come first"
    assert kv.suffix == "-kv-fp8-calibrated"
    assert "one for keys and one for values in each block" in kv.words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quant.kv.scale=calibrated"], "scale=calibrated: only FP8 numbers have a fixed scale; use format=fp8"),
        (["quant.kv.bits=8", "quant.kv.scale=calibrated"], "scale=calibrated: only FP8 numbers have a fixed scale"),
        (["quant.kv.format=mxfp8", "quant.kv.scale=calibrated"], "scale=calibrated: only FP8 numbers"),
        (["quant.kv.format=fp8", "quant.kv.scale=calibrated", "quant.kv.per=channel"], "format=fp8: shares ranges"),
        (
            ["quant.kv.format=fp8", "quant.kv.scale=calibrated", "calib=none", "method=rtn"],
            "calib.corpus=null: quant.kv.scale=calibrated needs calibration tokens; choose calib=bundled",
        ),
        (
            ["quant.kv.format=fp8", "quant.kv.scale=largest"],
            "quant.kv.scale=largest: is no scale; expected: a fixed scale",
        ),
        (["quant.kv.format=fp8", "quant.kv.scale=-1"], "quant.kv.scale=-1: a scale lies above 0"),
        (["quant.kv.scale=1"], "scale=1: only FP8 numbers have a fixed scale"),
        (["quant.kv.bits=8", "quant.kv.scale=1"], "scale=1: only FP8 numbers have a fixed scale"),
        (["quant.kv.format=mxfp8", "quant.kv.scale=2"], "scale=2: only FP8 numbers have a fixed scale"),
        (
            ["quant.kv.format=fp8", "quant.kv.scale=0"],
            r"quant\.kv\.scale=0: a scale lies above 0; expected: a fixed scale",
        ),
        (["quant.kv.format=fp8", "quant.kv.per=channel"], "format=fp8: shares ranges in its own way"),
        (["quant.kv.format=fp8", "quant.kv.symmetric=true"], "format=fp8: shares ranges in its own way"),
        (["quant.kv.group=32"], r"quant\.kv\.group=32: applies to keys and values with bits of their own; set"),
        (["quant.kv.symmetric=true"], r"quant\.kv\.symmetric=true: applies to keys and values with bits of their own"),
        (["quant.kv.bits=4", "quant.kv.clip=0"], "quant.kv.clip=0: .*expected: share of each range that is kept"),
        (["quant.kv.bits=4", "quant.kv.clip=1.5"], "quant.kv.clip=1.5: .*expected: share of each range that is kept"),
        (["quant.kv.bits=16", "quant.kv.clip=0.9"], "clip=0.9: bits=16 leaves keys and values in float"),
        (["quant.kv.format=fp8", "quant.kv.clip=0.9"], "clip=0.9: format=fp8 says its own ranges"),
        (["quant=w4a4", "quant.kv.clip=0.9", "quant.kv.group=4"], r"quant\.kv\.group=4: applies to keys"),
        (["quant.kv.clip=0.9"], "quant.kv.clip=0.9: quant.activation rounds keys and values to no integers per token"),
        (["quant=w4a4", "quant.kv.clip=0.9", "quant.activation.attention=false"], "rounds keys and values to no"),
        (["quant=w4a4", "quant.kv.clip=0.9", "quant.activation.per=tensor"], "to no integers per token; set quant"),
        (["quant=w4a8-mxint", "quant.kv.clip=0.9"], "quant.kv.clip=0.9: quant.activation rounds keys and values to no"),
        (["quant.kv.bits=16", "quant.kv.group=32"], "quant.kv.group=32: bits=16 leaves keys and values in float"),
        (["quant.kv.format=fp8t"], "format=fp8t: one scale for all tokens would depend on tokens that come later"),
        (["quant.kv.bits=12"], "quant.kv.*bits=12: nothing lies between 8 and 16"),
        (["quant.kv.per=channel"], r"quant\.kv\.per=channel: applies to keys and values with bits of their own; set"),
        (["quant.kv.bits=4", "quant.kv.per=channel"], "group=null: a channel's range is shared by a number of tokens"),
        (["quant.kv.bits=4", "quant.kv.format=w4a4"], "format=w4a4: says its own bits"),
        (["quant.kv.format=nothing"], "format=nothing: no file of conf/quant/ is called so"),
        (["quant.kv.format=w4a16"], "format=w4a16: leaves activations in float"),
    ],
)
def test_settings_that_mean_nothing_are_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(compose_run(*overrides))
