"""Let AutoRound's AutoScheme (0.16.1) share out bits on given tokens; write its choice as a plan of ours.

PEER/bin/python analysis/peers/autoscheme_run.py DIR PLAN.json --bits 2.5 --choices 2 3 4 8 --samples 16 --seqlen 256

Asymmetric groups of 128, scales and zero points counted, as in w2g128 and the like; 16 sequences of 256 tokens are the
package's defaults. The package reads calibration text by name; here it gets the tokens in DIR.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import auto_round.auto_scheme.delta_loss as scoring
import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("plan", type=Path)
parser.add_argument("--bits", type=float, required=True)
parser.add_argument("--choices", type=int, nargs="+", default=[2, 3, 4, 8])
parser.add_argument("--group", type=int, default=128)
parser.add_argument("--samples", type=int, default=16)
parser.add_argument("--seqlen", type=int, default=256)
options = parser.parse_args()
tokens = torch.load(options.folder / "tokens.pt")
pieces = tokens.unfold(1, options.seqlen, options.seqlen).reshape(-1, options.seqlen)[: options.samples]


def ours(*args, bs=8, **kwargs):
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in pieces]
    return DataLoader(rows, batch_size=bs, shuffle=False)


theirs = scoring.get_dataloader
for module in list(sys.modules.values()):
    if getattr(module, "get_dataloader", None) is theirs:
        module.get_dataloader = ours
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
scheme = AutoScheme(
    avg_bits=options.bits,
    options=[QuantizationScheme(bits=b, group_size=options.group, sym=False) for b in options.choices],
    nsamples=len(pieces),
    seqlen=options.seqlen,
    low_gpu_mem_usage=False,
    low_cpu_mem_usage=False,
)
rounding = AutoRound(
    model,
    AutoTokenizer.from_pretrained(options.folder),
    scheme=scheme,
    dataset="pile-10k",  # has to be a name; `ours` stands in its place
    seqlen=options.seqlen,
    nsamples=len(pieces),
    iters=0,
    disable_opt_rtn=True,
    enable_torch_compile=False,
)
rounding.quantize()
layers = {}
for name, layer in rounding.layer_config.items():
    if (match := re.search(r"layers\.(\d+)\.(.+)", name)) is None or layer["bits"] >= 16:
        continue
    layers[f"{match[1]}.{match[2]}"] = f"w{layer['bits']}g{layer['group_size']}"
options.plan.write_text(json.dumps({"layers": layers}, indent=1) + "\n")
counts = {fmt: list(layers.values()).count(fmt) for fmt in sorted(set(layers.values()))}
print(f"{options.plan}: AutoScheme, {options.bits} bits asked, {counts}, {time.perf_counter() - start:.0f} s")
