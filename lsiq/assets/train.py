"""Train the bundled models: `python -m lsiq.assets.train --family llama --text PATH... --tokenizer DIR --out DIR`.

With `--train-tokenizer OUT --text PATH...` it trains the tokenizer instead. Weights stay float32 and matrix products
run in bfloat16 on a GPU; the result is a bfloat16 checkpoint. An interrupted run goes on from `OUT/state.pt`.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from lsiq.assets.tokenizer import (
    Source,
    first_characters,
    load_tokenizer,
    save_tokenizer,
    token_stream,
    train_tokenizer,
)
from lsiq.errors import InputError, LsiqError, NumericalError

# 384 channels are six heads of 64, the head size of the large models; six such layers and 4096 pieces make 11 million
# parameters, 22 MB in bfloat16: small enough to ship in a repository, large enough to write English.
HIDDEN, LAYERS, HEADS, POSITIONS = 384, 6, 6, 1024
# Two key-value heads, so that grouped-query attention is exercised; 1024 is 8/3 of the width, the usual gated ratio.
LLAMA_KV_HEADS, LLAMA_FFN = 2, 1024
# OPT's own ratio of 4 (1536) would exceed the 24 MB; with 1280 both families weigh the same.
OPT_FFN = 1280
# Stable peak rates for batches of 65,000 tokens at this width; OPT, without gates and RMSNorm, takes less.
LEARNING_RATE = {"llama": 3e-3, "opt": 2e-3}

LOG_EVERY = 50  # steps; reading the loss waits for the GPU, which costs nothing measurable this rarely
STARTED = time.monotonic()  # of the process, for --job-minutes
SAVE_SECONDS = 60  # at most this much work is lost when the process is killed


@dataclass(frozen=True)
class Plan:
    """What a training run does; `tokens`, `minutes` and `job_minutes` end it, whichever comes first."""

    family: str
    tokens: int
    minutes: float
    job_minutes: float
    batch: int
    seqlen: int
    lr: float
    warmup: float
    seed: int
    valid_every: int

    def factor(self, progress: float) -> float:
        """The learning rate over its peak: linear warm-up, then a cosine that reaches 0 at `progress` 1."""
        if progress < self.warmup:
            return progress / self.warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup))))


def build_model(family: str, vocab: int) -> PreTrainedModel:
    """Return a freshly initialised float32 model of the family, dropout off, with tied embeddings.

    No padding id is configured: the embedding would never train the row of a padding token, which here also ends texts.
    """
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": True}
    shape = {"vocab_size": vocab, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    if family == "llama":
        sizes = {"intermediate_size": LLAMA_FFN, "num_key_value_heads": LLAMA_KV_HEADS, "head_dim": HIDDEN // HEADS}
        model = LlamaForCausalLM(LlamaConfig(**shape, **sizes, **special, max_position_embeddings=POSITIONS))
    else:
        sizes = {"ffn_dim": OPT_FFN, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": POSITIONS}
        rates = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "do_layer_norm_before": True}
        model = OPTForCausalLM(OPTConfig(**shape, **sizes, **rates, **special))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return model.train()


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the final normed hidden states `(batch, T, hidden)` of unpadded sequences `(batch, T)`.

    Calls the decoder layers itself: under torch.compile, transformers before torch 2.14 always builds a dense causal
    mask (huggingface/transformers, `_ignore_causal_mask_sdpa`), which rules out the flash kernel.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    if isinstance(model, LlamaForCausalLM):
        decoder = model.model
        x = decoder.embed_tokens(ids)
        rotary = decoder.rotary_emb(x, position_ids=positions)
        for layer in decoder.layers:
            x = layer(x, attention_mask=None, position_embeddings=rotary, position_ids=positions, use_cache=False)
        return decoder.norm(x)
    decoder = model.model.decoder
    x = decoder.embed_tokens(ids) + decoder.embed_positions(None, position_ids=positions)
    for layer in decoder.layers:
        x = layer(x, attention_mask=None, position_ids=positions, use_cache=False)
    return decoder.final_layer_norm(x)


def token_loss(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Return the mean next-token loss (nats, float32) of windows `(batch, T + 1)`."""
    with torch.autocast(window.device.type, torch.bfloat16, enabled=window.is_cuda):
        logits = model.lm_head(hidden_states(model, window[:, :-1]))
    return cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


class Windows:
    """Windows `(batch, seqlen + 1)` of a token stream; an epoch, cut at a random offset, takes each window once.

    `at(step)` depends on nothing but the seed and the step, so a resumed run sees what an unbroken one would have seen.
    """

    def __init__(self, stream: np.ndarray, plan: Plan, device: torch.device):
        self.plan = plan
        self.count = len(stream) // plan.seqlen - 1  # one window less, which leaves room for the offset
        if self.count < plan.batch:
            need = (plan.batch + 1) * plan.seqlen
            raise InputError(f"--text holds {len(stream):,} tokens, fewer than {need:,}; lower --batch or --seqlen")
        # int32 on the device: 4 bytes a token, and CUDA cannot index with 16-bit integers.
        self.stream = torch.from_numpy(stream.astype(np.int32)).to(device)
        self.span = torch.arange(plan.seqlen + 1, device=device)
        self.epoch, self.starts = -1, torch.empty(0, dtype=torch.long)

    def at(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.count // self.plan.batch)
        if epoch != self.epoch:
            random = torch.Generator().manual_seed(self.plan.seed * 100_003 + epoch)
            offset = torch.randint(self.plan.seqlen, (1,), generator=random)
            starts = torch.randperm(self.count, generator=random) * self.plan.seqlen + offset
            self.epoch, self.starts = epoch, starts.to(self.stream.device)
        start = self.starts[index * self.plan.batch : (index + 1) * self.plan.batch]
        return self.stream[start[:, None] + self.span].long()


@torch.no_grad()
def validation_loss(model: PreTrainedModel, stream: np.ndarray, plan: Plan) -> float:
    """Return the mean loss (nats a token) over the stream cut into windows, in at most 64 whole batches.

    Not compiled: it would cost a second compilation, without gradients, for a fraction of a second of work.
    """
    size = plan.seqlen + 1
    windows = torch.from_numpy(stream[: len(stream) // size * size].astype(np.int64)).view(-1, size)
    batches = [part for part in windows.to(model.device).split(plan.batch) if len(part) == plan.batch][:64]
    if not batches:
        raise InputError(f"--valid holds {len(stream):,} tokens, fewer than one batch of {plan.batch * size:,}")
    return torch.stack([token_loss(model, batch) for batch in batches]).mean().item()


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW in one fused kernel; matrices decay, vectors (norms and biases) do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


class Run:
    """A training run in `out`: its model, optimizer, step and seconds, kept in `out/state.pt` and `out/curve.jsonl`."""

    def __init__(self, plan: Plan, vocab: int, out: Path, device: torch.device):
        torch.manual_seed(plan.seed)
        self.plan, self.out, self.step, self.seconds = plan, out, 0, 0.0
        self.limit = 60 * plan.minutes
        self.model = build_model(plan.family, vocab)
        nn.Module.to(self.model, device)  # transformers' own `to` is typed for itself only
        self.optimizer = make_optimizer(self.model, plan.lr)
        # Only what fixes the data order and the shapes: the budgets and the rate may change between two calls.
        fixed = {name: getattr(plan, name) for name in ("family", "batch", "seqlen", "seed")}
        self.identity = {"vocab": vocab, **fixed}
        out.mkdir(parents=True, exist_ok=True)
        self.curve = out / "curve.jsonl"

    def resume(self) -> None:
        """Take up `out/state.pt` if it is there; the curve then ends at the state's step."""
        path = self.out / "state.pt"
        state = torch.load(path, map_location=self.model.device, weights_only=True) if path.exists() else None
        if state is not None and state["identity"] != self.identity:
            old = ", ".join(f"{key}={value}" for key, value in state["identity"].items())
            raise InputError(f"{path} was written with {old}; use the same settings or another --out")
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"].cpu())
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"resumed at step {self.step}, {self.seconds:.0f} s", flush=True)
        kept = self.curve.read_text().splitlines() if self.curve.exists() else []
        kept = [line for line in kept if json.loads(line)["step"] <= self.step]
        self.curve.write_text("".join(line + "\n" for line in kept))

    def save(self) -> None:
        """Replace `out/state.pt`; a kill in between leaves the old one."""
        state = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.out / "state.part")
        os.replace(self.out / "state.part", self.out / "state.pt")

    def progress(self) -> float:
        """The share of the run that is done, by tokens or by time, whichever is further."""
        tokens = self.step * self.plan.batch * self.plan.seqlen
        return max(tokens / self.plan.tokens, self.seconds / self.limit)

    def log(self, train: float, valid: float | None, lr: float, rate: float) -> None:
        """Append one line to the curve and print it. Raises `NumericalError` if the loss is no number."""
        if not math.isfinite(train):
            raise NumericalError(
                f"the loss is {train} at step {self.step}; start anew with a lower --lr than {self.plan.lr}"
            )
        tokens = self.step * self.plan.batch * self.plan.seqlen
        row = {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 2), "lr": lr, "train": train}
        row["valid"] = valid
        with open(self.curve, "a") as file:
            file.write(json.dumps(row) + "\n")
        done = self.progress()
        left = max(0.0, self.seconds * (1 - done) / done)
        shown = "" if valid is None else f" valid {valid:.4f} (ppl {math.exp(valid):.2f})"
        print(f"step {self.step} train {train:.4f}{shown} | {rate / 1e6:.3f} M tokens/s, {left:.0f} s left", flush=True)


def train(run: Run, windows: Windows, valid: np.ndarray | None, compiled: bool) -> None:
    """Train until the budget is used up; `run.model` then holds the final weights and `state.pt` matches it."""
    plan, model = run.plan, run.model
    loss_of = torch.compile(token_loss, dynamic=False) if compiled else token_loss
    for _ in range(2 if compiled else 0):
        # Compiling takes up to a minute: done here, it neither uses up the minutes nor skips the warm-up of the rate.
        loss_of(model, windows.at(run.step)).backward()
        model.zero_grad(set_to_none=True)
    job_left = 60 * plan.job_minutes - (time.monotonic() - STARTED)
    run.limit = min(run.limit, run.seconds + max(job_left, 1.0))
    parameters = list(model.parameters())
    total, since, last_save = torch.zeros((), device=model.device), 0, time.monotonic()
    mark = origin = time.monotonic() - run.seconds
    mark += run.seconds
    while (progress := run.progress()) < 1:
        lr = plan.lr * plan.factor(progress)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(model, windows.at(run.step))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        run.step, since, run.seconds = run.step + 1, since + 1, time.monotonic() - origin
        if run.step % LOG_EVERY and run.progress() < 1:
            continue
        mean = total.item() / since  # waits for the GPU, so the clock read next is the true one
        now = time.monotonic()
        run.seconds, rate = now - origin, since * plan.batch * plan.seqlen / (now - mark)
        due = run.step % plan.valid_every == 0 or run.progress() >= 1
        run.log(mean, validation_loss(model, valid, plan) if valid is not None and due else None, lr, rate)
        if now - last_save > SAVE_SECONDS:
            run.save()
            last_save = time.monotonic()
        total.zero_()
        since, mark = 0, time.monotonic()
    run.save()


def save_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, out: Path) -> None:
    """Write model and tokenizer to `out` as `AutoModelForCausalLM.from_pretrained` loads them.

    The model itself becomes bfloat16 too.
    """
    nn.Module.to(model, torch.bfloat16).eval()
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)


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
