"""Singular factors kept on disk by what was decomposed, so that the runs of a sweep do not find them again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from lsiq.svd import decompose
from lsiq.track.console import warn

# Part of every name: factors of another way to find them are other factors.
_VERSION = 1
# A GPU decomposes larger weights in about the time in which a disk hands over their factors: 0.12 s for 4096 x 4096.
_LARGE_ON_GPU = 1024 * 1024


def factors(w: Tensor, cache: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `lsiq.svd.decompose` does of `w (out, in)`, from the folder `cache` where it has been found before.

    A file holds `U`, `S` and `Vh` in float32, twice the bytes of a square float32 weight, under a hash of the weight.
    """
    if cache is None or (w.is_cuda and w.numel() > _LARGE_ON_GPU):
        return decompose(w)
    file = cache / "factors" / f"{_name(w)}.safetensors"
    if (found := _read(file)) is not None:
        u, s, vh = (tensor.to(w.device) for tensor in found)
        return u, s, vh
    u, s, vh = decompose(w)
    _write(file, {"u": u, "s": s, "vh": vh})
    return u, s, vh


def _name(w: Tensor) -> str:
    content = w.detach().float().cpu().contiguous()
    digest = hashlib.blake2b(f"{_VERSION} {w.device.type} {tuple(w.shape)} ".encode(), digest_size=16)
    digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(file: Path) -> tuple[Tensor, Tensor, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(file)
        return held["u"], held["s"], held["vh"]
    except (OSError, SafetensorError, KeyError):
        return None  # none yet, or a damaged one that is written again


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, file)
    except OSError as error:
        warn(f"paths.cache: {file.parent} cannot be written ({error.strerror}); set paths.cache=DIR or null")
