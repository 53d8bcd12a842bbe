"""Hadamard matrices of the orders that model widths have, and random rotations made of them."""

from __future__ import annotations

import torch
from torch import Tensor

# Larger bases are not searched for: a random rotation of the odd factor spreads as well, at a fraction of the size.
_LARGEST_PALEY = 512


def hadamard(n: int) -> Tensor | None:
    """Return a Hadamard matrix `(n, n)` of ±1 in float64, `H Hᵀ = n I`, or None where no construction here gives one.

    Sylvester's doubling on top of order 1 or of Paley's two constructions, from a prime `q`: order `q + 1` for
    `q = 3 mod 4`, order `2 (q + 1)` for `q = 1 mod 4`.
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    base = _paley(n)
    if base is None and n % 2 == 0 and (half := hadamard(n // 2)) is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    return base


def split(n: int) -> tuple[int, int]:
    """Write `n` as `base · power`, `power` of two as large as leaves a base whose Hadamard matrix is known here.

    Where there is none up to order 512, the base is the odd factor of `n`.
    """
    odd = n // (n & -n)
    for base in (odd << k for k in range((n & -n).bit_length())):
        if base <= _LARGEST_PALEY and hadamard(base) is not None:
            return base, n // base
    return odd, n // odd


def spreading(n: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal `(n, n)` in float64 that spreads each channel over all: the Hadamard matrix, normalised.

    Where none is known here, a random rotation takes its place for the odd factor of `n`; every channel is still
    spread over all, not quite evenly.
    """
    base, power = split(n)
    exact, doubled = hadamard(base), hadamard(power)
    assert doubled is not None  # a power of two
    factor = random_orthogonal(base, generator) if exact is None else exact / base**0.5
    return torch.kron(factor.contiguous(), doubled / power**0.5)


def random_hadamard(n: int, generator: torch.Generator, block: int | None = None, keep_mean: bool = False) -> Tensor:
    """Return `spreading(n)` with random signs in front, so that no pattern of the channels is met by its rows.

    Args:
        block: rotates each run of so many channels by itself, or of the largest divisor of `n` below; None rotates all.
        keep_mean: whether the all-ones direction stays where it is, see `mean_keeping`.
    """
    size = run_length(n, block)
    runs = []
    for _ in range(n // size):
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        rotation = signs[:, None] * spreading(size, generator)
        runs.append(mean_keeping(rotation) if keep_mean else rotation)
    return torch.block_diag(*runs)


def run_length(n: int, block: int | None) -> int:
    """Return how many of `n` neighbouring channels are rotated together: the largest divisor up to `block`."""
    return n if block is None else next(size for size in range(min(block, n), 0, -1) if n % size == 0)


def mean_keeping(rotation: Tensor) -> Tensor:
    """Return the rotation `(n, n)`, changed by one reflection, so that the all-ones direction stays where it is.

    LayerNorm's subtraction of the mean commutes with such a rotation and with no other.
    """
    n = rotation.shape[0]
    ones = rotation.new_full((n,), n**-0.5)
    image = ones @ rotation
    normal = image - ones
    if normal.norm() < 1e-12:
        return rotation
    normal = normal / normal.norm()
    return rotation - 2 * torch.outer(rotation @ normal, normal)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Return a rotation `(n, n)` drawn evenly from all, in float64."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()  # without the signs QR prefers some rotations over others


def _paley(n: int) -> Tensor | None:
    q = n - 1
    if n % 4 == 0 and q % 4 == 3 and _is_prime(q):
        core = _jacobsthal(q)
        skew = torch.zeros(n, n, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, core
        return skew + torch.eye(n, dtype=torch.float64)
    q = n // 2 - 1
    if n % 4 == 0 and q % 4 == 1 and _is_prime(q):
        conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(q)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
    return None


def _jacobsthal(q: int) -> Tensor:
    """The matrix `χ(i - j)` of the quadratic character modulo the prime `q`."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q).square() % q] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, int(q**0.5) + 1))
