"""Measure every export of the bundled models at 2, 3 and 4 bits: logits, perplexity and size, as a table on stdout.

    python analysis/exports.py DIR

Each model is rounded to nearest with float16 scales, exported in every format that holds it, and read back by the
format's foreign loader, which then reads the same windows as the run's own evaluation. Formats whose loader is not
installed stay in the table without numbers.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lsiq.assets import bundled_model
from lsiq.data.corpora import read_corpus
from lsiq.data.tokens import cut_windows
from lsiq.errors import LsiqError
from lsiq.experiment.config import parse
from lsiq.experiment.run import run
from lsiq.export.base import Logits, installed
from lsiq.results.record import Record
from lsiq.runtime.hydra_entry import version_base

CONF = Path(__file__).resolve().parent.parent / "conf"
FORMATS = ("compressed-tensors", "gptq", "gguf", "plain")
WINDOWS = 16


def main(folder: Path) -> None:
    print("| model | quant | export | read back by | max difference | perplexity: run | export | MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for model in ("tiny-llama", "tiny-opt"):
        for quant in ("w2a16g128", "w3a16g128", "w4a16g128"):
            base = [f"model={model}", f"quant={quant}", "quant.weight.scale=float16", "tracker=none", "eval.rtn=false"]
            base += [f"eval.windows={WINDOWS}", f"paths.runs={folder}"]
            for export in FORMATS:
                print(f"| {model} | {quant} | {export} | {row([*base, f'export={export}'])} |", flush=True)


def row(overrides: list[str]) -> str:
    cfg = composed(overrides)
    try:
        config = parse(cfg)
        record = run(cfg)
    except LsiqError as error:
        return f"refused: {error} | | | |"
    assert config.export is not None
    assert config.model.bundled is not None
    entry = record.exports[config.export.name]
    (check,) = entry["checks"]
    (loader,) = config.export.loaders
    megabytes = f"{entry['weight_bytes'] / 1e6:.2f}"
    if None in installed(loader.packages).values():
        return f"({check['loader']}) | | {own(record):.4f} | | {megabytes}"
    measured = perplexity(loader.load(Path(entry["folder"])), bundled_model(config.model.bundled), config.eval.seqlen)
    difference = f"{check['difference']:.2g}"
    return f"{check['loader']} | {difference} | {own(record):.4f} | {measured:.4f} | {megabytes}"


def composed(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), **version_base()):
        return compose("config", overrides=overrides)


def own(record: Record) -> float:
    return next(value for key, value in record.metrics.items() if key.startswith("ppl/"))


@torch.no_grad()
def perplexity(logits: Logits, checkpoint: Path, seqlen: int) -> float:
    from transformers import AutoTokenizer

    text = read_corpus("bundled", "evaluation", None, ["text"])
    windows = cut_windows(text, AutoTokenizer.from_pretrained(checkpoint), seqlen, "bundled")[:WINDOWS]
    total = 0.0
    for window in windows.split(4):
        found = logits(window)[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(found, window[:, 1:].flatten(), reduction="none")
        total += losses.double().sum().item()
    return math.exp(total / (windows.shape[0] * (seqlen - 1)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
