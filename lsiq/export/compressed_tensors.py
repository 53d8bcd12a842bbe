"""compressed-tensors: the layout of llm-compressor, read by transformers and vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.export import float_layouts
from lsiq.export.base import Destination, Loader, Logits, integers, refuse_float
from lsiq.formats.activation import Activation
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.export.source import Source
    from lsiq.formats.quant import QuantSettings
    from lsiq.formats.tensor import QuantizedTensor
    from lsiq.models.result import BlockResult


_NAME = "export=compressed-tensors"


@settings
class CompressedTensors(Destination):
    """`pack-quantized` for float activations, `int-quantized` for 8-bit weights and activations, and those of floats.

    pack-quantized, per linear: `weight_packed (out, ceil(in · bits / 32))` int32, codes packed along the inputs;
    `weight_scale (out, groups)`; `weight_shape (2,)`; asymmetric, `weight_zero_point (ceil(out · bits / 32), groups)`
    int32, packed along the outputs. int-quantized: `weight (out, in)` int8, `weight_scale (out, 1)`, asymmetric
    `weight_zero_point (out, 1)` int8; activations are quantised while the model runs, one range per token.

    The layout counts codes and zero points from `-2^(bits-1)` and packs them with that added: the numbers of
    `QuantizedTensor`, which count from 0, are what is packed. Floating-point weights: `lsiq.export.float_layouts`.
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
        return (Loader(("transformers", "compressed-tensors"), _load),)

    def check(self, quant: QuantSettings) -> None:
        refuse_float(quant, "export=compressed-tensors")
        if float_layouts.layout(quant) is not None:
            float_layouts.check_activation(quant)
            return
        beside = ", FP8 (e4m3), MXFP4, MXFP6 (e2m3), MXFP8 (e4m3) and NVFP4 in their usual blocks"
        activation, weight = quant.activation, integers(quant.weight, _NAME, beside)
        if not activation.active:
            return
        if activation.bits != 8 or weight.bits != 8 or weight.group is not None:
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

    def check_model(self, source: Source) -> None:
        del source  # transformers reads its own architectures

    def stored(self, result: BlockResult) -> dict[str, Tensor]:
        from lsiq.export.source import decoded

        return {
            name: float_layouts.as_read(tensor) if name in result.weights and _halved(result.weights[name]) else tensor
            for name, tensor in decoded(result).items()
        }

    def write(self, source: Source, folder: Path) -> None:
        from lsiq.export.shards import copy_companions, write_json, write_packed

        write_packed(source, folder, _layout(source.quant))
        write_json(folder / "config.json", {**source.config, "quantization_config": _config(source)})
        copy_companions(source, folder)


def _layout(quant: QuantSettings) -> Callable[[QuantizedTensor], dict[str, Tensor]]:
    """Return what lays out a linear's weight."""
    if float_layouts.layout(quant) is not None:
        return lambda weight: {**float_layouts.weight_parts(weight), **float_layouts.input_parts(quant)}
    return _integers if quant.activation.active else _packed


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


def _config(source: Source) -> dict[str, Any]:
    if (layout := float_layouts.layout(source.quant)) is not None:
        inputs = float_layouts.inputs_config(source.quant.activation)
        return _described(source, layout, float_layouts.weights_config(source.quant.weight), inputs)
    weight, activation = integers(source.quant.weight, _NAME), source.quant.activation
    weights = {
        "num_bits": weight.bits,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": "channel" if weight.group is None else "group",
        "group_size": weight.group,
        "dynamic": False,
    }
    inputs = None
    if isinstance(activation, Activation) and activation.active:
        inputs = {
            "num_bits": activation.bits,
            "type": "int",
            "symmetric": activation.symmetric,
            "strategy": "token",
            "dynamic": True,
        }
    return _described(source, "int-quantized" if activation.active else "pack-quantized", weights, inputs)


def _described(source: Source, layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": source.float_linears,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }


def _load(folder: Path) -> Logits:
    """The loader of transformers, through compressed-tensors; activations stay in float.

    It reads a copy with float32 scales: the library multiplies in the dtype of the scale, and half precision would
    round the products, which is right for a deployed model and hides what is to be compared here.
    """
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    from lsiq.export.verify import as_logits

    dequantize = CompressedTensorsConfig(dequantize=True)  # transformers 5.23 fails on asymmetric weights without it
    with tempfile.TemporaryDirectory(dir=folder.parent) as wide:
        _widen_scales(folder, Path(wide))
        return as_logits(
            AutoModelForCausalLM.from_pretrained(
                wide, dtype=torch.float32, quantization_config=dequantize, local_files_only=True
            )
        )


def _widen_scales(folder: Path, copy: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.json"):
        shutil.copyfile(file, copy / file.name)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        wide = {
            name: tensor.float() if tensor.dtype == torch.float16 and name.endswith("_scale") else tensor
            for name, tensor in tensors.items()
            if not name.endswith("input_global_scale")  # of activations, which stay in float here
        }
        save_file(wide, copy / file.name, metadata={"format": "pt"})
