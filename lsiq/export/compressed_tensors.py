"""compressed-tensors: the layout of llm-compressor, read by transformers and vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.errors import ConfigError
from lsiq.export import float_layouts
from lsiq.export.base import Destination, Loader, integers, refuse_float
from lsiq.export.compressed_reading import read_back
from lsiq.formats.activation import Activation
from lsiq.formats.cache_scales import CacheScales
from lsiq.formats.key_value import FLOAT
from lsiq.formats.mixed import EMBEDDING, HEAD
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.export.source import Source
    from lsiq.formats.base import ActivationFormat, WeightFormat
    from lsiq.formats.quant import QuantSettings
    from lsiq.formats.tensor import QuantizedTensor
    from lsiq.models.result import BlockResult


_NAME = "export=compressed-tensors"
_NO_EMBEDDINGS = (
    "and transformers builds no model whose embeddings are packed; use export=gguf or plain, or leave that rule out"
)
_Formats = tuple["WeightFormat", "ActivationFormat"]  # of a linear's weight and of its inputs


@settings
class CompressedTensors(Destination):
    """`pack-quantized` for float activations, `int-quantized` for 8-bit weights and activations, and those of floats.

    pack-quantized, per linear: `weight_packed (out, ceil(in · bits / 32))` int32, codes packed along the inputs;
    `weight_scale (out, groups)`; `weight_shape (2,)`; asymmetric, `weight_zero_point (ceil(out · bits / 32), groups)`
    int32, packed along the outputs. int-quantized: `weight (out, in)` int8, `weight_scale (out, 1)`, asymmetric
    `weight_zero_point (out, 1)` int8; activations are quantised while the model runs, one range per token.

    The layout counts codes and zero points from `-2^(bits-1)` and packs them with that added: the numbers of
    `QuantizedTensor`, which count from 0, are what is packed. Floating-point weights: `lsiq.export.float_layouts`.
    Keys and values in FP8: `kv_cache_scheme`, and `k_scale` and `v_scale (1,)` float32 in every attention. A rounded
    head is a linear like others, but for what enters it, which stays in float; one that is the embeddings is refused.
    """

    @property
    def name(self) -> str:
        return "compressed-tensors"

    @property
    def usage(self) -> str:
        return (
            "from transformers import AutoModelForCausalLM, CompressedTensorsConfig\n"
            "model = AutoModelForCausalLM.from_pretrained(\n"
            "    FOLDER, quantization_config=CompressedTensorsConfig(dequantize=True)\n"
            ")"
        )

    @property
    def loaders(self) -> tuple[Loader, ...]:
        return (Loader(("transformers", "compressed-tensors"), read_back),)

    def check(self, quant: QuantSettings) -> None:
        refuse_float(quant, "export=compressed-tensors")
        _check_cache(quant)
        if EMBEDDING in quant.outside():
            raise ValueError(f"{_NAME}: quant.rules round {EMBEDDING}, {_NO_EMBEDDINGS}")
        beside = ", FP8 (e4m3), MXFP4, MXFP6 (e2m3), MXFP8 (e4m3) and NVFP4 in their usual blocks"
        activation, weights = quant.activation, []
        for fmt in quant.outside().values():
            if float_layouts.layout(fmt, FLOAT) is None:
                integers(fmt, _NAME, beside)
        for fmt in (fmt for fmt in quant.in_blocks if fmt.bits < 16):
            if float_layouts.layout(fmt, activation) is None:
                weights.append(integers(fmt, _NAME, beside))
            else:
                float_layouts.check_activation(fmt, activation)
        if not activation.active or not weights:
            return
        if activation.bits != 8 or any(weight.bits != 8 or weight.group is not None for weight in weights):
            raise ValueError(
                "export=compressed-tensors holds quantised activations with 8-bit weights per channel and 8-bit "
                f"activations only, not quant={quant.name}; use quant=w8a8"
            )
        if activation.attention or activation.softmax:
            raise ValueError(
                "export=compressed-tensors quantises the inputs of linears, not queries, keys, values or attention "
                "weights; quantise with quant.activation.attention=false quant.activation.softmax=false"
            )
        if not isinstance(activation, Activation) or activation.per != "token" or activation.symmetric:
            raise ValueError(
                "export=compressed-tensors: its loaders round symmetric activations with another step and a whole "
                "tensor over another batch; quantise with quant.activation.per=token quant.activation.symmetric=false"
            )
        if activation.clip < 1:
            raise ValueError(
                f"quant.activation.clip={activation.clip:g}: loaders of export=compressed-tensors take each token's "
                "full range; quantise with quant.activation.clip=1"
            )

    def check_model(self, source: Source) -> None:
        from lsiq.models.outside import is_tied

        self.check(source.quant)  # whose formats are known by now; transformers reads its own architectures
        if HEAD in source.quant.outside() and is_tied(source.model):
            raise ConfigError(f"{_NAME}: {HEAD} of this model is its embeddings, {_NO_EMBEDDINGS}")

    def stored(self, result: BlockResult) -> dict[str, Tensor]:
        from lsiq.export.source import decoded

        return {
            name: float_layouts.as_read(tensor) if name in result.weights and _halved(result.weights[name]) else tensor
            for name, tensor in decoded(result).items()
        }

    def write(self, source: Source, folder: Path) -> None:
        from lsiq.export.shards import copy_companions, write_json, write_packed

        pack, pack_outside = _layout(source.quant, source.quant.activation), _layout(source.quant, FLOAT)
        write_packed(source, folder, pack, lambda result: _cache_scales(source, result), pack_outside)
        write_json(folder / "config.json", {**source.config, "quantization_config": _config(source)})
        copy_companions(source, folder)


def _layout(quant: QuantSettings, activation: ActivationFormat) -> Callable[[QuantizedTensor], dict[str, Tensor]]:
    """Return what lays out the weight of a linear whose inputs are put into a format."""
    of_integers = _integers if activation.active else _packed

    def parts(weight: QuantizedTensor) -> dict[str, Tensor]:
        if float_layouts.layout(weight.format, activation) is None:
            return of_integers(weight)
        return {**float_layouts.weight_parts(weight), **float_layouts.input_parts(activation)}

    return parts


def _halved(weight: QuantizedTensor) -> bool:
    """Whether the library hands the weight out in bfloat16 although that does not hold it."""
    return weight.format.family == "nvfp"


def _packed(weight: QuantizedTensor) -> dict[str, Tensor]:
    import torch

    from lsiq.export.packing import pack

    bits = weight.format.bits
    parts = {
        "weight_packed": pack(weight.codes, bits),
        "weight_scale": _scale(weight),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not integers(weight.format, _NAME).symmetric:
        parts["weight_zero_point"] = pack(weight.zero.squeeze(-1).T, bits).T
    return parts


def _integers(weight: QuantizedTensor) -> dict[str, Tensor]:
    import torch

    middle = 2 ** (weight.format.bits - 1)
    parts = {"weight": (weight.codes.to(torch.int16) - middle).to(torch.int8), "weight_scale": _scale(weight)}
    if not integers(weight.format, _NAME).symmetric:
        parts["weight_zero_point"] = (weight.zero.squeeze(-1) - middle).to(torch.int8)
    return parts


def _scale(weight: QuantizedTensor) -> Tensor:
    scale = weight.scale.squeeze(-1)
    return scale.half() if integers(weight.format, _NAME).scale == "float16" else scale


def _check_cache(quant: QuantSettings) -> None:
    kv = quant.kv
    if kv.rounds and (kv.fixed is None or kv.fixed.element != "e4m3"):
        raise ValueError(
            f"{_NAME} states keys and values in FP8 (e4m3) under a fixed scale, not those of quant={quant.name}, whose "
            "ranges no loader finds token by token; use quant.kv.bits=null quant.kv.format=fp8 and quant.kv.scale="
            "calibrated or 1"
        )


def _cache_scales(source: Source, result: BlockResult) -> dict[str, Tensor]:
    """Return what a block has of the cache: the scales of keys and values, by their names in its attention."""
    scale = source.quant.kv.scale
    if scale is None:
        return {}
    scales = CacheScales(scale, scale) if isinstance(scale, float) else result.cache_scales
    assert scales is not None  # the block loop stores them with each block
    (attention,) = {name.rpartition(".")[0] for name in source.shapes if "attn" in name}
    return {f"{attention}.{letter}_scale": part for letter, part in zip("kv", scales.tensor().split(1), strict=True)}


def _config(source: Source) -> dict[str, Any]:
    """Return the settings that loaders read: one group for all linears, or one for each format.

    Where groups have different layouts each names its own.
    """
    by_formats, floats = _targets(source)
    layouts = {formats: _layout_name(*formats) for formats in by_formats}
    one_layout = len(set(layouts.values())) == 1
    groups = {
        f"group_{number}": {
            "targets": targets,
            "weights": _weights(*formats),
            "input_activations": _inputs(formats[1]),
            **({} if one_layout else {"format": layouts[formats]}),
        }
        for number, (formats, targets) in enumerate(by_formats.items())
    }
    return _described(source, layouts.popitem()[1] if one_layout else "mixed-precision", groups, floats)


def _layout_name(weight: WeightFormat, activation: ActivationFormat) -> str:
    of_integers = "int-quantized" if activation.active else "pack-quantized"
    return float_layouts.layout(weight, activation) or of_integers


def _inputs(activation: ActivationFormat) -> dict[str, Any] | None:
    if not isinstance(activation, Activation) or not activation.active:
        return float_layouts.inputs_config(activation)
    return {
        "num_bits": activation.bits,
        "type": "int",
        "symmetric": activation.symmetric,
        "strategy": "token",
        "dynamic": True,
    }


def _described(source: Source, layout: str, groups: dict[str, Any], floats: list[str]) -> dict[str, Any]:
    cache = {"kv_cache_scheme": _CACHE} if source.quant.kv.rounds else {}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": [*source.float_linears, *floats],
        "config_groups": groups,
        **cache,
    }


def _targets(source: Source) -> tuple[dict[_Formats, list[str]], list[str]]:
    """Return, by the formats of weights and inputs, the linears that have them, and those in blocks that stay in float.

    Where all are alike they are named by their class. What enters the head stays in float.
    """
    from lsiq.models.outside import outside_names

    linears: dict[_Formats, list[str]] = {}
    for index in range(source.model.depth):
        block_formats = source.quant.in_block(index)
        for name in source.shapes:
            formats = (block_formats.of(name), source.quant.activation)
            linears.setdefault(formats, []).append(source.prefix(index) + name)
    for name, fmt in outside_names(source.model, source.quant.outside()).items():
        linears.setdefault((fmt, FLOAT), []).append(name.removesuffix(".weight"))
    floats = [name for (fmt, _), names in linears.items() if fmt.bits == 16 for name in names]
    rounded = {formats: names for formats, names in linears.items() if formats[0].bits < 16}
    return ({formats: ["Linear"] for formats in rounded} if len(rounded) == 1 else rounded), floats


def _weights(fmt: WeightFormat, activation: ActivationFormat) -> dict[str, Any]:
    if float_layouts.layout(fmt, activation) is not None:
        return float_layouts.weights_config(fmt)
    weight = integers(fmt, _NAME)
    return {
        "num_bits": weight.bits,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": "channel" if weight.group is None else "group",
        "group_size": weight.group,
        "dynamic": False,
    }


# What stands for FP8 keys and values whose scales, one for each block, are in the checkpoint.
_CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
