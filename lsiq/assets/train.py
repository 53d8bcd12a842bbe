"""Train the bundled models: `python -m lsiq.assets.train --family llama --text PATH... --tokenizer DIR --out DIR`.

With `--train-tokenizer OUT --text PATH...` it trains the tokenizer instead. Weights stay float32 and matrix products
run in bfloat16 on a GPU; the result is a bfloat16 checkpoint. An interrupted run goes on from `OUT/state.pt`.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from lsiq.assets.model import POSITIONS, save_checkpoint
from lsiq.assets.tokenizer import (
    Source,
    first_characters,
    load_tokenizer,
    save_tokenizer,
    token_stream,
    train_tokenizer,
)
from lsiq.assets.training import Plan, Run, Windows, train
from lsiq.errors import LsiqError

# Stable peak rates for batches of 65,000 tokens at this width; OPT, without gates and RMSNorm, takes less.
LEARNING_RATE = {"llama": 3e-3, "opt": 2e-3}


def load_streams(tokenizer: Tokenizer, texts: list[str], cache: Path) -> np.ndarray:
    """Return all texts as one uint16 stream, repeats included, encoding what the cache lacks."""
    start, streams = time.monotonic(), []
    for source in map(Source.parse, texts):
        streams += [token_stream(tokenizer, source, cache)] * source.repeat
        print(
            f"{source.name}: {len(streams[-1]):,} tokens x {source.repeat}, {time.monotonic() - start:.1f} s",
            flush=True,
        )
    return np.concatenate(streams)


def amount(text: str) -> int:
    """Parse `400M`, `200K`, `1.5B` or a plain number."""
    factor = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    return int(float(text[:-1] if factor > 1 else text) * factor)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lsiq.assets.train", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--text", nargs="+", required=True, help="PATH, PATH*REPEAT or hub:REPO[:CONFIG[:SPLIT[:FIELD]]]")
    add("--train-tokenizer", type=Path, metavar="OUT", help="train a tokenizer from --text into OUT and stop")
    add("--vocab", type=int, default=4096, help="pieces of the tokenizer to train")
    add("--characters", type=amount, default=60_000_000, help="of each text, for the tokenizer")
    add("--family", choices=["llama", "opt"])
    add("--tokenizer", type=Path, help="folder with tokenizer.json")
    add("--out", type=Path)
    add("--cache", type=Path, help="folder of the encoded texts; default --out")
    add("--valid", nargs="*", default=[], help="texts for the validation loss")
    add("--valid-every", type=int, default=500, help="steps between two validations, a multiple of 50")
    add("--tokens", type=amount, default=400_000_000, help="budget, for example 400M")
    add("--minutes", type=float, default=math.inf, help="limit of the training loop, compilation apart")
    add("--job-minutes", type=float, default=math.inf, help="limit of everything but writing the checkpoint")
    add("--batch", type=int, default=64)
    add("--seqlen", type=int, default=1024)
    add("--lr", type=float, help="peak; default 3e-3 for llama, 2e-3 for opt")
    add("--warmup", type=float, default=0.03, help="share of the run")
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="worth it on a GPU")
    add("--device", default="auto")
    add("--encode-only", action="store_true", help="fill the cache and stop")
    arguments = parser.parse_args(argv)
    if not arguments.train_tokenizer and not (arguments.family and arguments.tokenizer and arguments.out):
        parser.error("give --family, --tokenizer and --out to train a model, or --train-tokenizer OUT")
    if not 1 <= arguments.seqlen <= POSITIONS:
        parser.error(f"--seqlen {arguments.seqlen} is outside 1..{POSITIONS}, the positions of the model")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = parse_arguments(argv)
    if args.train_tokenizer:
        sources = [Source.parse(text) for text in args.text]
        documents: Iterator[str] = chain(*(first_characters(s.documents(), args.characters) for s in sources))
        save_tokenizer(train_tokenizer(documents, args.vocab), args.train_tokenizer)
        return
    tokenizer, cache = load_tokenizer(args.tokenizer), args.cache or args.out
    stream = load_streams(tokenizer, args.text, cache)
    valid = load_streams(tokenizer, args.valid, cache) if args.valid else None
    if args.encode_only:
        return
    lr = LEARNING_RATE[args.family] if args.lr is None else args.lr
    names = ["family", "tokens", "minutes", "job_minutes", "batch", "seqlen", "warmup", "seed", "valid_every"]
    plan = Plan(lr=lr, **{name: getattr(args, name) for name in names})
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    torch.set_float32_matmul_precision("high")
    run = Run(plan, tokenizer.get_vocab_size(), args.out, device)
    run.resume()
    print(f"{args.family}: {sum(p.numel() for p in run.model.parameters()):,} parameters on {device}", flush=True)
    train(run, Windows(stream, plan, device), valid, args.compile)
    save_checkpoint(run.model, tokenizer, args.out)


if __name__ == "__main__":
    try:
        main()
    except LsiqError as error:
        sys.exit(str(error))
