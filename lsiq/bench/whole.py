"""A whole model with random weights, quantised from its first to its last block."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from lsiq.bench.shapes import LLAMA, course, formats, random_model
from lsiq.methods.learned import Learned
from lsiq.parts.clip import Clip
from lsiq.parts.singular import Singular
from lsiq.pipeline.block_loop import quantize
from lsiq.results.store import BlockStore
from lsiq.runtime.memory import peak_bytes, reset_peak
from lsiq.settings import fill


def run_whole(options: argparse.Namespace, device: torch.device) -> None:
    """Quantise a model from its first to its last block; print where the time went and what 20 epochs would take."""
    model = random_model(options, LLAMA, options.layers, device)
    training = course(options.whole, options.batch, options.precision, options.kernels)
    method = Learned(
        label="lsi", parts=[fill(Singular, {"lr": 1e-3, "corner": 0}), fill(Clip, {"lr": 1e-2})], training=training
    )
    quant = formats(4, 32 if options.small else 128)
    tokens = torch.randint(0, 32000, (options.samples, options.seqlen), generator=torch.Generator().manual_seed(0))
    reset_peak()
    start, epochs, blocks = time.perf_counter(), [], []
    with tempfile.TemporaryDirectory() as folder:
        store = BlockStore(Path(folder))
        for report in quantize(model, method, quant, tokens, 4, 0, store, lambda values: None):
            epochs.append(report.metrics["epoch_seconds"])
            blocks.append(report.seconds)
            print(
                f"block {report.index}: {report.seconds:.2f} s, {epochs[-1]:.3f} s an epoch, {report.kernels}",
                flush=True,
            )
    total, middle = time.perf_counter() - start, sorted(epochs)[len(epochs) // 2]
    print(f"whole model, {options.whole} epochs: {total:.0f} s; first block {blocks[0]:.1f} s")
    print(f"an epoch of a block {middle:.3f} s = {1000 * middle / options.samples:.2f} ms/sample")
    projected = total + (20 - options.whole) * middle * options.layers
    print(f"projected for 20 epochs: {projected / 60:.2f} min; peak {peak_bytes()}")
