"""Seconds, memory and the floor under them for a method on one block of a true shape with random weights.

python -m lsiq.bench.block --method qera-exact                   LLaMA-2-7B's shape, 128 x 2048 tokens
python -m lsiq.bench.block --method gptq --kernels auto plain    with the Triton kernel and with the plain loop, in turn
python -m lsiq.bench.block --method gptq --hidden 256 --intermediate 768 --heads 4 --samples 4 --seqlen 128
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from lsiq.bench.shapes import LLAMA, formats
from lsiq.bench.timing import FlopsByDtype, measured_rate
from lsiq.formats.quant import QuantSettings
from lsiq.methods.awq import AWQ
from lsiq.methods.base import Method
from lsiq.methods.gptq import GPTQ
from lsiq.methods.lqer import LQER
from lsiq.methods.rtn import RTN
from lsiq.models.block import Block
from lsiq.models.context import Context
from lsiq.models.loading import Model, load
from lsiq.models.result import BlockResult
from lsiq.models.settings import ModelSettings
from lsiq.runtime.device import find_device
from lsiq.runtime.memory import peak_bytes, reset_peak
from lsiq.runtime.timing import collect_stages
from lsiq.settings import fill

SCALES = {"lqer": "none", "l2qer": "magnitude", "qera-approx": "rms", "qera-exact": "covariance"}


def main() -> None:
    options = parse()
    device = find_device(options.device)
    model = shaped_model(options, device)
    tokens = torch.randint(0, model.config.vocab_size, (options.samples, options.seqlen))
    hidden, kwargs = model.embed(tokens, options.batch)
    block, quant = model.block(0, kwargs), formats(options.bits, options.group)
    methods = chosen_methods(options)
    results = []
    for method in methods:
        carry_out(method, block, quant, hidden[:1], options.batch)  # libraries load and kernels compile
        reset_peak()
        start = time.perf_counter()
        with collect_stages() as stages:
            results.append(carry_out(method, block, quant, hidden, options.batch))
        report(method, time.perf_counter() - start, stages, results[-1])
    for result in results[1:]:
        print(f"codes that are those of the first: {share_of_equal_codes(results[0], result):.6f}")
    report_floor(count_flops(methods[0], block, quant, hidden, options.batch), device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time a method on one block with random weights.")
    parser.add_argument("--method", choices=["rtn", "gptq", "awq", *SCALES], required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32, help="of the low-rank methods")
    parser.add_argument("--kernels", nargs="+", default=["auto"], choices=["auto", "plain"], help="of gptq, in turn")
    for name, value in {"hidden": 4096, "intermediate": 11008, "heads": 32, "samples": 128, "seqlen": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch", type=int, default=4, help="sequences that pass through the block at once")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.method != "gptq" and options.kernels != ["auto"]:
        parser.error(f"--kernels {' '.join(options.kernels)}: only gptq has a choice; leave it out")
    return options


def shaped_model(options: argparse.Namespace, device: torch.device) -> Model:
    """A LLaMA of one block with random weights."""
    architecture = {
        **LLAMA,
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": options.heads,
        "max_position_embeddings": options.seqlen,
    }
    shape = {"name": "block", "weights": "random", "architecture": architecture}
    settings = fill(ModelSettings, {**shape, "dtype": options.dtype, "seqlen": options.seqlen})
    return load(settings, None, device, seed=0)


def chosen_methods(options: argparse.Namespace) -> list[Method]:
    if options.method in SCALES:
        return [LQER(scale=SCALES[options.method], rank=options.rank)]  # type: ignore[arg-type]
    if options.method == "gptq":
        return [fill(GPTQ, {"kernels": kernels}) for kernels in options.kernels]
    return [{"rtn": RTN, "awq": AWQ}[options.method]()]


def carry_out(method: Method, block: Block, quant: QuantSettings, hidden: Tensor, batch: int) -> BlockResult:
    context = Context(hidden, None, torch.Generator().manual_seed(0), batch, lambda values: None)
    result = method.quantize_block(block, quant, context)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result


def share_of_equal_codes(first: BlockResult, second: BlockResult) -> float:
    equal = sum((first.weights[name].codes == tensor.codes).sum().item() for name, tensor in second.weights.items())
    return equal / sum(tensor.codes.numel() for tensor in second.weights.values())


def count_flops(method: Method, block: Block, quant: QuantSettings, hidden: Tensor, batch: int) -> dict[str, float]:
    """Operations by dtype on all of `hidden`, extrapolated from one and two batches: they are linear in the tokens."""
    counts = []
    for batches in (1, 2):
        with FlopsByDtype() as flops:
            carry_out(method, block, quant, hidden[: batches * batch], batch)
        counts.append(flops.counts)
    single, double = counts
    extra_batches = len(hidden) / batch - 1
    return {dtype: single[dtype] + extra_batches * (double[dtype] - single[dtype]) for dtype in double}


def report(method: Method, seconds: float, stages: dict[str, float], result: BlockResult) -> None:
    errors = [f"{key} {value:.6f}" for key, value in result.metrics.items() if key == "output_error"]
    print(f"{method.name}: {seconds:.2f} s", *[f"kernels={result.kernels}"] * bool(result.kernels), *errors, sep="; ")
    for name, spent in sorted(stages.items(), key=lambda item: -item[1]):
        print(f"  {name:<14} {spent:8.2f} s")
    print(f"  {'the rest':<14} {seconds - sum(stages.values()):8.2f} s")
    for place, peak in peak_bytes().items():
        print(f"peak of the {place}: {peak / 2**30:.2f} GiB")


def report_floor(flops: dict[str, float], device: torch.device) -> None:
    print("the floor: matrix products alone, at the rate of one large product of that dtype")
    total = 0.0
    for dtype, count in flops.items():
        rate = measured_rate(dtype, device)
        total += count / rate
        print(f"  {dtype:<14} {count / 1e12:8.2f} TFLOP at {rate / 1e12:.2f} TFLOP/s: {count / rate:.2f} s")
    print(f"  {'all':<14} {total:8.2f} s")


if __name__ == "__main__":
    main()
