"""Quantise a checkpoint by GPTQModel's GPTQ (7.6.0) on given tokens, asymmetric groups; write it dequantised.

GPTQMODEL_CPU_WORKERS=2 PEER/bin/python analysis/peers/gptqmodel_run.py DIR OUT --bits 3 --group 64

The package asks for two workers even where one core is given. Nothing is packed: packing would round scales to float16.
Its AWQ is left out: taken before packing, norms and weights did not belong together (SmolLM2, 3 bits: ppl 1.6e8).
`--order none` takes the columns as they come.
"""

import argparse
import time
from pathlib import Path

import torch
from dequantised import write
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.quantization import QuantizeConfig

GPTQProcessor.submodule_finalize = lambda self, module, model, **kwargs: None

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--bits", type=int, required=True)
parser.add_argument("--group", type=int, default=128)
parser.add_argument("--order", choices=["static", "none"], default="static", help="of the columns")
options = parser.parse_args()
tokens = torch.load(options.folder / "tokens.pt")
settings = QuantizeConfig(
    bits=options.bits,
    group_size=options.group,
    sym=False,
    offload_to_disk=False,
    device="cpu",
    desc_act=options.order == "static",
    act_group_aware=False,
    static_groups=True,
    damp_percent=0.01,
)
model = GPTQModel.load(str(options.folder), settings, dtype=torch.float32)
start = time.perf_counter()
data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
model.quantize(data, batch_size=8, backend=BACKEND.GPTQ_TORCH)
seconds = time.perf_counter() - start
write(options.folder, model.model.state_dict(), options.out)
print(f"{options.out}: GPTQModel, {vars(options)}, {seconds:.0f} s")
