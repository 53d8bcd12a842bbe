"""Rotations are orthogonal at every width a model has, and leave what linears compute as it was."""

from __future__ import annotations

import pytest
import torch

from lsiq.linalg.hadamard import hadamard, mean_keeping, random_hadamard, random_orthogonal, run_length, split
from lsiq.linalg.narrow_rotation import narrow_rotation, squared_range
from lsiq.linalg.rotation import Rotation, factored_hadamard
from lsiq.methods.duquant.search import even_rotation, find_rotation, greedy_blocks, zigzag


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# 12, 20, 28, 76, 108 and 140 are of Paley's constructions, both of them.
@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 64, 76, 96, 108, 140, 160, 384])
def test_hadamard_matrices_are_orthogonal_and_even(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))


# Hidden and feed-forward widths of LLaMA, OPT and Qwen; 11008 has no small Hadamard factor.
@pytest.mark.parametrize("width", [64, 96, 160, 384, 896, 1280, 4096, 5120, 11008, 13824, 14336, 18944])
def test_a_factored_rotation_spreads_a_channel_over_all_and_keeps_products(width: int) -> None:
    rotation = factored_hadamard(width, seeded())
    x = torch.randn(3, width, generator=seeded(1))
    rotated = rotation.apply(x)
    assert torch.allclose(rotated @ rotated.t(), x @ x.t(), atol=1e-5 * width)  # measured: 5e-7 · width
    spike = rotation.apply(torch.eye(1, width))
    even = 1.0 if split(width)[0] != 43 else 4.0  # a random rotation of the factor 43; measured: 3.3
    assert spike.abs().max() * width**0.5 <= even + 1e-4
    assert rotation.multiplications < width * 300  # against width² of a dense rotation


def test_a_rotation_that_keeps_the_mean_is_still_nearly_even() -> None:
    rotation = mean_keeping(random_hadamard(384, seeded()))
    ones = torch.ones(384, dtype=torch.float64)
    assert torch.allclose(rotation @ rotation.t(), torch.eye(384, dtype=torch.float64), atol=1e-12)  # measured: 3e-15
    assert torch.allclose(ones @ rotation, ones, atol=1e-12)  # measured: 2.4e-14
    assert torch.allclose(rotation @ ones, ones, atol=1e-12)  # measured: 1.9e-14
    assert rotation.abs().max() * 384**0.5 < 5  # measured: 3.4


def test_a_rotation_survives_its_tensors_and_follows_another() -> None:
    first, second = factored_hadamard(96, seeded()), factored_hadamard(96, seeded(1))
    x = torch.randn(2, 5, 96, generator=seeded(2))
    both = Rotation.from_tensors(first.then(second).tensors())
    assert torch.equal(both.apply(x), second.apply(first.apply(x)))
    assert both.apply(x.half()).dtype == torch.float16


def test_zigzag_gives_every_block_alike_outliers() -> None:
    assert zigzag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), width=4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    size = torch.rand(384, generator=seeded()) ** 4
    means = size[zigzag(size, 128)].view(3, 128).mean(1)
    assert means.max() / means.min() < 1.02  # measured: 1.001


def test_a_step_of_the_greedy_search_spreads_the_peak_evenly() -> None:
    step = even_rotation(random_orthogonal(15, seeded())).float()
    assert torch.allclose(step @ step.t(), torch.eye(16), atol=1e-6)  # measured: 1.2e-7
    assert torch.allclose(step[0], torch.full((16,), 0.25), atol=1e-6)  # measured: 0.0
    x = torch.zeros(1, 1, 16)
    x[0, 0, 5] = 8.0
    rotated = x.transpose(0, 1) @ greedy_blocks(x, 1, seeded())
    assert torch.allclose(rotated.abs(), torch.full((1, 1, 16), 2.0), atol=1e-5)  # measured: 0.0


def test_a_found_rotation_is_orthogonal_and_a_permutation_lets_it_go_further() -> None:
    x = torch.randn(64, 128, generator=seeded())
    x[:, 5] *= 50
    before = x.abs().max()
    once = find_rotation(x, 8, 64, 0, seeded(1)).apply(x)
    twice = find_rotation(x, 8, 64, 1, seeded(1)).apply(x)
    assert torch.allclose(twice @ twice.t(), x @ x.t(), rtol=1e-4, atol=0.1)  # measured: 0.007 of 1.7e4
    # Spread over one block of eight, then over eight blocks: 1 / sqrt(8) and 1 / 8. Measured: 0.36 and 0.14.
    assert once.abs().max() < 0.45 * before
    assert twice.abs().max() < 0.20 * before


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("width", [64, 96, 688])
def test_a_rotation_in_blocks_mixes_neighbours_alone(width: int, block: int) -> None:
    size = run_length(width, block)
    assert width % size == 0
    online = factored_hadamard(width, seeded(), block)
    turns = [online.apply(torch.eye(width)).double()]
    turns += [random_hadamard(width, seeded(), block, keep_mean) for keep_mean in (False, True)]
    inside = torch.block_diag(*[torch.ones(size, size)] * (width // size)).bool()
    for turn in turns:
        assert torch.allclose(turn @ turn.t(), torch.eye(width, dtype=torch.float64), atol=1e-6)  # measured: 6e-8
        assert not turn[~inside].any()
    assert torch.allclose(turns[1][inside].abs() * size**0.5, torch.ones(width * size, dtype=torch.float64))
    ones = torch.ones(width, dtype=torch.float64)
    assert torch.allclose(ones @ turns[2], ones, atol=1e-12)  # measured: 4e-15
    assert online.multiplications == width * size


def test_a_run_is_the_largest_divisor_that_fits() -> None:
    assert [run_length(96, block) for block in (None, 16, 32, 64, 128)] == [96, 16, 32, 48, 96]


def directions(count: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """States `(count, width)` of equal norm and no mean, most of which lies along few directions in common."""
    common = torch.randn(6, width, generator=torch.Generator().manual_seed(7))
    states = torch.randn(count, 6, generator=generator) @ common + 0.3 * torch.randn(count, width, generator=generator)
    states = states - states.mean(1, keepdim=True)
    return states / states.norm(dim=1, keepdim=True) * width**0.5


@pytest.mark.parametrize("keep_mean", [False, True])
def test_a_trained_rotation_narrows_states_that_it_was_not_trained_on(keep_mean: bool) -> None:
    told: list[str] = []
    states, others = directions(4096, 48, seeded()), directions(1024, 48, seeded(1))
    rotation = narrow_rotation(states, keep_mean, 60, seeded(2), told.append)
    assert torch.allclose(rotation @ rotation.t(), torch.eye(48), atol=1e-5)  # measured: 5e-7
    ones = torch.full((48,), 48**-0.5)
    assert torch.allclose(ones @ rotation, ones, atol=1e-5) == keep_mean
    # Measured: 22.1 before, 11.5 after (keeping the mean 13.8); Hadamard rotations 19.2 to 20.9.
    assert squared_range(others @ rotation) < 0.8 * squared_range(others)
    assert squared_range(others @ rotation) < 0.8 * squared_range(others @ random_hadamard(48, seeded(3)).float())
    assert len(told) == 60
    assert torch.equal(rotation, narrow_rotation(states, keep_mean, 60, seeded(2), told.append))


def test_the_range_of_a_state_holds_zero() -> None:
    assert squared_range(torch.tensor([[1.0, 3.0], [-2.0, -1.0], [-1.0, 2.0]])) == pytest.approx((9 + 4 + 9) / 3)
