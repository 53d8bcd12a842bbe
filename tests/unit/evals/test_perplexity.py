"""Perplexity is the published number, whichever way the model is walked through."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.evaluations import plain_perplexity
from helpers.models import load_small

from lsiq.data.corpora import read_corpus
from lsiq.data.tokens import cut_windows
from lsiq.evals.perplexity import perplexity


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
