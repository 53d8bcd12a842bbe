"""Quantise a checkpoint with llm-compressor (0.14.0.1) on given tokens, asymmetric groups of 128; write it dequantised.

PEER/bin/python analysis/peers/llmcompressor_run.py DIR gptq|awq|rtn BITS OUT
"""

import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

# The package has no mapping for OPT, and pins memory, which needs an accelerator.
OPT = [
    AWQMapping("re:.*self_attn_layer_norm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]),
    AWQMapping("re:.*v_proj$", ["re:.*out_proj$"]),
    AWQMapping(r"re:.*layers\.\d+\.final_layer_norm$", ["re:.*fc1$"]),
]
if not torch.accelerator.is_available():
    IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None

folder, algorithm, bits, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokens = torch.load(folder / "tokens.pt")
data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
weights = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=128)
groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
recipe = {
    "rtn": lambda: [QuantizationModifier(config_groups=groups, ignore=["lm_head"])],
    "gptq": lambda: [GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder="static", dampening_frac=0.01)],
    "awq": lambda: [
        AWQModifier(mappings=OPT if model.config.model_type == "opt" else None),
        QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
    ],
}[algorithm]()
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
state = {
    name: tensor
    for name, tensor in model.state_dict().items()
    if not name.endswith(("_scale", "_zero_point", "_g_idx"))
}
plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
plain.load_state_dict(state)
plain.save_pretrained(out)
AutoTokenizer.from_pretrained(folder).save_pretrained(out)
print(f"{out}: {algorithm}, {bits} bits, {seconds:.0f} s")
