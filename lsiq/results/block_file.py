"""A finished block as the named tensors and the metadata of one file.

Codes stand as uint8, scales and zero points in float32, folded norms and biases in float32, latent weights in float16,
factors of side branches in float16 or as codes, rotations, learned parameters and scales of keys and values as they
are; formats and metrics stand in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lsiq.errors import InputError, LsiqError
from lsiq.formats.base import WeightFormat
from lsiq.formats.cache_scales import CacheScales
from lsiq.formats.low_rank import Factor, SideBranch
from lsiq.formats.tensor import QuantizedTensor
from lsiq.linalg.rotation import Rotation
from lsiq.models.result import BlockResult
from lsiq.runtime.files import Stored
from lsiq.settings import build, describe_settings

_CACHE_SCALES = "cache:scales"


def to_tensors(result: BlockResult) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what a file holds of a block: tensors and metadata."""
    tensors: dict[str, Tensor] = {}
    formats: dict[str, dict[str, object]] = {}
    quantized: dict[str, Factor] = dict(result.weights)
    for name, branch in result.branches.items():
        quantized |= {f"{name}:up": branch.up, f"{name}:down": branch.down}
    for name, weight in quantized.items():
        if isinstance(weight, Tensor):
            tensors[name] = weight
            continue
        formats[name] = describe_settings(weight.format)
        tensors |= {f"{name}:codes": weight.codes, f"{name}:scale": weight.scale, f"{name}:zero": weight.zero}
    tensors |= {f"{name}:float": tensor.float() for name, tensor in result.floats.items()}
    tensors |= {f"{name}:state": tensor for name, tensor in result.state.items()}
    tensors |= {f"{name}:latent": tensor for name, tensor in result.latents.items()}
    for place, rotation in result.rotations.items():
        tensors |= {f"{place}:rotation.{part}": tensor for part, tensor in rotation.tensors().items()}
    if result.cache_scales is not None:
        tensors[_CACHE_SCALES] = result.cache_scales.tensor()
    return tensors, {"formats": json.dumps(formats), "metrics": json.dumps(dict(result.metrics))}


def to_result(file: Path, stored: Stored) -> BlockResult:
    """Return the block that `file` was found to hold; InputError where that is none."""
    tensors = stored.tensors
    try:
        formats = {name: _format(node) for name, node in json.loads(stored.metadata["formats"]).items()}
        weights = {
            name: QuantizedTensor(tensors[f"{name}:codes"], tensors[f"{name}:scale"], tensors[f"{name}:zero"], fmt)
            for name, fmt in formats.items()
        }
        factors: dict[str, Factor] = {**tensors, **weights}
        branches = {
            name: SideBranch(factors[f"{name}:up"], factors[f"{name}:down"])
            for name in weights
            if f"{name}:up" in factors
        }
        return BlockResult(
            {name: weight for name, weight in weights.items() if not name.endswith((":up", ":down"))},
            _with_ending(tensors, ":float"),
            json.loads(stored.metadata["metrics"]),
            _with_ending(tensors, ":state"),
            branches=branches,
            rotations=_rotations(tensors),
            latents=_with_ending(tensors, ":latent"),
            cache_scales=CacheScales.of(tensors[_CACHE_SCALES]) if _CACHE_SCALES in tensors else None,
        )
    except (KeyError, ValueError, TypeError, AttributeError, LsiqError) as error:
        raise InputError(f"{file}: does not hold a block ({error}); run again with force=true") from error


def _with_ending(tensors: Mapping[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {name.removesuffix(ending): tensor for name, tensor in tensors.items() if name.endswith(ending)}


def _format(node: Any) -> WeightFormat:
    """Return the number format that a file describes; ValueError where it names anything else."""
    fmt = build(node)
    if not isinstance(fmt, WeightFormat):
        raise ValueError(f"{node} is no number format")
    return fmt


def _rotations(tensors: Mapping[str, Tensor]) -> dict[str, Rotation]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, separator, part = name.partition(":rotation.")
        if separator:
            parts.setdefault(place, {})[part] = tensor
    return {place: Rotation.from_tensors(tensors) for place, tensors in parts.items()}
