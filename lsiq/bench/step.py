"""The learner's step on blocks of true shapes with random weights: time by part, memory, ceilings, a whole model.

python -m lsiq.bench.step                               every case of docs/performance.md that takes a step
python -m lsiq.bench.step --only lsi-1 lwc-4            some of them
python -m lsiq.bench.step --only lsi-4 --profile        and the kernels that a step of each launches, the longest first
python -m lsiq.bench.step --whole 2                     a whole LLaMA-2-7B with random weights, 2 epochs really run
python -m lsiq.bench.step --small                       the same on a block that a CPU can carry
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lsiq.bench.shapes import LLAMA, LLAMA_3, OPT, QWEN_3, SMOLLM2, course, formats, random_model
from lsiq.bench.timing import FlopsByDtype, Mark, median_ms, report_ceilings
from lsiq.bench.whole import run_whole
from lsiq.learning.batches import BatchFeeder
from lsiq.learning.look_ahead import look_ahead
from lsiq.learning.schedule import LookAhead
from lsiq.learning.step import Stepper
from lsiq.learning.trained import Trained, start_parts
from lsiq.learning.weight_path import choose, on_path
from lsiq.models.block import Block, FloatStream
from lsiq.models.context import Ahead, Context
from lsiq.parts.base import Part, PartState
from lsiq.parts.clip import Clip
from lsiq.parts.equivalent import Equivalent
from lsiq.parts.expansion import Expansion
from lsiq.parts.rounding import Rounding
from lsiq.parts.singular import Singular
from lsiq.runtime.device import find_device
from lsiq.runtime.memory import peak_bytes, reset_peak
from lsiq.settings import fill

SAMPLES, DEPTH = 8, 3
# Rates and corner that a step costs the same with, whatever they are.
RATE, DIAGONAL = {"lr": 1e-3}, {"lr": 1e-3, "corner": 0}
LSI, LET, CLIP = fill(Singular, DIAGONAL), fill(Equivalent, {"weight_only_families": None}), fill(Clip, RATE)
# The parts of method=lsi.
RECIPE = (fill(Singular, {**DIAGONAL, "unit": "step"}), fill(Clip, {**RATE, "search": True}), fill(Rounding, RATE))
# The parts of method=autoround, which move by signed gradients.
AUTOROUND = (fill(Rounding, RATE), fill(Clip, {**RATE, "form": "linear"}))


@dataclass(frozen=True)
class Case:
    """A setting whose step is timed.

    Attributes:
        mark: what it is to reach, in milliseconds per sample.
        ahead: later blocks that count in the loss.
        signed: names of the parts that take signed-gradient steps.
    """

    name: str
    parts: Sequence[Part]
    batch: int
    mark: str
    shape: dict[str, Any]
    bits: int = 4
    group: int | None = 128
    activation: int = 16
    ahead: int = 0
    signed: Sequence[str] = ()


CASES = (
    Case("lsi-1", (LSI, CLIP), 1, "≤ 9.5", LLAMA),
    Case("lsi-4", (LSI, CLIP), 4, "≤ 5.2", LLAMA),
    Case("lwc-1", (CLIP,), 1, "", LLAMA),
    Case("lwc-4", (CLIP,), 4, "≤ 4.1", LLAMA),
    Case("corner-4", (fill(Singular, {**RATE, "corner": 300}), CLIP), 4, "", LLAMA),
    Case("corner-half-4", (fill(Singular, {**RATE, "corner": 0.5}), CLIP), 4, "", LLAMA),
    Case("recipe-4", RECIPE, 4, "", LLAMA),
    Case("autoround-4", AUTOROUND, 4, "", LLAMA, signed=("rounding", "clip")),
    Case("sde8-4", (fill(Expansion, {**DIAGONAL, "width": 8}), CLIP), 4, "≤ 1.1 × lsi-4", LLAMA),
    Case("cl2-4", (LSI, CLIP), 4, "≤ 2.0 × lsi-4", LLAMA, ahead=2),
    Case("w4a4-let-4", (LSI, LET, CLIP), 4, "≤ 10", LLAMA, group=None, activation=4),
    Case("llama-3-lsi-4", (LSI, CLIP), 4, "", LLAMA_3),
    Case("llama-3-recipe-4", RECIPE, 4, "", LLAMA_3),
    Case("qwen-3-lsi-4", (LSI, CLIP), 4, "", QWEN_3),
    Case("qwen-3-recipe-4", RECIPE, 4, "", QWEN_3),
    Case("opt-let-1", (LSI, LET, CLIP), 1, "", OPT),
    Case("opt-let-4", (LSI, LET, CLIP), 4, "≤ 6", OPT),
    Case("opt-w4a4-let-4", (LSI, LET, CLIP), 4, "", OPT, group=None, activation=4),
    Case("smollm2-recipe-8", RECIPE, 8, "", SMOLLM2, group=64),
    Case("smollm2-w4a4-recipe-8", RECIPE, 8, "", SMOLLM2, group=None, activation=4),
)


def main() -> None:
    options = parse()
    device = find_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    print(f"{_machine(device)}; torch {torch.__version__}; training in {options.precision}, {options.kernels}")
    rate = report_ceilings(options.precision, device)
    if options.whole:
        run_whole(options, device)
        return
    print("| case | ms/step | ms/sample | mark | weights fwd | tokens fwd | tokens bwd | weights bwd | optimizer "
          "| peak GiB | of the matmul ceiling |")  # fmt: skip
    print("|" + " --- |" * 11)
    for shape in (LLAMA, LLAMA_3, QWEN_3, OPT, SMOLLM2):
        cases = [c for c in CASES if c.shape is shape and (not options.only or c.name in options.only)]
        if cases:
            bench = Bench(options, shape, device)
            for case in cases:
                print(bench.row(case, rate), flush=True)
                if options.profile:
                    print(bench.profile(case), flush=True)
            if shape is LLAMA and options.plain:
                print(bench.row(replace(cases[0], name=f"{cases[0].name} plain"), rate, "plain"), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the learner's step on blocks with random weights.")
    parser.add_argument(
        "--only", nargs="*", choices=[case.name for case in CASES], help="cases to time; all if left out"
    )
    parser.add_argument("--precision", default="float16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--kernels", default="auto", choices=["auto", "triton", "compile", "plain"])
    parser.add_argument("--plain", action="store_true", help="time the first case on the plain path as well")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a step below each case")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each case")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--small", action="store_true", help="a block that a CPU can carry")
    parser.add_argument("--whole", type=int, metavar="EPOCHS", help="quantise a whole model for so many epochs")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of the whole model")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the whole model")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step of the whole model")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


class Bench:
    """One block of a shape, its streams, and what is timed on it."""

    def __init__(self, options: argparse.Namespace, shape: dict[str, Any], device: torch.device) -> None:
        self.options, self.device = options, device
        model = random_model(options, shape, DEPTH, device)
        tokens = torch.zeros(SAMPLES, options.seqlen, dtype=torch.long)
        hidden, kwargs = model.embed(tokens, 4)
        self.hidden = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(device, hidden.dtype)
        self.block: Block = model.block(0, kwargs)

        def read(index: int) -> Block:
            return model.block(index, kwargs) if index else self.block

        stream = FloatStream(read, self.hidden, 4)
        ahead = Ahead(DEPTH, read, model.logits, stream.after)
        self.context = Context(
            self.hidden, stream.after(0), torch.Generator().manual_seed(0), 4, lambda values: None, ahead=ahead
        )

    def stepper(self, case: Case, kernels: str, states: Sequence[PartState] | None = None) -> Stepper:
        """Return what takes the steps of a case, as the learner would."""
        quant = formats(case.bits, 32 if self.options.small and case.group else case.group, case.activation)
        ahead = fill(LookAhead, {"blocks": case.ahead})
        training = course(1, case.batch, self.options.precision, kernels, ahead=ahead, signed=list(case.signed))
        with torch.no_grad():
            states = states or start_parts(case.parts, self.block, quant, self.context)
            path = choose(training, case.parts, states, self.block, quant)
            window = look_ahead(case.parts, training, self.block, quant, self.context, path)
        running = on_path(training.in_precision(self.block), path, training)
        trained = Trained(case.parts, states, running, quant, path).trainable()
        feed = BatchFeeder(self.hidden, window.targets, case.batch, running.dtype, self.device, len(self.hidden))
        stepper = Stepper(trained, training, feed, window, 1.0)
        stepper.losses = stepper.losses.new_zeros(10_000)
        return stepper

    def row(self, case: Case, rate: float, kernels: str | None = None) -> str:
        """Return the table's line for a case."""
        stepper = self.stepper(case, kernels or self.options.kernels)
        samples = torch.arange(case.batch, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        reset_peak()
        step = median_ms(lambda: stepper.step(samples, 0.5), self.options.steps, self.device)
        peak = peak_bytes().get(
            self.device.type if self.device.type == "cuda" else "host", peak_bytes().get("device", 0)
        )
        parts = " | ".join(f"{ms:.2f}" for ms in part_times(stepper, case.batch, self.device))
        plain = self.stepper(case, "plain", stepper.trained.snapshot())
        plain.feed.load(samples)
        with FlopsByDtype() as flops:
            plain.take(case.batch)
        share = sum(flops.counts.values()) / rate / (step / 1000)
        return (
            f"| {case.name} | {step:.2f} | {step / case.batch:.2f} | {case.mark} | {parts} | {peak / 2**30:.2f} "
            f"| {share:.0%} |"
        )

    def profile(self, case: Case, steps: int = 5) -> str:
        """Return a table of what a recorded step launches: each kernel's calls and time in so many steps."""
        stepper = self.stepper(case, self.options.kernels)
        samples = torch.arange(case.batch, device=self.device)
        median_ms(lambda: stepper.step(samples, 0.5), 2, self.device)
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
        with profile(activities=activities) as found:
            for _ in range(steps):
                stepper.step(samples, 0.5)
            if on_gpu:
                torch.cuda.synchronize()
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        return found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)


def part_times(stepper: Stepper, batch: int, device: torch.device, repeats: int = 5) -> list[float]:
    """Return the milliseconds of a step's parts, launched one by one: weights, tokens, both backward, optimizer."""
    rows = []
    for _ in range(repeats):
        marks = [Mark(device)]
        stepper.descent.forget_gradients()
        marks[0] = Mark(device)
        weights, leaves = stepper.make_weights()
        marks.append(Mark(device))
        loss = stepper.loss(slice(0, batch), weights, leaves)
        marks.append(Mark(device))
        stepper.backward_tokens(loss)
        marks.append(Mark(device))
        stepper.backward_weights(weights, leaves)
        marks.append(Mark(device))
        stepper.last_loss = loss.detach()
        stepper.move()
        marks.append(Mark(device))
        rows.append([later.since(earlier) for earlier, later in itertools.pairwise(marks)])
    return [sorted(column)[repeats // 2] for column in zip(*rows, strict=True)]


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
