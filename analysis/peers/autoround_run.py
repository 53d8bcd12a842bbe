"""Quantise a checkpoint with AutoRound (0.16.1) on given tokens, asymmetric groups of 128; write it dequantised.

PEER/bin/python analysis/peers/autoround_run.py DIR default|best BITS SEED OUT

`default` is 200 iterations on the given tokens, `best` the package's auto-round-best: 1000 iterations.
"""

import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, preset, bits, seed, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])
tokens = torch.load(folder / "tokens.pt")
data = DataLoader([{"input_ids": row} for row in tokens], batch_size=1, shuffle=False)
start = time.perf_counter()
rounding = AutoRound(
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    AutoTokenizer.from_pretrained(folder),
    bits=bits,
    group_size=128,
    sym=False,
    dataset=data,
    iters={"default": 200, "best": 1000}[preset],
    nsamples=len(tokens),
    seqlen=tokens.shape[1],
    batch_size=8,
    enable_torch_compile=False,
    seed=seed,
)
quantised, _ = rounding.quantize()
plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
state = {name: tensor.float().cpu() for name, tensor in quantised.state_dict().items() if name in plain.state_dict()}
plain.load_state_dict(state)
plain.save_pretrained(out)
AutoTokenizer.from_pretrained(folder).save_pretrained(out)
print(f"{out}: AutoRound {preset}, {bits} bits, seed {seed}, {time.perf_counter() - start:.0f} s")
