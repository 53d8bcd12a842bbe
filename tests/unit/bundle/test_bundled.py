"""The bundled models are real, small, and load without this package."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.configuration import ROOT
from helpers.models import load_small
from transformers import AutoModelForCausalLM, AutoTokenizer

from lsiq.assets import bundled_model, bundled_text
from lsiq.data.corpora import read_corpus
from lsiq.data.tokens import cut_windows
from lsiq.evals.perplexity import perplexity

MODELS = ["tiny-llama", "tiny-opt"]
GOLDEN = json.loads((ROOT / "tests" / "golden.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_model_has_the_promised_shape(name: str) -> None:
    folder = bundled_model(name)
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "model.safetensors").stat().st_size <= 24_000_000
    assert config["hidden_size"] % 128 == 0
    assert config.get("intermediate_size", config.get("ffn_dim")) % 128 == 0
    if name == "tiny-llama":
        assert config["num_key_value_heads"] < config["num_attention_heads"]
    else:
        assert config["do_layer_norm_before"]
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_model_loads_with_plain_transformers_and_writes_english(name: str) -> None:
    folder = bundled_model(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert 6e6 < sum(parameter.numel() for parameter in model.parameters()) < 12e6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 4000 <= len(tokenizer) <= 8192
    ids = tokenizer("The river flows through the", return_tensors="pt").input_ids
    written = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0])
    assert written.startswith("The river flows through the")
    assert len(written.split()) > 8


@pytest.mark.parametrize("name", MODELS)
def test_the_tokenizer_gives_back_every_text(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model(name))
    for piece in bundled_text("evaluation"):
        text = piece.read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_float_perplexity_on_the_bundled_text_is_the_golden_one(name: str) -> None:
    model = load_small(bundled_model(name))
    windows = cut_windows(read_corpus("bundled", "evaluation"), model.tokenizer, 512, "bundled")
    found = perplexity(model, windows, 8, lambda block: block.with_weights({}), lambda: None)
    assert found.value == pytest.approx(GOLDEN[name]["bundled@512"], rel=1e-4)  # across machines and threads
