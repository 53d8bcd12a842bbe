"""What every export format must keep; a new file under conf/export/ is tested here for free.

Whole runs that export are in tests/runs/test_export.py.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import EXPORTERS, exporter_of, refusal, source_of
from helpers.marks import slow_but
from helpers.models import SHAPES, load_small, model_settings

from lsiq.data.tokens import random_windows
from lsiq.export.base import TOLERANCE, Exporter, installed
from lsiq.export.source import Source
from lsiq.export.verify import verify
from lsiq.formats.activation import Activation
from lsiq.formats.fp8 import FP8, FP8Activation
from lsiq.formats.integer import Integer
from lsiq.formats.key_value import KeyValue, Running, under_scales
from lsiq.formats.mxfp import MXFP, MXFPActivation
from lsiq.formats.mxint import MXActivation, MXInt
from lsiq.formats.nvfp4 import NVFP4, NVFP4Activation
from lsiq.formats.placed import place
from lsiq.formats.quant import QuantSettings
from lsiq.settings import fill

FLOAT = Activation()
LINEARS_ONLY = Activation(bits=8, attention=False)
# Numbers that some layout holds and another one does not.
QUANTS = {
    "float": QuantSettings(weight=Integer(bits=16), activation=FLOAT),
    "w2g32": QuantSettings(weight=Integer(bits=2, group=32, scale="float16"), activation=FLOAT),
    "w3": QuantSettings(weight=Integer(bits=3, scale="float16"), activation=FLOAT),
    "w4g32-sym": QuantSettings(weight=Integer(bits=4, group=32, symmetric=True, scale="float16"), activation=FLOAT),
    "w4g16": QuantSettings(weight=Integer(bits=4, group=16, scale="float16"), activation=FLOAT),
    "w5g32": QuantSettings(weight=Integer(bits=5, group=32, scale="float16"), activation=FLOAT),
    "w8g32": QuantSettings(weight=Integer(bits=8, group=32, scale="float16"), activation=FLOAT),
    "w8g32-sym": QuantSettings(weight=Integer(bits=8, group=32, symmetric=True, scale="float16"), activation=FLOAT),
    "wide-scales": QuantSettings(weight=Integer(bits=4, group=32), activation=FLOAT),
    "w8a8": QuantSettings(weight=Integer(bits=8, scale="float16"), activation=LINEARS_ONLY),
    "w8a8-attention": QuantSettings(weight=Integer(bits=8, scale="float16"), activation=Activation(bits=8)),
    "w4a4": QuantSettings(weight=Integer(bits=4, scale="float16"), activation=Activation(bits=4, attention=False)),
    "kv8": QuantSettings(weight=Integer(bits=4, group=32, scale="float16"), activation=FLOAT, kv=KeyValue(bits=8)),
    "kv8-groups": QuantSettings(
        weight=Integer(bits=4, group=32, scale="float16"), activation=FLOAT, kv=KeyValue(bits=8, group=8)
    ),
    "kv-fp8": QuantSettings(
        weight=Integer(bits=4, group=32, scale="float16"), activation=FLOAT, kv=KeyValue(format="fp8", scale=0.5)
    ),
    "kv-fp8-calibrated": QuantSettings(
        weight=Integer(bits=4, group=32, scale="float16"),
        activation=FLOAT,
        kv=KeyValue(format="fp8", scale="calibrated"),
    ),
    "kv-fp8-found": QuantSettings(
        weight=Integer(bits=4, group=32, scale="float16"), activation=FLOAT, kv=KeyValue(format="fp8")
    ),
    "blocks": QuantSettings(weight=MXInt(bits=4), activation=FLOAT),
    "blocks-a8": QuantSettings(weight=MXInt(bits=4), activation=MXActivation(bits=8, attention=False)),
    "fp8": QuantSettings(weight=FP8(), activation=FLOAT),
    "fp8-a8": QuantSettings(weight=FP8(per="tensor"), activation=FP8Activation()),
    "fp8-e5m2": QuantSettings(weight=FP8(element="e5m2"), activation=FLOAT),
    "mxfp4": QuantSettings(weight=MXFP(element="e2m1"), activation=FLOAT),
    "mxfp4-a8": QuantSettings(weight=MXFP(element="e2m1"), activation=MXFPActivation(element="e4m3")),
    "mxfp4-int8": QuantSettings(weight=MXFP(element="e2m1"), activation=LINEARS_ONLY),
    "mxfp6": QuantSettings(weight=MXFP(element="e2m3"), activation=MXFPActivation(element="e2m3")),
    "mxfp6-e3m2": QuantSettings(weight=MXFP(element="e3m2"), activation=FLOAT),
    "mxfp8-floor": QuantSettings(weight=MXFP(element="e4m3"), activation=MXFPActivation(element="e4m3", rule="floor")),
    "mxfp8": QuantSettings(weight=MXFP(element="e4m3"), activation=MXFPActivation(element="e4m3")),
    "nvfp4": QuantSettings(weight=NVFP4(), activation=FLOAT),
    "nvfp4-a4": QuantSettings(weight=NVFP4(), activation=NVFP4Activation(above=1.0)),
    "nvfp4-token": QuantSettings(weight=NVFP4(), activation=NVFP4Activation()),
}
FLOATS = {"fp8", "fp8-a8", "mxfp4", "mxfp4-a8", "mxfp6", "mxfp8", "nvfp4", "nvfp4-a4"}
# What each layout holds, and nothing else of the above; other layouts say for themselves what they hold.
HELD = {
    "compressed-tensors": {"w2g32", "w3", "w4g32-sym", "w4g16", "w5g32", "w8g32", "w8g32-sym", "wide-scales", "w8a8"}
    | {"kv-fp8", "kv-fp8-calibrated", *FLOATS},
    "gguf": {"w2g32", "w3", "w4g32-sym", "w5g32", "w8g32-sym", "mxfp4"},
    "gptq": {"w2g32", "w3", "w4g32-sym", "w8g32", "w8g32-sym"},
    "plain": {
        name for name, quant in QUANTS.items() if not (quant.activation.active or quant.kv.rounds or name == "float")
    },
}


@functools.cache
def rounded_source(quant: str, checkpoint: Path) -> Source:
    """Of each of `QUANTS`, made once for all exporters, which only read it."""
    return source_of(QUANTS[quant], checkpoint)


@pytest.mark.parametrize("name", EXPORTERS)
def test_is_an_exporter(name: str) -> None:
    exporter = exporter_of(name)
    assert isinstance(exporter, Exporter)
    assert exporter.name == name
    assert exporter.usage
    assert exporter.verify
    assert exporter.loaders
    assert (exporter.folder, exporter.push) == (None, None)


BOTH = {"compressed-tensors", "gguf"}
# Formats of their own for some linears, by the layouts that hold them.
MIXED = {
    "integers": ([("*_proj", "0", "w4g32-sym"), ("self_attn.k_proj", None, "w3g32")], {"compressed-tensors", "gguf"}),
    "symmetric": ([("*", None, "w4g32-sym"), ("mlp.*", "1", "w8-sym")], {"compressed-tensors", "gguf"}),
    "some in float": ([("self_attn.*", "-1", "float"), ("self_attn.v_proj", "0", "w8")], {"compressed-tensors"}),
    "a float block": ([("*", "0", "float")], {"compressed-tensors", "gguf"}),
    "floating point": (
        [("*", None, "nvfp4"), ("mlp.down_proj", "0", "fp8"), ("self_attn.v_proj", None, "mxfp8")],
        {"compressed-tensors"},
    ),
    "floating point beside symmetric integers": ([("*", None, "w4g32-sym"), ("mlp.*", None, "mxfp4")], BOTH),
    "floating point beside integers": ([("mlp.*", None, "mxfp4"), ("mlp.up_proj", "1", "w8-sym")], BOTH),
}


@functools.cache
def mixed_source(rules: str, checkpoint: Path) -> Source:
    """Of each of `MIXED`, made once for all exporters, which only read it."""
    quant = fill(
        QuantSettings,
        {
            "weight": Integer(bits=2, group=32, scale="float16"),
            "activation": FLOAT,
            "rules": [{"match": match, "blocks": blocks, "format": fmt} for match, blocks, fmt in MIXED[rules][0]],
        },
    )
    model = load_small(checkpoint)
    return source_of(place(quant, model.depth, model.spec.linears, "llama"), checkpoint)


@pytest.mark.parametrize("rules", MIXED)
@pytest.mark.parametrize("name", EXPORTERS)
def test_linears_with_formats_of_their_own_read_back(
    name: str, rules: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    held = MIXED[rules][-1]
    exporter, source = exporter_of(name), mixed_source(rules, checkpoints["llama"])
    refused = refusal(exporter, source)
    assert (refused is None) == (name in {*held, "plain"})
    if refused is not None:
        return
    exporter.write(source, tmp_path)
    (found,) = verify(exporter, source, model_settings(checkpoints["llama"]), 0, tmp_path)
    assert found["status"] == "read"
    assert found["difference"] <= TOLERANCE / 100  # measured: 0.0


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", slow_but(["llama"], sorted(SHAPES)))
@pytest.mark.parametrize("name", EXPORTERS)
def test_what_is_not_refused_at_once_reads_back(
    name: str, family: str, quant: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    exporter, source = exporter_of(name), rounded_source(quant, checkpoints[family])
    refused = refusal(exporter, source)
    if name in HELD:
        assert (refused is None) == (quant in HELD[name] and (name, family) != ("gguf", "opt"))
    if refused is not None:
        assert "\n" not in refused
        assert name in refused
        assert re.search(r"[;,] .*\b(use|choose|quantise|let|with)\b", refused), refused  # the way out
        return
    exporter.write(source, tmp_path)
    assert any(tmp_path.iterdir())
    found = verify(exporter, source, model_settings(checkpoints[family]), 0, tmp_path)
    for loader, entry in zip(exporter.loaders, found, strict=True):
        if None in installed(loader.packages).values():
            pytest.skip(entry["reason"])
        assert entry["status"] == "read"
        assert entry["difference"] <= TOLERANCE / 100  # measured: 0.0
        halved = name == "compressed-tensors" and quant.startswith("nvfp4")  # which its loader reads in bfloat16
        assert halved == (entry["rounding"] > 0)
        assert entry["rounding"] < 0.1  # measured: at most 0.021
        assert entry["largest_logit"] > 1


@pytest.mark.parametrize("family", sorted(SHAPES))
@pytest.mark.parametrize("quant", ["kv-fp8", "kv-fp8-calibrated"])
def test_the_scheme_of_the_cache_does_to_keys_and_values_what_the_run_did(
    quant: str, family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """vLLM takes FP8 alone, one scale for a tensor, and reads it under these names."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from safetensors.torch import load_file

    source = rounded_source(quant, checkpoints[family])
    exporter_of("compressed-tensors").write(source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    scheme = QuantizationArgs(**config["kv_cache_scheme"])
    assert (scheme.num_bits, str(scheme.type), str(scheme.strategy), scheme.dynamic) == (8, "float", "tensor", False)
    tensors = load_file(tmp_path / "model.safetensors")
    prefixes = [f"{source.prefix(index)}self_attn" for index in range(source.model.depth)]
    names = {f"{prefix}.{letter}_scale" for prefix in prefixes for letter in "kv"}
    assert {name for name in tensors if name.endswith(("k_scale", "v_scale"))} == names
    keys = torch.randn(2, 3, 5, 16) * torch.tensor([1, 30, 0.01, 4, 500.0])[:, None]
    for index, prefix in enumerate(prefixes):
        running = under_scales(source.quant.running, source.store.read(index).cache_scales)
        assert isinstance(running, Running)
        for letter, fake in {"k": running.fake_keys, "v": running.fake_values}.items():
            scale = tensors[f"{prefix}.{letter}_scale"]
            assert (scale.dtype, scale.shape) == (torch.float32, (1,))
            assert torch.equal(fake_quantize(keys, scale, torch.zeros(1), scheme), fake(keys))


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_transformers_with_that_cache_finds_the_logits_of_the_run(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The cache is one that rounds what is appended as compressed-tensors says, by the scales in the checkpoint.

    transformers 5.24 does not put it in place itself: compressed-tensors 0.20.1 knows attention by an argument of its
    that has another name there.
    """
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, DynamicCache

    weight = Integer(bits=4, group=32)  # whose scales are not float16, in which the library would multiply
    source = source_of(replace(QUANTS["kv-fp8-calibrated"], weight=weight), checkpoints[family])
    exporter_of("compressed-tensors").write(source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    scheme, tensors = QuantizationArgs(**config["kv_cache_scheme"]), load_file(tmp_path / "model.safetensors")

    class Served(DynamicCache):
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            scales = [tensors[f"{source.prefix(layer_idx)}self_attn.{letter}_scale"] for letter in "kv"]
            states = (key_states, value_states)
            kept = [fake_quantize(x, s, torch.zeros(1), scheme) for x, s in zip(states, scales, strict=True)]
            return super().update(*kept, layer_idx, *args, **kwargs)

    tokens = random_windows(source.model.config.vocab_size, 2, 40, 3)
    dequantize = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=dequantize)
    with torch.no_grad():
        served, plain = (loaded.eval()(tokens, past_key_values=cache()).logits for cache in (Served, DynamicCache))
        hidden, kwargs = source.model.embed(tokens, 2)
        for index in range(source.model.depth):
            block = source.model.block(index, kwargs)
            hidden = block.with_result(source.store.read(index), source.quant.running)(hidden)
        found = source.model.logits(hidden)
    assert (served - found).abs().max() < 1e-5  # measured: 0.0
    assert (plain - found).abs().max() > 0.05


@pytest.mark.parametrize("family", sorted(SHAPES))
@pytest.mark.parametrize("name", EXPORTERS)
def test_stored_are_the_weights_of_the_run(name: str, family: str, checkpoints: dict[str, Path]) -> None:
    source = rounded_source("w4g32-sym", checkpoints[family])
    result = source.block(0)
    stored = exporter_of(name).stored(result)
    assert set(stored) == {*result.weights, *result.floats}
    for weight_name, weight in result.weights.items():
        assert torch.equal(stored[weight_name].float(), weight.decode()), weight_name
