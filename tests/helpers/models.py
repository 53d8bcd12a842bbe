"""Small checkpoints with random weights, and how they are loaded."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from helpers.configuration import compose_run
from transformers import AutoModelForCausalLM

from lsiq.assets import bundled_model
from lsiq.experiment.config import parse
from lsiq.models.loading import Model, load
from lsiq.models.settings import ModelSettings

# Small shapes with what trips careless code: fewer key-value heads than heads, a width that is no power of two.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": 4096,
        "hidden_size": 96,
        "word_embed_proj_dim": 96,
        "ffn_dim": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": 128,
    },
}


def random_model(shape: dict[str, Any], std: float = 0.08) -> Any:
    """Return a model of transformers with random weights, large enough that rounding them shows."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, initializer_range=std, init_std=std))
    with torch.no_grad():  # norms and biases that are not all ones and zeros
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert parameter.isfinite().all(), name
    return model


def save_model(shape: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32, std: float = 0.08) -> Path:
    """Write a checkpoint of `random_model` and the bundled tokenizer."""
    from transformers import AutoTokenizer

    random_model(shape, std).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled_model("tiny-llama")).save_pretrained(folder)
    return folder


@functools.cache
def model_settings(checkpoint: Path) -> ModelSettings:
    cfg = compose_run()  # once for all checkpoints
    cfg.model.path = str(checkpoint)
    return parse(cfg).model


def load_small(checkpoint: Path) -> Model:
    return load(model_settings(checkpoint), checkpoint, torch.device("cpu"), seed=0)
