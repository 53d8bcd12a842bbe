"""One block of a true shape with random weights, quantised by one process and by several.

python -m lsiq.bench.processes "method=lsi method.training.epochs=4"         LLaMA-2-7B's shape, 128 x 2048 tokens
python -m lsiq.bench.processes --processes 1 2 --hidden 128 --intermediate 256 --heads 2 --samples 8 --seqlen 32 \\
    --device cpu "method=lsi method.training.epochs=2 method.training.batch=4" "method=gptq"
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from lsiq.data.tokens import random_windows
from lsiq.experiment.config import RunConfig, parse
from lsiq.models.checkpoint import MemoryCheckpoint
from lsiq.models.loading import Model, load
from lsiq.pipeline.block_loop import quantize
from lsiq.results.store import BlockStore
from lsiq.runtime import processes as distributed
from lsiq.runtime.device import find_device
from lsiq.runtime.hydra_entry import version_base
from lsiq.runtime.memory import peak_bytes, reset_peak

_CONF = Path(__file__).parent.parent.parent / "conf"
# What the recipes of learned methods take; measured are fewer.
EPOCHS = 20


def main() -> None:
    options = arguments()
    if options.inside:
        with distributed.together(options.device):
            carry_out(options)
        return
    measurements: dict[tuple[int, str], dict[str, Any]] = {}
    for processes in options.processes:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launch, "-m", "lsiq.bench.processes", "--inside", *sys.argv[1:]]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
        measurements |= {(processes, row["job"]): row for row in rows}
    report(measurements, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one block under one and under several processes.")
    parser.add_argument("jobs", nargs="+", help="settings of a run, key=value each, blanks between them")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    sizes = {"hidden": 4096, "intermediate": 11008, "heads": 32, "samples": 128, "seqlen": 2048, "batch": 8}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def carry_out(options: argparse.Namespace) -> None:
    """Quantise the block by each job and print what came of it; before that a few sequences, so that all is set up."""
    device = find_device(options.device)
    model = None
    for job in options.jobs:
        config = settings(options, job)
        if model is None:
            model = load(config.model, None, device, config.seed)
            model = replace(model, checkpoint=MemoryCheckpoint(model.checkpoint))
            few = 2 * max(config.calib.batch, training.batch if (training := config.method.training) is not None else 1)
            quantize_block(config, model, few)
        row = quantize_block(config, model, options.samples)
        if distributed.first():
            print(json.dumps({"job": job, **row}), flush=True)


def settings(options: argparse.Namespace, job: str) -> RunConfig:
    """The settings of a run of a model with one block."""
    shape = (
        f"{{model_type:llama,vocab_size:32000,hidden_size:{options.hidden},intermediate_size:{options.intermediate},"
        f"num_hidden_layers:1,num_attention_heads:{options.heads},num_key_value_heads:{options.heads},tie_word_embeddings:true,"
        f"max_position_embeddings:{options.seqlen}}}"
    )
    fixed = [
        *("model=llama-2-7b", "model.weights=random", f"model.architecture={shape}", f"model.seqlen={options.seqlen}"),
        *("calib=random", f"calib.batch={options.batch}", "eval=none", "tracker=none", "quant=w4a16g128"),
    ]
    with initialize_config_dir(str(_CONF), **version_base()):
        return parse(compose("config", overrides=[*fixed, *job.split()]))


def quantize_block(config: RunConfig, model: Model, samples: int) -> dict[str, Any]:
    """Return the seconds of the block, streams and storing included, and of an epoch where there are some."""
    reset_peak()
    tokens = random_windows(model.config.vocab_size, samples, config.calib.seqlen, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        store = BlockStore(Path(distributed.from_first(folder)))
        (block_report,) = quantize(
            model, config.method, config.quant, tokens, config.calib.batch, 0, store, lambda values: None
        )
        distributed.wait()
    epochs = 0 if config.method.training is None else config.method.training.epochs
    row = {"seconds": block_report.seconds, "error": block_report.error, "epochs": epochs, **peak_bytes()}
    return row | {
        name: block_report.metrics[name] for name in ("epoch_seconds", "loss_last") if name in block_report.metrics
    }


def report(measurements: dict[tuple[int, str], dict[str, Any]], options: argparse.Namespace) -> None:
    """Print, by job and number of processes, the seconds and how many times as fast they are."""
    least = options.processes[0]
    for job in options.jobs:
        print(job)
        for processes in options.processes:
            row, alone = measurements[processes, job], measurements[least, job]
            line = f"  {processes} processes: block {row['seconds']:7.2f} s ({alone['seconds'] / row['seconds']:.2f} x)"
            if "epoch_seconds" in row:
                total, before = (r["seconds"] + (EPOCHS - r["epochs"]) * r["epoch_seconds"] for r in (row, alone))
                line += f", epoch {row['epoch_seconds']:.3f} s ({alone['epoch_seconds'] / row['epoch_seconds']:.2f} x)"
                line += f", {EPOCHS} epochs {total:.1f} s ({before / total:.2f} x), loss {row['loss_last']:.4g}"
            peaks = ", ".join(f"{name} {row[name] / 2**30:.2f} GiB" for name in ("host", "device") if name in row)
            print(f"{line}, error {row['error']:.4g}, peak {peaks}")


if __name__ == "__main__":
    main()
