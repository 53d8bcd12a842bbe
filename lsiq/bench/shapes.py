"""Models of true shapes with random weights, and the settings that benchmarks of the learner train them with."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.formats.quant import QuantSettings
from lsiq.learning.schedule import Training
from lsiq.models.checkpoint import DeviceCheckpoint
from lsiq.models.loading import Model, load
from lsiq.models.settings import ModelSettings
from lsiq.settings import fill

LLAMA = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
         "num_attention_heads": 32, "max_position_embeddings": 2048, "tie_word_embeddings": True}  # fmt: skip
LLAMA_3 = {**LLAMA, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8,
           "tie_word_embeddings": False}  # fmt: skip
QWEN_3 = {**LLAMA_3, "model_type": "qwen3", "vocab_size": 151936, "intermediate_size": 12288, "head_dim": 128}
OPT = {"model_type": "opt", "vocab_size": 50272, "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384,
       "num_attention_heads": 32, "max_position_embeddings": 2048}  # fmt: skip
SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
           "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
           "tie_word_embeddings": True}  # fmt: skip
SMALL = {"hidden_size": 128, "word_embed_proj_dim": 128, "intermediate_size": 256, "ffn_dim": 256,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}  # fmt: skip


def random_model(options: argparse.Namespace, shape: dict[str, Any], depth: int, device: torch.device) -> Model:
    """A model of the shape with random weights, in half precision on a GPU."""
    changes = {key: value for key, value in SMALL.items() if key in shape} if options.small else {}
    architecture = {**shape, "num_hidden_layers": depth, **changes}
    settings = {"name": "bench", "weights": "random", "architecture": architecture, "seqlen": options.seqlen}
    dtype = options.precision if device.type == "cuda" else "float32"
    model = load(fill(ModelSettings, {**settings, "dtype": dtype}), None, device, seed=0)
    return replace(model, checkpoint=DeviceCheckpoint(device))


def formats(bits: int, group: int | None, activation: int = 16) -> QuantSettings:
    weight = fill(Integer, {"bits": bits, "group": group})
    return fill(QuantSettings, {"weight": weight, "activation": fill(Activation, {"bits": activation})})


def course(epochs: int, batch: int, precision: str, kernels: str, **settings: Any) -> Training:
    lsi = {"decay": "cosine", "signed": [], "keep": "last"}
    return fill(
        Training, {"epochs": epochs, "batch": batch, "precision": precision, "kernels": kernels, **lsi, **settings}
    )
