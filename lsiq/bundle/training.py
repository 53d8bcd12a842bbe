"""A training run that can be stopped: its plan, its windows of text, its state and its loop."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lsiq.bundle.ladder import LADDER
from lsiq.bundle.model import build_model, token_loss
from lsiq.errors import InputError, NumericalError
from lsiq.runtime import processes

LOG_EVERY = 50  # steps; reading the loss waits for the GPU, which costs nothing measurable this rarely
STARTED = time.monotonic()  # of the process, for --job-minutes
SAVE_SECONDS = 60  # between two saves, or
SAVE_SHARE = 0.03  # of the time may go to saving, whichever is longer: the state of 300 million parameters has 3.5 GB


@dataclass(frozen=True)
class Plan:
    """What a training run does; `tokens`, `minutes` and `job_minutes` end it, whichever comes first.

    Attributes:
        batch: sequences of a step, of all processes together.
    """

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
    rung: str = "11m"

    def factor(self, progress: float) -> float:
        """The learning rate over its peak: linear warm-up, then a cosine that reaches 0 at `progress` 1."""
        if progress < self.warmup:
            return progress / self.warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup))))


class Windows:
    """Windows `(batch, seqlen + 1)` of a token stream; an epoch, cut at a random offset, takes each window once.

    `at(step)` depends on nothing but the seed and the step, so a resumed run sees what an unbroken one would have seen.
    Of several processes each is given its share of the batch.
    """

    def __init__(self, stream: np.ndarray, plan: Plan, device: torch.device):
        self.plan = plan
        self.count = len(stream) // plan.seqlen - 1  # one window less, which leaves room for the offset
        if self.count < plan.batch:
            need = (plan.batch + 1) * plan.seqlen
            raise InputError(f"--text holds {len(stream):,} tokens, fewer than {need:,}; lower --batch or --seqlen")
        if plan.batch % processes.size():
            raise InputError(f"--batch {plan.batch}: does not divide among {processes.size()} processes")
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
        start = self.starts[index * self.plan.batch : (index + 1) * self.plan.batch][processes.share(self.plan.batch)]
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
        self.model = build_model(plan.family, vocab, LADDER[plan.rung])
        nn.Module.to(self.model, device)  # transformers' own `to` is typed for itself only
        self.optimizer = make_optimizer(self.model, plan.lr)
        # Only what fixes the data order and the shapes: the budgets and the rate may change between two calls.
        fixed = {name: getattr(plan, name) for name in ("family", "rung", "batch", "seqlen", "seed")}
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
            tell(f"resumed at step {self.step}, {self.seconds:.0f} s")
        if not processes.first():
            return
        lines = self.curve.read_text().splitlines() if self.curve.exists() else []
        lines = [line for line in lines if json.loads(line)["step"] <= self.step]
        self.curve.write_text("".join(line + "\n" for line in lines))

    def save(self) -> None:
        """Replace `out/state.pt`; a kill in between leaves the old one. Of several processes the first does it."""
        if not processes.first():
            return
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
        if not processes.first():
            return
        tokens = self.step * self.plan.batch * self.plan.seqlen
        row = {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 2), "lr": lr, "train": train}
        row["valid"] = valid
        with open(self.curve, "a") as file:
            file.write(json.dumps(row) + "\n")
        progress = self.progress()
        remaining = max(0.0, self.seconds * (1 - progress) / progress)
        validation = "" if valid is None else f" valid {valid:.4f} (ppl {math.exp(valid):.2f})"
        tell(f"step {self.step} train {train:.4f}{validation} | {rate / 1e6:.3f} M tokens/s, {remaining:.0f} s left")


def tell(message: str) -> None:
    """Print a line at once; of several processes the first speaks."""
    if processes.first():
        print(message, flush=True)


def agreed(seconds: float) -> float:
    """Return what the first process's clock says: rates follow it, so all must go by the same one."""
    value = torch.tensor(seconds, dtype=torch.float64)
    processes.take_from_first([value])
    return value.item()


def train(run: Run, windows: Windows, valid: np.ndarray | None, compiled: bool) -> None:
    """Train until the budget is used up; `run.model` then holds the final weights and `state.pt` matches it.

    Several processes take the very steps of one, each with its share of every batch, up to the order of summation.
    """
    plan, model = run.plan, run.model
    loss_of = torch.compile(token_loss, dynamic=False) if compiled else token_loss
    for _ in range(2 if compiled else 0):
        # Compiling takes up to a minute: done here, it neither uses up the minutes nor skips the warm-up of the rate.
        loss_of(model, windows.at(run.step)).backward()
        model.zero_grad(set_to_none=True)
    job_left = 60 * plan.job_minutes - (time.monotonic() - STARTED)
    run.limit = agreed(min(run.limit, run.seconds + max(job_left, 1.0)))
    parameters = list(model.parameters())
    total, since, next_save = torch.zeros((), device=model.device), 0, time.monotonic() + SAVE_SECONDS
    mark = time.monotonic()
    origin = mark - run.seconds
    while (progress := run.progress()) < 1:
        lr = plan.lr * plan.factor(progress)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(model, windows.at(run.step)) / processes.size()
        loss.backward()
        processes.add_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        run.step, since, run.seconds = run.step + 1, since + 1, agreed(time.monotonic() - origin)
        if run.step % LOG_EVERY and run.progress() < 1:
            continue
        mean = processes.add(total).item() / since  # waits for the GPU, so the clock read next is the true one
        now = time.monotonic()
        run.seconds, rate = agreed(now - origin), since * plan.batch * plan.seqlen / (now - mark)
        due = (run.step % plan.valid_every == 0 or run.progress() >= 1) and processes.first()
        run.log(mean, validation_loss(model, valid, plan) if due and valid is not None else None, lr, rate)
        if now > next_save:
            run.save()
            took = time.monotonic() - now
            next_save = now + max(SAVE_SECONDS, took / SAVE_SHARE)
        total.zero_()
        since, mark = 0, time.monotonic()
    run.save()
