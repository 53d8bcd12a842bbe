"""Read GGUF exports with llama.cpp; compare tokens, logits and perplexity with those of this package and transformers.

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" VENV/bin/pip install llama-cpp-python==0.3.36
    VENV/bin/python analysis/peers/llamacpp.py run FILE.gguf OUT.npz     # in llama.cpp's own environment
    python analysis/peers/llamacpp.py compare FILE.gguf OUT.npz          # in this package's

    python analysis/peers/llamacpp.py windows EXPORT TEXT OUT.npz        # as eval.seqlen=512 eval.windows=8 cuts a text
    python analysis/peers/llamacpp.py measure EXPORT OUT.npz             # by transformers: FILE.gguf or a folder
    VENV/bin/python analysis/peers/llamacpp.py score FILE.gguf OUT.npz   # by llama.cpp

llama.cpp rounds what enters each linear to 8 bits in blocks of 32, so its logits cannot equal those of float32
activations; the loss over the text and the share of equal first choices say how far it is off.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

TEXT = (
    "The harbour was quiet in the morning. Two boats carried salt, it's said, and the lathé of 1984 turned 12,345 "
    "times before noon; then the wind came from the north-east, and nobody went out until the tide had turned again.\n"
    "\n  In the evening the keeper lit the lamp, wrote the day into his book, and slept."
)
PROMPT = "The capital of France is"
WINDOWS, SEQLEN, CONTINUATION = 8, 512, 8


def run(file: str, out: str) -> None:
    import llama_cpp

    model = llama_cpp.Llama(file, n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    tokens = model.tokenize(TEXT.encode(), add_bos=False)
    model.eval(tokens)
    np.savez(out, tokens=tokens, logits=np.array(model.scores[: len(tokens)]), version=llama_cpp.__version__)


def compare(file: str, out: str) -> None:
    import torch

    model, tokenizer = load(file)
    answer = np.load(out)
    tokens = tokenizer(TEXT, add_special_tokens=False).input_ids
    with torch.no_grad():
        own = model(torch.tensor([tokens])).logits[0]
    theirs = torch.from_numpy(answer["logits"])
    losses = [torch.nn.functional.cross_entropy(x[:-1], torch.tensor(tokens[1:])).item() for x in (own, theirs)]
    print(f"llama-cpp-python {answer['version']}, {file}")
    print(f"tokens: {len(tokens)}, the same: {tokens == answer['tokens'].tolist()}")
    print(f"mean loss: {losses[0]:.4f} by transformers, {losses[1]:.4f} by llama.cpp")
    print(f"logits: largest difference {(own - theirs).abs().max():.3f}, mean {(own - theirs).abs().mean():.4f}")
    print(f"same first choice: {(own.argmax(-1) == theirs.argmax(-1)).float().mean():.3f}")


def load(export: str) -> tuple[Any, Any]:
    """The model in float32 as transformers reads it, of a GGUF file or a checkpoint folder, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

    path = Path(export)
    if path.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        return model.eval(), tokenizer_of(path)
    packed = getattr(AutoConfig.from_pretrained(path), "quantization_config", None)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()
    return model, tokenizer_of(path)


def tokenizer_of(path: Path) -> Any:
    """The tokenizer of a folder, or of a GGUF file with the splitting that the file names."""
    from transformers import AutoTokenizer

    from lsiq.models.gguf_tokenizer import read_tokenizer

    return read_tokenizer(path) if path.suffix == ".gguf" else AutoTokenizer.from_pretrained(path)


def windows(export: str, text: str, out: str) -> None:
    """Cut the text as `eval.local.wikitext2=TEXT eval.seqlen=512 eval.windows=8` does."""
    from lsiq.data.corpora import read_corpus
    from lsiq.data.tokens import cut_windows, token_hash

    corpus = read_corpus("wikitext2", "evaluation", text)
    tokens = cut_windows(corpus, tokenizer_of(Path(export)), SEQLEN, "wikitext2")[:WINDOWS]
    np.savez(out, tokens=tokens.numpy(), text=corpus.joined())
    print(f"{tuple(tokens.shape)} tokens, hash {token_hash(tokens)}")


def measure(export: str, out: str) -> None:
    import torch
    import transformers

    model, tokenizer = load(export)
    tokens = np.load(out)["tokens"]
    with torch.no_grad():
        losses = [window_loss(model(torch.from_numpy(window)[None]).logits[0].numpy(), window) for window in tokens]
        prompt = tokenizer(PROMPT, return_tensors="pt")
        answer = model.generate(**prompt, max_new_tokens=CONTINUATION, do_sample=False)[0, prompt.input_ids.shape[1] :]
    report(f"transformers {transformers.__version__}", export, losses, tokenizer.decode(answer))


def score(file: str, out: str, cache: str = "float16") -> None:
    """By llama.cpp, with keys and values in float16, as by default, or in float32."""
    import llama_cpp

    kind = {"float16": llama_cpp.GGML_TYPE_F16, "float32": llama_cpp.GGML_TYPE_F32}[cache]
    settings = {"n_ctx": SEQLEN, "verbose": False, "n_threads": 1, "type_k": kind, "type_v": kind}
    model = llama_cpp.Llama(file, logits_all=True, **settings)
    given = np.load(out)
    tokens = given["tokens"]
    ids = model.tokenize(str(given["text"]).encode(), add_bos=False)[: tokens.size]
    print(f"tokens: {tokens.size}, the same: {ids == tokens.flatten().tolist()}")
    losses = []
    for window in tokens:
        model.reset()
        model.eval(window.tolist())
        losses.append(window_loss(np.array(model.scores[:SEQLEN]), window))
    answer = model.create_completion(PROMPT, max_tokens=CONTINUATION, temperature=0.0)["choices"][0]["text"]
    report(f"llama-cpp-python {llama_cpp.__version__}, keys and values in {cache}", file, losses, answer)


def window_loss(logits: np.ndarray, tokens: np.ndarray) -> float:
    """The mean loss of a window's tokens but the first, in float64."""
    before = logits[:-1].astype(np.float64)
    highest = before.max(1)
    total = highest + np.log(np.exp(before - highest[:, None]).sum(1))
    return float((total - before[np.arange(len(before)), tokens[1:]]).mean())


def report(reader: str, export: str, losses: list[float], answer: str) -> None:
    print(f"{reader}, {export}")
    print(f"perplexity: {math.exp(sum(losses) / len(losses)):.6f}")
    print(f"{PROMPT}: {answer!r}")


if __name__ == "__main__":
    commands = {"run": run, "compare": compare, "windows": windows, "measure": measure, "score": score}
    commands[sys.argv[1]](*sys.argv[2:])
