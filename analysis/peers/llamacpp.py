"""Read GGUF exports with llama.cpp and compare tokens and logits with transformers' reading of the same file.

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" VENV/bin/pip install llama-cpp-python==0.3.36
    VENV/bin/python analysis/peers/llamacpp.py run FILE.gguf OUT.npz     # in llama.cpp's own environment
    python analysis/peers/llamacpp.py compare FILE.gguf OUT.npz          # in this package's

llama.cpp rounds what enters each linear to 8 bits in blocks of 32, so its logits cannot equal those of float32
activations; the loss over the text and the share of equal first choices say how far it is off.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

TEXT = (
    "The harbour was quiet in the morning. Two boats carried salt, it's said, and the lathé of 1984 turned 12,345 "
    "times before noon; then the wind came from the north-east, and nobody went out until the tide had turned again.\n"
    "\n  In the evening the keeper lit the lamp, wrote the day into his book, and slept."
)


def run(file: str, out: str) -> None:
    import llama_cpp

    model = llama_cpp.Llama(file, n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    tokens = model.tokenize(TEXT.encode(), add_bos=False)
    model.eval(tokens)
    np.savez(out, tokens=tokens, logits=np.array(model.scores[: len(tokens)]), version=llama_cpp.__version__)


def compare(file: str, out: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, found = Path(file), np.load(out)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = tokenizer(TEXT, add_special_tokens=False).input_ids
    with torch.no_grad():
        own = model(torch.tensor([tokens])).logits[0]
    theirs = torch.from_numpy(found["logits"])
    losses = [torch.nn.functional.cross_entropy(x[:-1], torch.tensor(tokens[1:])).item() for x in (own, theirs)]
    print(f"llama-cpp-python {found['version']}, {file}")
    print(f"tokens: {len(tokens)}, the same: {tokens == found['tokens'].tolist()}")
    print(f"mean loss: {losses[0]:.4f} by transformers, {losses[1]:.4f} by llama.cpp")
    print(f"logits: largest difference {(own - theirs).abs().max():.3f}, mean {(own - theirs).abs().mean():.4f}")
    print(f"same first choice: {(own.argmax(-1) == theirs.argmax(-1)).float().mean():.3f}")


if __name__ == "__main__":
    {"run": run, "compare": compare}[sys.argv[1]](sys.argv[2], sys.argv[3])
