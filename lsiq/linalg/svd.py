"""Singular value decompositions: computed, checked, and kept for other runs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from lsiq.errors import NumericalError
from lsiq.runtime.terminal import warn

# Part of every name: factors of another way to find them are other factors.
_VERSION = 1
# A GPU decomposes larger weights in about the time in which a disk hands over their factors: 0.12 s for 4096 x 4096.
_LARGE_ON_GPU = 1024 * 1024


def factors(w: Tensor, cache: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `decompose` makes of `w (out, in)`, from the folder `cache` where it was computed before.

    A file holds `U`, `S` and `Vh` in float32, twice the bytes of a square float32 weight, under a hash of the weight.
    """
    if cache is None or (w.is_cuda and w.numel() > _LARGE_ON_GPU):
        return decompose(w)
    file = cache / "factors" / f"{_name(w)}.safetensors"
    if (cached_factors := _read(file)) is not None:
        u, s, vh = (tensor.to(w.device) for tensor in cached_factors)
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
        tensors = load_file(file)
        return tensors["u"], tensors["s"], tensors["vh"]
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


# Relative reconstruction error, and the largest entry of |QᵀQ - I|, above which a decomposition is done again.
TOLERANCE = 1e-5


def decompose(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `U (out, k)`, `S (k,)`, `Vh (k, in)` of `w (out, in)` in float32, `k = min(out, in)`.

    Accurate to TOLERANCE in reconstruction and orthogonality, which is checked. On a GPU the driver is `gesvda`: the
    default one reaches only 1e-3 on wide matrices and takes nine times as long. A result that misses the tolerance,
    as with clustered or vanishing singular values, is computed again in float64.

    Raises:
        NumericalError: `w` is not finite, or float64 misses the tolerance too.
    """
    if not w.isfinite().all():
        raise NumericalError("a weight to decompose holds values that are not finite")
    w = w.float()
    for dtype in (torch.float32, torch.float64):
        u, s, vh = _svd(w.to(dtype))
        # Products in float32 are off by 1e-6 at worst, a tenth of the tolerance.
        if max(errors(w, u, s, vh, torch.float32)) <= TOLERANCE:
            # Row by row, as they are read back from a cache: the strides decide the last bit of products.
            return u.float().contiguous(), s.float(), vh.float().contiguous()
    raise NumericalError(f"the singular values of a {tuple(w.shape)} weight cannot be found to {TOLERANCE}")


def _svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if w.is_cuda and w.dtype == torch.float32:
        # gesvda wants tall matrices, and its orthogonality suffers when small singular values cluster; see decompose.
        if w.shape[0] >= w.shape[1]:
            return torch.linalg.svd(w, full_matrices=False, driver="gesvda")
        u, s, vh = torch.linalg.svd(w.T.contiguous(), full_matrices=False, driver="gesvda")
        return vh.T, s, u.T
    if w.is_cuda:
        return torch.linalg.svd(w, full_matrices=False, driver="gesvd")
    return torch.linalg.svd(w, full_matrices=False)


def errors(w: Tensor, u: Tensor, s: Tensor, vh: Tensor, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    """Return the relative reconstruction error and the worse side's largest entry of `|QᵀQ - I|`, found in `dtype`."""
    w, u, s, vh = w.to(dtype), u.to(dtype), s.to(dtype), vh.to(dtype)
    eye = torch.eye(len(s), dtype=dtype, device=w.device)
    peak = w.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)  # squares of tiny weights would vanish
    reconstruction = ((u * (s / peak)) @ vh - w / peak).norm() / (w / peak).norm().clamp(min=1e-30)
    orthogonality = max((u.T @ u - eye).abs().max().item(), (vh @ vh.T - eye).abs().max().item())
    return reconstruction.item(), orthogonality


def completed(q: Tensor) -> Tensor:
    """Return `q (n, k)` of orthonormal columns with further ones behind them that make a basis, `(n, n)`."""
    n, k = q.shape
    if k == n:
        return q
    square = torch.linalg.qr(q.double(), mode="complete").Q
    return torch.cat([q, square[:, k:].to(q.dtype)], 1)


def random_directions(w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `decompose` does, with random orthonormal directions in place of the singular ones.

    The `S` that goes with them is `uᵢᵀ w vᵢ`: what the weight has along them. For the control that asks whether the
    singular directions matter.
    """
    k = min(w.shape)
    sides = [torch.randn(size, k, generator=generator, dtype=torch.float64) for size in w.shape]
    u, v = (torch.linalg.qr(side).Q.float().to(w.device) for side in sides)
    return u, (u * (w.float() @ v)).sum(0), v.T.contiguous()
