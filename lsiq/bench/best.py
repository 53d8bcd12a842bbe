"""The best recipe on a whole model of a true shape with random weights: some blocks, then a share of the end stage.

python -m lsiq.bench.best --blocks 8 --end-share 0.1            LLaMA-2-7B, 128 x 2048 tokens, one card of 80 GiB
python -m lsiq.bench.best --memory 40 method.weight_only.training.precision=bfloat16
python -m lsiq.bench.best --small --layers 4 --blocks 2 --samples 8 --seqlen 32 --form window --window 2 --device cpu

Blocks that are not quantised by the recipe are rounded to nearest. What is not run is projected stage by stage.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from lsiq.bench.shapes import LLAMA, LLAMA_3, random_model
from lsiq.bench.timing import report_ceilings
from lsiq.data.tokens import random_windows
from lsiq.experiment.config import RunConfig, parse
from lsiq.methods.finetune import FineTune
from lsiq.methods.finetune.form import GIB, form_for
from lsiq.methods.finetune.windows import groups
from lsiq.methods.rtn import RTN
from lsiq.models.context import Context
from lsiq.models.loading import Model
from lsiq.pipeline.block_loop import BlockReport, quantize
from lsiq.results.store import BlockStore
from lsiq.runtime.device import find_device
from lsiq.runtime.hydra_entry import version_base
from lsiq.runtime.memory import peak_bytes, reset_peak

_CONF = Path(__file__).parent.parent.parent / "conf"
SHAPES = {"llama-2-7b": LLAMA, "llama-3-8b": LLAMA_3}
say = partial(print, flush=True)


def main() -> None:
    options = arguments()
    device = find_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.card * GIB / whole), device)
        say(f"{torch.cuda.get_device_name(device)}, of which {min(options.card, whole / GIB):.0f} GiB may be used")
    say(f"torch {torch.__version__}")
    report_ceilings(options.precision if device.type == "cuda" else "float32", device)
    config = settings(options)
    assert isinstance(config.method, FineTune)
    bench = Bench(random_model(options, SHAPES[options.shape], options.layers, device), config, config.method)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        start = Path(folder) / "start"
        blocks = bench.blocks(BlockStore(start / "blocks"), options.blocks)
        end = bench.end(start, BlockStore(Path(folder) / "blocks"), options.end_share)
    say(
        f"projected: {blocks / 60:.1f} min for the blocks, {end / 60:.1f} for the end, {(blocks + end) / 60:.1f} in all"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the best recipe on a whole model with random weights.")
    parser.add_argument("overrides", nargs="*", help="further settings of the run, key=value each")
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=8, help="that are quantised by the recipe")
    parser.add_argument("--end-share", type=float, default=0.1, help="of the end stage's epochs")
    parser.add_argument("--form", default="auto", choices=["auto", "all", "window", "grid"])
    parser.add_argument("--window", type=int, help="blocks of a window; as many as fit where it is left out")
    parser.add_argument("--memory", type=float, default=70, help="GiB by which the form is chosen")
    parser.add_argument("--card", type=float, default=80, help="GiB that the process may take at most")
    for name, value in {"layers": 32, "samples": 128, "seqlen": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--quant", default="w2a16g128")
    parser.add_argument("--precision", default="float16", help="of the model on a GPU")
    parser.add_argument("--folder", help="where blocks are kept meanwhile")
    parser.add_argument("--small", action="store_true", help="a width that a CPU can carry")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def settings(options: argparse.Namespace) -> RunConfig:
    """The recipe as it is committed, with the form that is asked for."""
    end = "method.weight_only"
    window = "null" if options.window is None else options.window
    fixed = [
        *("method=best", f"quant={options.quant}", "calib=random", "eval=none", "tracker=none"),
        *(f"calib.samples={options.samples}", f"calib.seqlen={options.seqlen}"),
        *(f"{end}.trained={options.form}", f"{end}.window={window}", f"{end}.memory={options.memory}"),
    ]
    with initialize_config_dir(str(_CONF), **version_base()):
        return parse(compose("config", overrides=[*fixed, *options.overrides]))


@dataclass(frozen=True)
class Bench:
    model: Model
    config: RunConfig
    method: FineTune

    @property
    def tokens(self) -> Tensor:
        calib = self.config.calib
        return random_windows(self.model.config.vocab_size, calib.samples, calib.seqlen, 0)

    def blocks(self, store: BlockStore, count: int) -> float:
        """Quantise some blocks by the recipe and round the others; return the projected seconds of all."""
        assert self.method.start is not None
        store.open()
        reset_peak()
        seconds: list[float] = []
        before = time.perf_counter()
        loop = quantize(
            self.model, self.method.start, self.config.quant, self.tokens, self.config.calib.batch, 0, store, _quiet
        )
        for report in loop:
            seconds.append(time.perf_counter() - before)
            before = time.perf_counter()
            epoch = report.metrics.get("epoch_seconds", 0.0)
            say(f"block {report.index}: {seconds[-1]:.2f} s, {epoch:.3f} s an epoch, {report.kernels}; {_peaks()}")
            if len(seconds) == min(count, self.model.depth):
                break
        loop.close()
        before = time.perf_counter()
        self._round(store, len(seconds))
        say(f"the other blocks rounded in {time.perf_counter() - before:.1f} s")
        later = sorted(seconds[1:] or seconds)
        return seconds[0] + (self.model.depth - 1) * later[len(later) // 2]

    def _round(self, store: BlockStore, first: int) -> None:
        """Fill the store with the later blocks, rounded to nearest."""
        _, kwargs = self.model.embed(self.tokens[:1], 1)
        context = Context(None, None, torch.Generator(), 1, _quiet)
        before = store.finished_blocks(first)[-1].digest
        for index in range(first, self.model.depth):
            block = self.model.block(index, kwargs).under(self.config.quant)
            result = RTN().quantize_block(block, self.config.quant.in_block(index), context)
            before = store.write(index, result, before)
        store.wait()

    def end(self, start: Path, store: BlockStore, share: float) -> float:
        """Carry out a share of the end stage's epochs; return the projected seconds of all."""
        whole = form_for(self.method, self.model, self.config.quant, *self.tokens.shape)
        method = whole.of(self.method).after(str(start))
        epochs = max(1, round(share * method.training.epochs))
        of_windows = None if method.window_epochs is None else max(1, round(share * method.window_epochs))
        part = replace(method, training=replace(method.training, epochs=epochs), window_epochs=of_windows)
        each = f"{part.weight_epochs} of {method.weight_epochs} epochs" + (" each" if method.window else "")
        say(f"end stage: {whole.words} ({whole.reason}); {each}")
        store.open()
        reset_peak()
        before = time.perf_counter()
        told = partial(_tell_epoch, before)
        loop = quantize(self.model, part, self.config.quant, self.tokens, self.config.calib.batch, 0, store, told)
        reports = list(loop)
        seconds = time.perf_counter() - before
        say(f"end stage: {seconds:.1f} s; {_peaks()}")
        return seconds + self._remaining(part, method, reports)

    def _remaining(self, part: FineTune, method: FineTune, reports: Sequence[BlockReport]) -> float:
        """Tell what a step took in each window, and return the seconds of the steps that were not taken."""
        (taken,), (whole,) = (groups(tried, self.model.depth, len(self.tokens)) for tried in (part, method))
        seconds = 0.0
        for run, planned in zip(taken.windows, whole.windows, strict=True):
            step = reports[run.blocks[0]].metrics["step_seconds"]
            seconds += (len(planned.steps) - len(run.steps)) * step
            say(
                f"weights of blocks {run.blocks[0]} to {run.blocks[-1]}: {step:.2f} s a step, {len(run.steps)} of "
                f"{len(planned.steps)} steps"
            )
        say(f"loss {reports[0].metrics['loss_first']:.4g}")
        return seconds


def _peaks() -> str:
    peaks = ", ".join(f"{place} {size / GIB:.2f} GiB" for place, size in peak_bytes().items())
    if not torch.cuda.is_initialized():
        return f"peak {peaks}"
    return f"peak {peaks} ({torch.cuda.max_memory_reserved() / GIB:.2f} reserved)"


def _tell_epoch(start: float, values: Mapping[str, Any]) -> None:
    """Say when an epoch of the end stage ended, so that a bench that is cut off has told its times."""
    if "finetune/loss" in values:
        say(f"{time.perf_counter() - start:.1f} s: an epoch ended, loss {values['finetune/loss']:.4g}")


def _quiet(values: object) -> None:
    del values


if __name__ == "__main__":
    main()
