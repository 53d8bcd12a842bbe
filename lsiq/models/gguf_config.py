"""The transformers configuration of a model in a GGUF file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsiq.errors import InputError
from lsiq.models.gguf_file import Header, read_header


@dataclass(frozen=True)
class Architecture:
    """What is known of an architecture of llama.cpp.

    Attributes:
        model_type, model_class: of transformers.
        interleaved: whether the rows of Q and K are stored in llama.cpp's order, in which channels 2i and 2i + 1 of a
            head rotate together; transformers rotates i and i + head_dim / 2.
    """

    model_type: str
    model_class: str
    interleaved: bool


# Mistral's files call themselves llama: within its window that is the same function.
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", interleaved=False),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", interleaved=False),
}
# LLaMA 3.1 and 3.2 stretch their rotary wavelengths by these; the file holds the outcome, not the factor.
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_FACTORS, _LLAMA3_POSITIONS = (8.0, 32.0), 8192
ROPE_FACTORS = "rope_freqs.weight"


def find_architecture(header: Header, where: Path) -> Architecture:
    """Return what is known of a file's architecture.

    Raises:
        InputError: nothing is, or the model is a mixture of experts.
    """
    name = header.architecture
    if name not in ARCHITECTURES:
        raise InputError(f"{where}: architecture {name} is not read from GGUF; there are {', '.join(ARCHITECTURES)}")
    if header.get("expert_count", 0):
        raise InputError(f"{where}: is a mixture of experts, which is not supported; give a dense model")
    return ARCHITECTURES[name]


def gguf_config(path: Path) -> dict[str, Any]:
    """Return what `config.json` would say.

    Raises:
        InputError: an unknown architecture, or a setting that is missing or that transformers has no place for.
    """
    header = read_header(path)
    architecture = find_architecture(header, path)
    try:
        return _config(header, architecture, path)
    except KeyError as error:
        raise InputError(f"{path}: its metadata lacks {error.args[0]}; fetch the file again") from error


def _config(header: Header, architecture: Architecture, path: Path) -> dict[str, Any]:
    def need(key: str) -> Any:
        return header.metadata[f"{header.architecture}.{key}"]

    heads, width = need("attention.head_count"), need("embedding_length")
    head_dim = header.get("attention.key_length") or header.get("rope.dimension_count") or width // heads
    if header.get("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{path}: rotates only a part of each head's channels, which is not supported")
    config = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header, head_dim, path),
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    if architecture.model_type in ("llama", "qwen3"):  # Qwen2's projections always have biases
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        config[f"{name}_token_id"] = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _rope(header: Header, head_dim: int, path: Path) -> dict[str, Any]:
    base = header.get("rope.freq_base", 10000.0)
    kind = header.get("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": header.get("rope.scaling.factor"), "rope_theta": base}
    if kind != "none":
        raise InputError(f"{path}: its rotary embeddings are scaled by {kind}, which is not read; give safetensors")
    if ROPE_FACTORS not in header.tensors:
        return {"rope_type": "default", "rope_theta": base}
    stored = _floats(path, header)
    for factor in _LLAMA3_FACTORS:
        expected = llama3_factors(base, head_dim, factor)
        if len(stored) == len(expected) and all(map(_close, stored, expected)):
            positions = {"original_max_position_embeddings": _LLAMA3_POSITIONS}
            return {**_LLAMA3, **positions, "factor": factor, "rope_theta": base}
    raise InputError(f"{path}: {ROPE_FACTORS} is neither LLaMA 3.1's nor 3.2's, so its rotation is not known")


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4)


def _floats(path: Path, header: Header) -> tuple[float, ...]:
    import struct

    tensor = header.tensors[ROPE_FACTORS]
    if tensor.kind != 0:
        raise InputError(f"{path}: {ROPE_FACTORS} is not float32, as llama.cpp writes it")
    with path.open("rb") as file:
        file.seek(tensor.offset)
        return struct.unpack(f"<{tensor.shape[0]}f", file.read(4 * tensor.shape[0]))


def llama3_factors(base: float, head_dim: int, factor: float) -> list[float]:
    """By what LLaMA 3.1 divides each rotary frequency: 1 for short wavelengths, `factor` for long ones."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    factors = []
    for channel in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (channel / head_dim)
        if wavelength < _LLAMA3_POSITIONS / high:
            factors.append(1.0)
        elif wavelength > _LLAMA3_POSITIONS / low:
            factors.append(factor)
        else:
            smooth = (_LLAMA3_POSITIONS / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
