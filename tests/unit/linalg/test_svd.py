"""The decomposition is accurate where it must be, on matrices that are awkward too."""

from __future__ import annotations

import pytest
import torch

from lsiq.errors import NumericalError
from lsiq.linalg.svd import TOLERANCE, decompose, errors, random_directions


def matrix(kind: str) -> torch.Tensor:
    w = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    if kind == "tall":
        return w.T.contiguous()
    if kind == "duplicated rows":
        w[40:80] = w[:40]
    if kind == "dead channels":
        w[:, ::3] = 0
        w[5] = 0
    if kind == "ill-conditioned":
        u, _, vh = torch.linalg.svd(w.double(), full_matrices=False)
        w = ((u * torch.logspace(0, -7, 96, dtype=torch.float64)) @ vh).float()
    if kind == "rank one":
        w = w[:, :1] @ w[:1]
    if kind == "tiny":
        w = w * 1e-20
    return w


@pytest.mark.parametrize(
    "kind", ["plain", "tall", "duplicated rows", "dead channels", "ill-conditioned", "rank one", "tiny"]
)
def test_reconstruction_and_orthogonality_hold(kind: str) -> None:
    w = matrix(kind)
    u, s, vh = decompose(w)
    reconstruction, orthogonality = errors(w, u, s, vh)
    assert reconstruction < TOLERANCE  # measured: 1.6e-6, the worse of the two
    assert orthogonality < TOLERANCE
    assert (s[:-1] >= s[1:]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (11008, 4096)])
def test_the_gpu_driver_is_accurate(shape: tuple[int, int]) -> None:
    w = torch.randn(shape, device="cuda")
    assert max(errors(w, *decompose(w))) < TOLERANCE


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        decompose(torch.full((4, 4), float("inf")))


def test_random_directions_are_orthonormal_and_say_what_the_weight_has_along_them() -> None:
    w = matrix("plain")
    u, s, vh = random_directions(w, torch.Generator().manual_seed(0))
    eye = torch.eye(96)
    assert torch.allclose(u.T @ u, eye, atol=1e-6)
    assert torch.allclose(vh @ vh.T, eye, atol=1e-6)
    assert torch.allclose(s, torch.diagonal(u.T @ w @ vh.T), atol=1e-5)
