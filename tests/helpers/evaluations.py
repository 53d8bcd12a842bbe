"""Plain evaluations of a few lines, to compare with, and models that are easy to tell apart."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lsiq.models.block import Block, BlockFunction
from lsiq.results.record import Record
from lsiq.runtime.cache import ContentCache

NO_CACHE = ContentCache(None, {}, {})


def halved(block: Block) -> BlockFunction:
    """Another model: the block with every linear at half its size."""
    return block.with_weights({name: block.weights[name] / 2 for name in block.linears})


def request(kind: str, *arguments: Any) -> Any:
    """A request of the harness; 0.5 wants its item's number, and gives whole texts an empty context."""
    from lm_eval.api.instance import Instance

    if not version("lm_eval").startswith("0.5"):
        return Instance(kind, {}, arguments, 0)
    context = ("",) if kind == "loglikelihood_rolling" else ()
    return Instance(kind, {}, (*context, *arguments), "task", doc_id=0)


def unchanged(block: Block) -> BlockFunction:
    return block.with_weights({})


def plain_perplexity(checkpoint: Path, text: str, seqlen: int) -> float:
    """The protocol as the papers' code writes it: one plain forward per window."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt").input_ids
    count = ids.shape[1] // seqlen
    total = 0.0
    for i in range(count):
        part = ids[:, i * seqlen : (i + 1) * seqlen]
        with torch.no_grad():
            logits = model(part, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].double(), part[0, 1:])
        total += loss.item() * seqlen
    return math.exp(total / (count * seqlen))


# Two rows in the flat layout of each task, as public evaluation sets have it, and the first prompt and answers that
# the harness' definition makes of the hub's row of the same item.
FLAT_ROWS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "arc_easy": (
        {"query": "Question: What melts ice?", "choices": ["heat", "cold"], "gold": 0},
        "Question: What melts ice?\nAnswer:",
        [" heat", " cold"],
    ),
    "arc_challenge": (
        {"query": "Question: What melts ice?", "choices": ["heat", "cold", "salt", "dust", "wind"], "gold": 4},
        "Question: What melts ice?\nAnswer:",
        [" heat", " cold", " salt", " dust", " wind"],
    ),
    "boolq": (
        {"query": "Passage: Ice floats.\nQuestion: does ice float?", "choices": ["no", "yes"], "gold": 1},
        "Ice floats.\nQuestion: does ice float?\nAnswer:",
        [" no", " yes"],
    ),
    "piqa": (
        {"query": "Question: melt ice\n", "choices": ["Warm it.", "Cool it."], "gold": 0},
        "Question: melt ice\nAnswer:",
        [" Warm it.", " Cool it."],
    ),
    "openbookqa": (
        {"query": "Ice melts when it is", "choices": ["warm", "cold"], "gold": 0},
        "Ice melts when it is",
        [" warm", " cold"],
    ),
    "hellaswag": (
        {"query": "Ice: A man skates. he", "choices": ["falls.", "flies."], "gold": 0},
        "Ice: A man skates. He",
        [" falls.", " flies."],
    ),
    "winogrande": (
        {"context_options": ["Ann met Mary so Mary", "Ann met Mary so Marta"], "continuation": "waved.", "gold": 0},
        "Ann met Mary so Mary",
        [" waved.", " waved."],
    ),
    "lambada_openai": (
        {"context": "The ice began\n\nto", "continuation": "melt"},
        "The ice began\n\nto",
        [" melt"],
    ),
}


def plain_likelihoods(folder: Path, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Log likelihood of each continuation, and whether it is the greedy one: one plain forward each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for context, continuation in pairs:
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids
        start = len(tokenizer(context).input_ids)
        with torch.no_grad():
            predicted = model(ids[:, :-1], use_cache=False).logits[0, start - 1 :].log_softmax(-1)
        targets = ids[0, start:]
        losses = predicted.gather(1, targets[:, None])
        found.append((losses.sum().item(), bool((predicted.argmax(-1) == targets).all())))
    return found


def plain_accuracy(folder: Path, rows: list[dict[str, Any]], prompt: str) -> dict[str, list[float]]:
    """Whether each item is right, by likelihood and by likelihood per character."""
    pairs = [(prompt.format(row["query"]), f" {choice}") for row in rows for choice in row["choices"]]
    scores = iter(plain_likelihoods(folder, pairs))
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for row in rows:
        sums = [next(scores)[0] for _ in row["choices"]]
        per_character = [s / len(choice) for s, choice in zip(sums, row["choices"], strict=True)]
        for metric, values in (("acc", sums), ("acc_norm", per_character)):
            right[metric].append(float(values.index(max(values)) == row["gold"]))
    return right


def by_item(record: Record, runs: Path, key: str) -> list[float]:
    rows = pandas.read_parquet(runs / record.run_id / "items.parquet")
    return rows[rows["key"] == key].sort_values("item")["value"].tolist()
