"""How fast perplexity streams, against a plain batched forward of transformers with all weights on the device.

    python analysis/evaluation_speed.py                                       # tiny-llama
    python analysis/evaluation_speed.py --shape 1024 2816 8 16 --vocab 8192 --windows 8
    python analysis/evaluation_speed.py --shape 4096 11008 32 32 --vocab 32000 --seqlen 2048 \
        --windows 64 --device cuda --dtype float16                            # LLaMA-2-7B, random weights, one GPU

Both read the same checkpoint and the same windows; the plain forward has its weights loaded beforehand, streaming reads
them block by block within the time shown. The two take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lsiq.assets import bundled_model
from lsiq.evals.perplexity import perplexity
from lsiq.models.loading import load
from lsiq.models.settings import ModelSettings


def random_checkpoint(shape: list[int], vocab: int, seqlen: int, dtype: torch.dtype, folder: Path) -> Path:
    """Write a LLaMA of the given hidden width, feed-forward width, blocks and heads, and the bundled tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    hidden, intermediate, blocks, heads = shape
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=seqlen,
    )
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled_model("tiny-llama")).save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_loss(model: torch.nn.Module, windows: Tensor, batch: int) -> float:
    """The mean loss by one call of the whole model for each batch."""
    device = next(model.parameters()).device
    total = 0.0
    for ids in windows.split(batch):
        ids = ids.to(device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / (windows.numel() - len(windows))


def timed(action: Callable[[], float]) -> tuple[float, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=4, metavar=("HIDDEN", "FFN", "BLOCKS", "HEADS"))
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = bundled_model("tiny-llama")
        if given.shape:
            checkpoint = random_checkpoint(given.shape, given.vocab, given.seqlen, dtype, Path(folder))
        settings = ModelSettings(name="speed", path=str(checkpoint), dtype=given.dtype, seqlen=given.seqlen)
        measure(settings, checkpoint, device, dtype, given)


def measure(
    settings: ModelSettings, checkpoint: Path, device: torch.device, dtype: torch.dtype, given: argparse.Namespace
) -> None:
    """Print a line for each round, and the ratio of the best ones."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device)  # type: ignore[arg-type]
    streamed = load(settings, checkpoint, device, seed=0)
    vocabulary = streamed.config.vocab_size
    windows = torch.randint(0, vocabulary, (given.windows, given.seqlen), generator=torch.Generator().manual_seed(0))

    def stream() -> float:
        return perplexity(streamed, windows, given.batch, lambda block: block.with_weights({}), lambda: None).loss

    best = {"plain": [float("inf")] * 2, "streamed": [float("inf")] * 2}
    for turn in range(given.rounds + 1):  # the first warms up
        for name, action in (("plain", lambda: plain_loss(plain, windows, given.batch)), ("streamed", stream)):
            loss, wall, cpu = timed(action)
            if turn:
                best[name] = [min(best[name][0], wall), min(best[name][1], cpu)]
                print(f"{name:9} loss {loss:.6f}  {wall:.2f} s wall  {cpu:.2f} s CPU")
    wall, cpu = (best["plain"][i] / best["streamed"][i] for i in range(2))
    rate = windows.numel() / best["streamed"][0]
    print(f"streamed / plain speed: {wall:.2f} by wall, {cpu:.2f} by CPU time; {rate:,.0f} tokens/s; {sys.argv[1:]}")


if __name__ == "__main__":
    main()
