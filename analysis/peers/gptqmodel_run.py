"""Quantise a checkpoint with GPTQModel (7.6.0) on given tokens, asymmetric groups; write it dequantised.

GPTQMODEL_CPU_WORKERS=2 PEER/bin/python analysis/peers/gptqmodel_run.py DIR gptq|awq OUT --bits 3 --group 64

The package asks for two workers even where one core is given. Nothing is packed: packing would round scales to float16,
and for AWQ takes no float32 model. `--order none` takes GPTQ's columns as they come. `--no-clip` leaves out
AWQ's search for ranges, which on a CPU takes longer than all else.
"""

import argparse
import time
from pathlib import Path

import torch
from dequantised import write
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.looper.awq_processor import AWQProcessor
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig

for processor in (AWQProcessor, GPTQProcessor):
    processor.submodule_finalize = lambda self, module, model, **kwargs: None

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("algorithm", choices=["gptq", "awq"])
parser.add_argument("out", type=Path)
parser.add_argument("--bits", type=int, required=True)
parser.add_argument("--group", type=int, default=128)
parser.add_argument("--order", choices=["static", "none"], default="static", help="of GPTQ's columns")
parser.add_argument("--no-clip", action="store_true", help="AWQ searches scales alone")
options = parser.parse_args()
if options.no_clip:  # the package has an attribute for it and no setting
    AWQProcessor.apply_clip = property(lambda self: False, lambda self, value: None)
tokens = torch.load(options.folder / "tokens.pt")
ordered = options.order == "static"
own = {
    "gptq": {"desc_act": ordered, "act_group_aware": False, "static_groups": True, "damp_percent": 0.01},
    "awq": {"method": METHOD.AWQ, "format": FORMAT.GEMM},
}[options.algorithm]
settings = QuantizeConfig(
    bits=options.bits, group_size=options.group, sym=False, offload_to_disk=False, device="cpu", **own
)
model = GPTQModel.load(str(options.folder), settings, dtype=torch.float32)
backend = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[options.algorithm]
start = time.perf_counter()
data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
model.quantize(data, batch_size=8, backend=backend)
seconds = time.perf_counter() - start
write(options.folder, model.model.state_dict(), options.out)
print(f"{options.out}: GPTQModel, {vars(options)}, {seconds:.0f} s")
