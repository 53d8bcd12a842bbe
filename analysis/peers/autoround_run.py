"""Quantise a checkpoint with AutoRound (0.16.1) on given tokens, asymmetric groups; write it dequantised.

PEER/bin/python analysis/peers/autoround_run.py DIR OUT --bits 2 --group 64 --iterations 200 --seed 0

The package's default is 200 iterations, its auto-round-best 1000 on 512 samples; for 2 bits its authors ask for
`--extra`. Its default of mixed precision in bfloat16 stays where the machine has it, so its weights are bfloat16 too.
`--compile` lets it compile its steps, as it does by default.
"""

import argparse
import resource
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from dequantised import write
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--bits", type=int, required=True)
parser.add_argument("--group", type=int, default=128)
parser.add_argument("--iterations", type=int, default=200)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--extra", action="store_true", help="enable_alg_ext")
parser.add_argument("--compile", action="store_true", help="enable_torch_compile")
options = parser.parse_args()
tokens = torch.load(options.folder / "tokens.pt")
start = time.perf_counter()
rounding = AutoRound(
    AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32),
    AutoTokenizer.from_pretrained(options.folder),
    bits=options.bits,
    group_size=options.group,
    sym=False,
    dataset=DataLoader([{"input_ids": row} for row in tokens], batch_size=1, shuffle=False),
    iters=options.iterations,
    nsamples=len(tokens),
    seqlen=tokens.shape[1],
    batch_size=8,
    enable_torch_compile=options.compile,
    seed=options.seed,
    **({"enable_alg_ext": True} if options.extra else {}),
)
quantised, _ = rounding.quantize()
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
write(options.folder, quantised.state_dict(), options.out)
print(
    f"{options.out}: AutoRound, {vars(options)}, {rounding.model_context.amp_dtype}, {seconds:.0f} s, "
    f"{peak:.1f} GiB of memory at most"
)
