"""Perplexity is the published number, whichever way the model is walked through."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_block import load_small
from transformers import AutoModelForCausalLM, AutoTokenizer

from lsiq.data.corpora import read_corpus
from lsiq.data.tokens import cut_windows
from lsiq.evals.perplexity import perplexity


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


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_streaming_equals_the_plain_forward(checkpoint: Path, text_file: Path, batch: int) -> None:
    model = load_small(checkpoint)
    windows = cut_windows(read_corpus("file", "evaluation", str(text_file)), model.tokenizer, 64, "text")
    found = perplexity(model, windows, batch, lambda block: block.with_weights({}), lambda: None)
    expected = plain_perplexity(checkpoint, text_file.read_text(), 64)
    assert found.value == pytest.approx(expected, rel=1e-5)  # measured: 1e-8
    assert found.tokens == len(windows) * 63


def test_the_tail_is_dropped_and_windows_do_not_overlap(checkpoint: Path, text_file: Path) -> None:
    model = load_small(checkpoint)
    text = read_corpus("file", "evaluation", str(text_file))
    ids = model.tokenizer(text.joined()).input_ids
    windows = cut_windows(text, model.tokenizer, 50, "text")
    assert windows.flatten().tolist() == ids[: len(ids) // 50 * 50]
