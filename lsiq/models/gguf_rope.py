"""The rotary embedding of a model in a GGUF file, as `rope_parameters` of transformers."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from lsiq.errors import InputError
from lsiq.models.gguf_file import Header

# LLaMA 3.1 and 3.2 stretch their rotary wavelengths by these; the file holds the outcome, not the factor.
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_FACTORS, _LLAMA3_POSITIONS = (8.0, 32.0), 8192
_LLAMA3_TENSOR = "rope_freqs.weight"
# What Phi-3 divides its frequencies by, up to the positions that it was trained with and beyond them.
_LONG_ROPE = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
GEMMA3_WINDOW_BASE = 10000.0


def plain_rope(header: Header, head_dim: int, path: Path) -> dict[str, Any]:
    """Return one embedding for all blocks, whose frequencies may be divided by a number or as LLaMA 3.1's are."""
    if header.get("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{path}: rotates only a part of each head's channels, which is not supported")
    base = header.get("rope.freq_base", 10000.0)
    if _LLAMA3_TENSOR not in header.tensors:
        return {**_scaled(header, path), "rope_theta": base}
    stored = _floats(path, header, _LLAMA3_TENSOR)
    for factor in _LLAMA3_FACTORS:
        expected = llama3_factors(base, head_dim, factor)
        if len(stored) == len(expected) and all(map(_close, stored, expected)):
            positions = {"original_max_position_embeddings": _LLAMA3_POSITIONS}
            return {**_LLAMA3, **positions, "factor": factor, "rope_theta": base}
    raise InputError(f"{path}: {_LLAMA3_TENSOR} is neither LLaMA 3.1's nor 3.2's, so its rotation is not known")


def gemma3_rope(header: Header, path: Path) -> dict[str, Any]:
    """Return Gemma-3's two embeddings; only that of blocks with full attention is scaled.

    Raises:
        KeyError: the file names no base, for which llama.cpp and transformers have different defaults.
    """
    base = header.metadata["gemma3.rope.freq_base"]
    window_base = header.get("rope.freq_base_swa", GEMMA3_WINDOW_BASE)
    return {
        "full_attention": {**_scaled(header, path), "rope_theta": base},
        "sliding_attention": {"rope_type": "default", "rope_theta": window_base},
    }


def phi3_rope(header: Header, head_dim: int, path: Path) -> dict[str, Any]:
    """Return Phi-3's embedding, which may rotate a part of each head and have LongRoPE's two lists of divisors.

    Raises:
        KeyError: the file has the divisors and no number of positions up to which the short ones serve.
    """
    share = header.get("rope.dimension_count", head_dim) / head_dim
    rope = {"rope_theta": header.get("rope.freq_base", 10000.0), "partial_rotary_factor": share}
    if not any(name in header.tensors for name in _LONG_ROPE.values()):
        return {**rope, **_scaled(header, path, linear=False)}
    divisors = {key: list(_floats(path, header, name)) for key, name in _LONG_ROPE.items()}
    positions = header.metadata["phi3.rope.scaling.original_context_length"]
    return {**rope, "rope_type": "longrope", **divisors, "original_max_position_embeddings": positions}


def _scaled(header: Header, path: Path, linear: bool = True) -> dict[str, Any]:
    """Return the type of the embedding; `linear` says whether transformers divides this family's by one number."""
    kind = header.get("rope.scaling.type", "none")
    if kind == "linear" and linear:
        return {"rope_type": "linear", "factor": header.get("rope.scaling.factor")}
    if kind != "none":
        raise InputError(f"{path}: its rotary embeddings are scaled by {kind}, which is not read; give safetensors")
    return {"rope_type": "default"}


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4)


def _floats(path: Path, header: Header, name: str) -> tuple[float, ...]:
    """Return a float32 tensor.

    Raises:
        KeyError: the file lacks it.
    """
    tensor = header.tensors[name]
    if tensor.kind != 0:
        raise InputError(f"{path}: {name} is not float32, as llama.cpp writes it")
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
