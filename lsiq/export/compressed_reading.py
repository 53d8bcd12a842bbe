"""Reading compressed-tensors back: transformers, or where it fails on a layout compressed-tensors itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.export.base import Logits

if TYPE_CHECKING:
    from torch import nn


def read_back(folder: Path) -> Logits:
    """The loader of transformers, through compressed-tensors; activations stay in float.

    It reads a copy with float32 scales: the library multiplies in the dtype of the scale, and half precision would
    round the products, which is right for a deployed model and hides what is to be compared here.
    """
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    from lsiq.export.verify import as_logits

    with tempfile.TemporaryDirectory(dir=folder.parent) as wide:
        _widen_scales(folder, Path(wide))
        groups = _groups(folder).values()
        if len(groups) == 1:  # transformers 5.23 fails on asymmetric weights unless it is to de-quantise
            dequantize = CompressedTensorsConfig(dequantize=True)
            return as_logits(
                AutoModelForCausalLM.from_pretrained(
                    wide, dtype=torch.float32, quantization_config=dequantize, local_files_only=True
                )
            )
        # Floating-point numbers in blocks are handed out in bfloat16.
        halved = any(g["weights"]["type"] == "float" and "group" in g["weights"]["strategy"] for g in groups)
        rounds_inputs = any(group["input_activations"] for group in groups)  # which that model would do
        if not (halved or rounds_inputs) and all(group["weights"]["symmetric"] for group in groups):
            return as_logits(AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32, local_files_only=True))
        return as_logits(_load_groups(Path(wide)))


def _groups(folder: Path) -> dict[str, Any]:
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config["quantization_config"]["config_groups"]


def _load_groups(folder: Path) -> nn.Module:
    """Return the model that transformers builds, each linear unpacked by compressed-tensors as its own group says.

    transformers 5.23 unpacks all linears as the first group says where it is to de-quantise; where it is not, it rounds
    what enters linears, and fails on asymmetric weights and on those of NVFP4 and MXFP4 in a model of float32, as they
    come in bfloat16. So compressed-tensors is asked for the linears one by one.
    """
    import json

    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stated = QuantizationConfig.model_validate(settings.pop("quantization_config"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    files = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, Any] = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for group in stated.config_groups.values():
        if isinstance(group, list):
            raise ValueError(f"a group of settings is expected, not {group}")
        compressor = BaseCompressor.get_value_from_registry(group.format or stated.format)
        for target in group.targets:
            names = [name for name in tensors if name.startswith(f"{target}.weight")]
            parts = {name.removeprefix(f"{target}."): tensors.pop(name) for name in names}
            tensors[f"{target}.weight"] = compressor.decompress(parts, group)["weight"]
    unknown = model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    model.tie_weights()
    if unknown.unexpected_keys:
        raise ValueError(f"the model has no place for {unknown.unexpected_keys[0]}")
    return model


def _widen_scales(folder: Path, copy: Path) -> None:
    """Copy a checkpoint with scales of weights in float32, and without those of what stays in float here.

    These are of activations, keys and values.
    """
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
            if not name.endswith(("input_global_scale", ".k_scale", ".v_scale"))
        }
        save_file(wide, copy / file.name, metadata={"format": "pt"})
