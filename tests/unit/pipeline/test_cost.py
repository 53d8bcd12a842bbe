"""What a run is said to cost, counted by hand."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.configuration import SHARED, compose_run
from omegaconf import DictConfig

from lsiq.experiment.run import run
from lsiq.pipeline.area import relative_area

# The small llama: hidden 96, feed-forward 160, two of six heads for keys and values, two blocks, vocabulary 4096.
WEIGHTS = 2 * (96 * 96 * 2 + 32 * 96 * 2 + 96 * 160 * 3)
NORMS, EMBEDDING = 2 * 2 * 96 + 96, 4096 * 96


def test_integers_in_groups_cost_codes_scales_and_zero_points(
    small_run: Callable[..., DictConfig], checkpoints: dict[str, Path]
) -> None:
    cost = run(small_run(checkpoints["llama"], "eval=none", "quant.weight.bits=3")).cost
    bits = 3 + (16 + 3) / 32
    assert cost["average_bits"] == pytest.approx(bits)
    linears = WEIGHTS * bits / 8
    assert cost["checkpoint_bytes"] == pytest.approx(linears + 2 * (NORMS + 2 * EMBEDDING))  # the head is not tied here
    assert cost["bytes_per_token"] == pytest.approx(linears + 2 * (NORMS + EMBEDDING + 96))
    assert cost["macs_per_token"] == {"3x16": WEIGHTS, "16x16": EMBEDDING}
    assert cost["relative_area"] is None, "three bits against sixteen are no small integers"


def test_blocks_with_a_branch_cost_exponents_and_both_factors(
    small_run: Callable[..., DictConfig], checkpoints: dict[str, Path]
) -> None:
    config = small_run(checkpoints["llama"], "eval=none", "method=l2qer", "method.rank=16")
    config.quant = compose_run("quant=w4a8-mxint").quant
    cost = run(config).cost
    sides = 2 * (2 * (96 + 96) + 2 * (32 + 96) + 3 * (96 + 160))
    assert cost["macs_per_token"] == {"4x8": WEIGHTS, "8x8": 16 * sides, "16x16": EMBEDDING}
    assert cost["average_bits"] == pytest.approx(4.5 + 8.5 * 16 * sides / WEIGHTS)
    assert cost["relative_area"] == pytest.approx((32 + 64 * 16 * sides / WEIGHTS) / 100)


def test_floats_are_counted_by_their_type(small_run: Callable[..., DictConfig], checkpoints: dict[str, Path]) -> None:
    config = small_run(checkpoints["llama"], "eval=none", "method=l2qer", "method.rank=16")
    config.quant = compose_run("quant=mxfp4a8").quant
    cost = run(config).cost
    sides = 2 * (2 * (96 + 96) + 2 * (32 + 96) + 3 * (96 + 160))
    assert cost["macs_per_token"] == {"e2m1xe4m3": WEIGHTS, "e4m3xe4m3": 16 * sides, "16x16": EMBEDDING}
    assert cost["average_bits"] > 4.25 + 8.25 * 16 * sides / WEIGHTS  # blocks of 16 along the rank
    linears, branch = (
        relative_area({kind: count}, WEIGHTS) for kind, count in (("e2m1xe4m3", WEIGHTS), ("e4m3xe4m3", 16 * sides))
    )
    assert linears is not None
    assert branch is not None
    assert cost["relative_area"] == pytest.approx(linears + branch)


def test_the_float_model_costs_sixteen_bits(small_run: Callable[..., DictConfig], checkpoints: dict[str, Path]) -> None:
    cost = run(small_run(checkpoints["opt"], "eval=none", "quant.weight.bits=16", "quant.weight.group=null")).cost
    assert cost["average_bits"] == 16
    assert cost["relative_area"] == 1
    assert set(cost["macs_per_token"]) == {"16x16"}


@pytest.mark.shared
def test_the_area_estimate_is_near_the_published_circuits_of_small_integers() -> None:
    with (SHARED / "published" / "hardware_area.csv").open() as file:
        published = {(row["method"], row["setting"]): float(row["relative_area"]) for row in csv.DictReader(file)}
    weights, sides = 4096 * 11008, 32 * (4096 + 11008)
    for key, macs in {
        ("l2qer", "w4a8-mxint"): {"4x8": weights, "8x8": sides},
        ("l2qer", "w4a6-mxint"): {"4x6": weights, "8x6": sides},
        ("omniquant", "w6a6"): {"6x6": weights},
    }.items():
        found = relative_area(macs, weights)
        assert found is not None
        assert abs(math.log(found / published[key])) < 0.08  # measured: 0.006, 0.068, -0.070
