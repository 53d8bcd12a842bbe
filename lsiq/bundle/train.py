"""Train a model of the ladder: `python -m lsiq.bundle.train --family llama --rung 11m --text PATH... --out DIR`.

Several GPUs share each batch: `torchrun --nproc-per-node=N -m lsiq.bundle.train ...`. Weights stay float32 and matrix
products run in bfloat16 on a GPU; the result is a bfloat16 checkpoint with its card. An interrupted run goes on from
`OUT/state.pt`. With `--train-tokenizer OUT --text PATH...` it trains the tokenizer instead.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from lsiq.assets import bundled_model
from lsiq.bundle.card import write_card
from lsiq.bundle.ladder import LADDER
from lsiq.bundle.model import POSITIONS, save_checkpoint
from lsiq.bundle.tokenizer import (
    Source,
    first_characters,
    load_tokenizer,
    save_tokenizer,
    token_stream,
    train_tokenizer,
)
from lsiq.bundle.training import Plan, Run, Windows, tell, train
from lsiq.errors import LsiqError
from lsiq.runtime import processes
from lsiq.runtime.device import find_device


def load_streams(tokenizer: Tokenizer, texts: list[str], cache: Path) -> np.ndarray:
    """Return all texts as one uint16 stream, repeats included, encoding what the cache lacks."""
    start, streams = time.monotonic(), []
    for source in map(Source.parse, texts):
        if processes.first():
            token_stream(tokenizer, source, cache)
        processes.wait()  # until the cache has it
        streams += [token_stream(tokenizer, source, cache)] * source.repeat
        tell(f"{source.name}: {len(streams[-1]):,} tokens x {source.repeat}, {time.monotonic() - start:.1f} s")
    return np.concatenate(streams)


def amount(text: str) -> int:
    """Parse `400M`, `200K`, `1.5B` or a plain number."""
    factor = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    return int(float(text[:-1] if factor > 1 else text) * factor)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lsiq.bundle.train", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--text", nargs="+", required=True, help="PATH, PATH*REPEAT or hub:REPO[:CONFIG[:SPLIT[:FIELD]]]")
    add("--train-tokenizer", type=Path, metavar="OUT", help="train a tokenizer from --text into OUT and stop")
    add("--vocab", type=int, default=4096, help="pieces of the tokenizer to train")
    add("--characters", type=amount, default=60_000_000, help="of each text, for the tokenizer")
    add("--family", choices=["llama", "opt"])
    add("--rung", choices=LADDER, default="11m", help="parameters, about; 11m is the size of the bundled models")
    add("--tokenizer", type=Path, default=bundled_model("tiny-llama"), help="folder with tokenizer.json; the bundled")
    add("--out", type=Path)
    add("--cache", type=Path, help="folder of the encoded texts; default --out")
    add("--valid", nargs="*", default=[], help="texts for the validation loss")
    add("--valid-every", type=int, default=500, help="steps between two validations, a multiple of 50")
    add("--tokens", type=amount, default=400_000_000, help="budget, for example 400M")
    add("--minutes", type=float, default=math.inf, help="limit of the training loop, compilation apart")
    add("--job-minutes", type=float, default=math.inf, help="limit of everything but writing the checkpoint")
    add("--batch", type=int, help="sequences a step, of all processes together; default: the rung's, 64 or 32")
    add("--seqlen", type=int, default=1024)
    add("--lr", type=float, help="peak; default: the rung's, 8e-4 to 3e-3 for llama, 5e-4 to 2e-3 for opt")
    add("--warmup", type=float, default=0.03, help="share of the run")
    add("--seed", type=int, default=0)
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--device", default="auto")
    add("--encode-only", action="store_true", help="fill the cache and stop")
    arguments = parser.parse_args(argv)
    if not arguments.train_tokenizer and not (arguments.family and arguments.out):
        parser.error("give --family and --out to train a model, or --train-tokenizer OUT")
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
    with processes.together(args.device):
        train_model(args)


def train_model(args: argparse.Namespace) -> None:
    """Train as the command line says, with whatever other processes there are."""
    tokenizer, cache, device = load_tokenizer(args.tokenizer), args.cache or args.out, find_device(args.device)
    stream = load_streams(tokenizer, args.text, cache)
    valid = load_streams(tokenizer, args.valid, cache) if args.valid else None
    if args.encode_only:
        return
    rung = LADDER[args.rung]
    names = ["family", "rung", "tokens", "minutes", "job_minutes", "seqlen", "warmup", "seed", "valid_every"]
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    lr = rung.rate_of(args.family) if args.lr is None else args.lr
    plan = Plan(**settings, lr=lr, batch=rung.batch_of(args.family) if args.batch is None else args.batch)
    torch.set_float32_matmul_precision("high")
    run = Run(plan, tokenizer.get_vocab_size(), args.out, device)
    run.resume()
    tell(f"{args.family} {args.rung}: {sum(p.numel() for p in run.model.parameters()):,} parameters on {device}")
    compiled = device.type == "cuda" if args.compile is None else args.compile
    train(run, Windows(stream, plan, device), valid, compiled)
    if processes.first():
        save_checkpoint(run.model, tokenizer, args.out)
        write_card(run, tokenizer, args.text, args.valid, len(stream))


if __name__ == "__main__":
    try:
        main()
    except LsiqError as error:
        sys.exit(str(error))
