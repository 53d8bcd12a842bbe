"""GPTQ layout: what GPTQModel, vLLM and transformers read, with zero points as they are (version 2)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lsiq.errors import ConfigError
from lsiq.export.base import (
    Destination,
    Loader,
    Logits,
    integers,
    refuse_activations,
    refuse_cache,
    refuse_float,
    refuse_outside,
    refuse_wide_scales,
)
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.export.source import Source
    from lsiq.formats.quant import QuantSettings
    from lsiq.formats.tensor import QuantizedTensor
    from lsiq.models.result import BlockResult


_BITS = (2, 3, 4, 8)
_WORD = 32


@settings
class GPTQLayout(Destination):
    """The layout, whatever method made the codes.

    Per linear: `qweight (in · bits / 32, out)` int32, codes packed along the inputs; `qzeros (groups, out · bits / 32)`
    int32, zero points packed along the outputs; `scales (groups, out)` float16; `g_idx (in,)` int32, the group of each
    input. Version 2 stores zero points as they are; version 1 stored one less, which has no place for 0.
    """

    round_scales: bool = Field(False, description="true rounds the float32 scales of a run to float16")

    @property
    def name(self) -> str:
        return "gptq"

    @property
    def usage(self) -> str:
        return 'from gptqmodel import GPTQModel\nmodel = GPTQModel.load(FOLDER, device="cuda:0")'

    @property
    def loaders(self) -> tuple[Loader, ...]:
        return (Loader(("gptqmodel",), _load),)

    def check(self, quant: QuantSettings) -> None:
        refuse_float(quant, "export=gptq")
        refuse_activations(quant, "export=gptq")
        refuse_cache(quant, "export=gptq")
        refuse_outside(quant, "export=gptq")
        if len(quant.formats) > 1 or quant.allocate.active:
            raise ValueError(
                f"export=gptq holds one format for all linears, not those of quant={quant.name}; "
                "use export=compressed-tensors"
            )
        for weight in (integers(fmt, "export=gptq") for fmt in quant.formats):
            if weight.bits not in _BITS:
                raise ValueError(
                    f"export=gptq holds 2, 3, 4 or 8 bits, not quant.weight.bits={weight.bits}; "
                    "use one of them, or export=compressed-tensors, which holds 2 to 8"
                )
            refuse_wide_scales(weight, self.round_scales, "export=gptq")

    def check_model(self, source: Source) -> None:
        self.check(source.quant)  # whose formats are known by now
        group = source.quant.formats[0].width
        for name, (rows, columns) in source.shapes.items():
            if rows % _WORD or columns % _WORD or (group is not None and group % _WORD):
                raise ConfigError(
                    f"export=gptq: its loaders want widths and groups that are multiples of {_WORD}, but {name} is "
                    f"{rows} × {columns} in groups of {group or columns}; use export=compressed-tensors"
                )

    def stored(self, result: BlockResult) -> dict[str, Tensor]:
        from lsiq.export.source import decoded, with_half_scales

        return decoded(with_half_scales(result))

    def write(self, source: Source, folder: Path) -> None:
        from lsiq.export.shards import copy_companions, write_json, write_packed

        write_packed(source, folder, _packed)
        settings = _config(source)
        write_json(folder / "config.json", {**source.config, "quantization_config": settings})
        write_json(folder / "quantize_config.json", settings)
        copy_companions(source, folder)


def _packed(weight: QuantizedTensor) -> dict[str, Tensor]:
    import torch

    from lsiq.export.packing import pack

    bits, columns = weight.format.bits, weight.codes.shape[1]
    group = weight.format.width or columns
    return {
        "qweight": pack(weight.codes, bits).T,
        "qzeros": pack(weight.zero.squeeze(-1).T, bits),
        "scales": weight.scale.squeeze(-1).T.half(),
        "g_idx": (torch.arange(columns) // group).int(),
    }


def _config(source: Source) -> dict[str, Any]:
    from lsiq import __version__

    fmt = integers(source.quant.formats[0], "export=gptq")
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": fmt.bits,
        "group_size": fmt.group or -1,
        "sym": fmt.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"lsiq:{__version__}"]},
    }


def _load(folder: Path) -> Logits:
    """GPTQModel's own unpacking of every linear, in the float model.

    Its kernels compute in half precision, on a CPU as well. So that rounding does not hide an error of the layout, its
    modules unpack with float32 scales, and the weights are put into the model that transformers builds.
    """
    import torch
    from gptqmodel import BACKEND, GPTQModel  # type: ignore[import-not-found]
    from transformers import AutoConfig, AutoModelForCausalLM

    from lsiq.export.verify import as_logits

    loaded = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    config = AutoConfig.from_pretrained(folder, quantization_config=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    unpacked = {}
    for name, module in loaded.named_modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()
            unpacked[f"{name}.weight"] = module.dequantize_weight().T.float()
    floats = _floats(folder)
    model.load_state_dict({**floats, **unpacked}, strict=False)
    model.tie_weights()
    return as_logits(model)


def _floats(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    packed = ("qweight", "qzeros", "scales", "g_idx")
    files = sorted(folder.glob("*.safetensors"))
    return {n: t.float() for file in files for n, t in load_file(file).items() if not n.endswith(packed)}
