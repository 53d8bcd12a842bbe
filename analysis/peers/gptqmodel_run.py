"""Quantise a checkpoint with GPTQModel (7.6.0) on given tokens, asymmetric groups of 128; write it dequantised.

GPTQMODEL_CPU_WORKERS=2 PEER/bin/python analysis/peers/gptqmodel_run.py DIR gptq|awq BITS OUT

The package asks for two workers even where one core is given. Nothing is packed: packing would round scales to float16,
and for AWQ takes no float32 model.
"""

import sys
import time
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.looper.awq_processor import AWQProcessor
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

for processor in (AWQProcessor, GPTQProcessor):
    processor.submodule_finalize = lambda self, module, model, **kwargs: None

folder, algorithm, bits, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
tokens = torch.load(folder / "tokens.pt")
own = {
    "gptq": {"desc_act": True, "act_group_aware": False, "static_groups": True, "damp_percent": 0.01},
    "awq": {"method": METHOD.AWQ, "format": FORMAT.GEMM},
}[algorithm]
settings = QuantizeConfig(bits=bits, group_size=128, sym=False, offload_to_disk=False, device="cpu", **own)
model = GPTQModel.load(str(folder), settings, dtype=torch.float32)
backend = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[algorithm]
start = time.perf_counter()
data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
model.quantize(data, batch_size=8, backend=backend)
seconds = time.perf_counter() - start
plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
state = {name: tensor for name, tensor in model.model.state_dict().items() if name in plain.state_dict()}
plain.load_state_dict(state)
plain.save_pretrained(out)
AutoTokenizer.from_pretrained(folder).save_pretrained(out)
print(f"{out}: GPTQModel, {algorithm}, {bits} bits, {seconds:.0f} s")
