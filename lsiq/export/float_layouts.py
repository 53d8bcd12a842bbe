"""How compressed-tensors lays out floating-point weights, and what it says of them and of activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lsiq.formats.base import ActivationFormat, WeightFormat
from lsiq.formats.fp8 import FP8, FP8Activation
from lsiq.formats.mxfp import BLOCK, MXFP, MXFPActivation
from lsiq.formats.nvfp4 import BLOCK as NVFP4_BLOCK
from lsiq.formats.nvfp4 import NVFP4, NVFP4Activation

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.formats.tensor import QuantizedTensor


_NAME = "export=compressed-tensors"
_MX = {"e2m1": "mxfp4-pack-quantized", "e2m3": "mxfp6-pack-quantized", "e4m3": "mxfp8-quantized"}


def layout(weight: WeightFormat, activation: ActivationFormat) -> str | None:
    """Return the library's name of the layout, or None where it has none for these weights.

    e5m2 and e3m2 it does not have, and blocks only of the usual width.
    """
    if isinstance(weight, FP8) and weight.element == "e4m3":
        return "float-quantized" if activation.active else "naive-quantized"
    if isinstance(weight, MXFP) and weight.block == BLOCK:
        return _MX.get(weight.element)
    if isinstance(weight, NVFP4) and weight.block == NVFP4_BLOCK:
        return "nvfp4-pack-quantized"
    return None


def check_activation(weight: WeightFormat, activation: ActivationFormat) -> None:
    """Raise ValueError where the activations are not what the library's models round to beside such weights."""
    if not activation.active:
        return
    if activation.attention or activation.softmax:
        raise ValueError(
            f"{_NAME} quantises the inputs of linears, not queries, keys, values or attention weights; quantise with "
            "quant.activation.attention=false quant.activation.softmax=false"
        )
    if isinstance(activation, NVFP4Activation) and isinstance(activation.above, str):
        raise ValueError(
            f"{_NAME}: a checkpoint holds the float32 scale of activations as a number, not "
            f"quant.activation.above={activation.above}; quantise with quant.activation.above=NUMBER, such as 1"
        )
    if _activation(activation) is None or activation.family != weight.family:
        raise ValueError(
            f"{_NAME} has no activations of {activation.words} beside weights of {weight.words}; use quant=fp8, "
            "mxfp4, mxfp4a8, mxfp8, nvfp4 or float activations"
        )


def weight_parts(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of a linear by the names that the library gives them.

    The 4-bit layouts pack two codes in a byte, the earlier in the low half, the 6-bit one four in three bytes; 8-bit
    codes stand as float8 numbers. Scales are float32 (FP8), biased exponents (MX), or float8 with `weight_global_scale`
    dividing them (NVFP4).
    """
    import torch

    fmt, codes, scale = weight.format, weight.codes, weight.scale.squeeze(-1)
    packed = {"weight": codes.view(torch.float8_e4m3fn)} if fmt.bits == 8 else {"weight_packed": _pack(codes, fmt.bits)}
    if isinstance(fmt, NVFP4):
        from lsiq.formats.nvfp4 import split_scale

        block, shared = split_scale(scale)
        block = block.to(torch.float8_e4m3fn)
        return {**packed, "weight_scale": block, "weight_global_scale": shared.reshape(1)}
    if isinstance(fmt, MXFP):
        return {**packed, "weight_scale": (scale.view(torch.int32) >> 23).to(torch.uint8)}
    return {**packed, "weight_scale": scale if getattr(fmt, "per", "") == "channel" else scale[:1, 0]}


def input_parts(activation: ActivationFormat) -> dict[str, Tensor]:
    """Return what a linear's inputs need beside: the float32 scale above their 8-bit ones."""
    import torch

    if isinstance(activation, NVFP4Activation) and not isinstance(activation.above, str):
        return {"input_global_scale": torch.tensor([activation.above], dtype=torch.float32)}
    return {}


def as_read(weight: Tensor) -> Tensor:
    """Return a weight of NVFP4 as the library reads it: it multiplies in float32 and hands out bfloat16."""
    return weight.bfloat16().float()


def weights_config(fmt: WeightFormat) -> dict[str, Any]:
    """Return the library's description of the weights."""
    common = {"num_bits": fmt.bits, "type": "float", "symmetric": True, "dynamic": False}
    if isinstance(fmt, FP8):
        return {**common, "strategy": fmt.per}
    return {**common, **_groups(fmt)}


def inputs_config(activation: ActivationFormat) -> dict[str, Any] | None:
    """Return the library's description of the inputs of linears; None for float ones."""
    return _activation(activation) if activation.active else None


def _activation(activation: ActivationFormat) -> dict[str, Any] | None:
    common = {"num_bits": activation.bits, "type": "float", "symmetric": True, "dynamic": True}
    if isinstance(activation, FP8Activation) and (activation.element, activation.per) == ("e4m3", "token"):
        return {**common, "strategy": "token"}
    if isinstance(activation, MXFPActivation) and activation.element in _MX:
        return {**common, **_groups(activation)} if (activation.block, activation.rule) == (BLOCK, "even") else None
    if isinstance(activation, NVFP4Activation) and activation.block == NVFP4_BLOCK:
        return {**common, **_groups(activation), "dynamic": "local"}
    return None


def _groups(fmt: WeightFormat | ActivationFormat) -> dict[str, Any]:
    if isinstance(fmt, (NVFP4, NVFP4Activation)):
        return {"strategy": "tensor_group", "group_size": NVFP4_BLOCK, "scale_dtype": "torch.float8_e4m3fn"}
    return {"strategy": "group", "group_size": BLOCK, "scale_dtype": "torch.uint8"}


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes `(out, in)` of 4 or 6 bits as rows of bytes, the first code in the lowest bits."""
    import torch

    from lsiq.export.packing import pack

    return pack(codes, bits).view(torch.uint8)
