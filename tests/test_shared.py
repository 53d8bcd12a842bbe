"""On the real corpora, where they lie beside the checkout: the published protocol and the bundled models' cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from test_block import load_small

from lsiq.assets import bundled_model
from lsiq.calib.corpora import read_corpus
from lsiq.calib.tokens import cut_windows
from lsiq.evals.perplexity import perplexity

pytestmark = pytest.mark.shared
WIKI = SHARED / "data" / "wikitext2" / "wiki.test.raw"


def test_wikitext_rows_are_joined_as_published() -> None:
    text = read_corpus("wikitext2", "evaluation", str(WIKI)).joined()
    # The hub's data set has 4358 rows; blank ones are empty, others keep their newline.
    assert text.count("\n\n") >= 4357
    assert text.startswith("\n\n = Robert Boulter = \n\n\n")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_the_bundled_models_keep_their_perplexity_on_wikitext(name: str) -> None:
    model = load_small(bundled_model(name))
    windows = cut_windows(read_corpus("wikitext2", "evaluation", str(WIKI)), model.tokenizer, 512, "wikitext2")[:40]
    found = perplexity(model, windows, 8, lambda block: block.with_weights({}), lambda: None)
    golden = json.loads((Path(__file__).parent / "golden.json").read_text())
    assert found.value == pytest.approx(golden[name]["wikitext2@512, 40 windows"], rel=1e-4)
    assert torch.isfinite(torch.tensor(found.value))
