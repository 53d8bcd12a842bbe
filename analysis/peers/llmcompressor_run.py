"""Quantise a checkpoint with llm-compressor (0.14.0.1) on given tokens, asymmetric groups; write it dequantised.

PEER/bin/python analysis/peers/llmcompressor_run.py DIR gptq|awq|rtn OUT --bits 3 --group 64

`--order none` takes GPTQ's columns as they come; `--observer memoryless_mse` searches ranges (of weights alone).
"""

import argparse
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from dequantised import write
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

# The package has no mapping for OPT, and pins memory, which needs an accelerator.
OPT = [
    AWQMapping("re:.*self_attn_layer_norm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]),
    AWQMapping("re:.*v_proj$", ["re:.*out_proj$"]),
    AWQMapping(r"re:.*layers\.\d+\.final_layer_norm$", ["re:.*fc1$"]),
]
if not torch.accelerator.is_available():
    IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("algorithm", choices=["gptq", "awq", "rtn"])
parser.add_argument("out", type=Path)
parser.add_argument("--bits", type=int, required=True)
parser.add_argument("--group", type=int, default=128)
parser.add_argument("--order", choices=["static", "none"], default="static", help="of GPTQ's columns")
parser.add_argument("--observer", default="memoryless_minmax", help="what fits the ranges of weights")
options = parser.parse_args()
model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
tokens = torch.load(options.folder / "tokens.pt")
data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
weights = QuantizationArgs(
    num_bits=options.bits,
    type="int",
    symmetric=False,
    strategy="group",
    group_size=options.group,
    observer=options.observer,
)
groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
order = None if options.order == "none" else options.order
recipe = {
    "rtn": lambda: [QuantizationModifier(config_groups=groups, ignore=["lm_head"])],
    "gptq": lambda: [GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder=order, dampening_frac=0.01)],
    "awq": lambda: [
        AWQModifier(mappings=OPT if model.config.model_type == "opt" else None),
        QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
    ],
}[options.algorithm]()
start = time.perf_counter()
oneshot(
    model=model,
    dataset=data,
    recipe=recipe,
    max_seq_length=tokens.shape[1],
    num_calibration_samples=len(tokens),
    shuffle_calibration_samples=False,
)
seconds = time.perf_counter() - start
with torch.no_grad():
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None and scheme.weights is not None:
            extra = {"g_idx": module.weight_g_idx} if hasattr(module, "weight_g_idx") else {}
            module.weight.copy_(
                fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, scheme.weights, **extra)
            )
write(options.folder, model.state_dict(), options.out)
print(f"{options.out}: llm-compressor, {vars(options)}, {seconds:.0f} s")
