"""What one method leaves of another's loss: which runs are divided by which."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lsiq.tables.papers.left_over import NOISE, left_in_short, left_over
from lsiq.tables.papers.model_sizes import AGAIN_300M, SIZES
from lsiq.tables.papers.size_runs import PACKAGE, Point, SizeRuns
from lsiq.tables.table import DASH, Table

MODEL = ("llama-90m", "10", "20")


def point(entry: str, excess: float, seed: int | None = 0, width: str = "w2", on_wiki: float | None = None) -> Point:
    metrics = {"excess/file@512": excess, "excess/wikitext2@512": excess if on_wiki is None else on_wiki}
    return Point("90 M", width, entry, metrics, MODEL if seed is not None else (), seed=seed)


def study(*points: Point) -> SizeRuns:
    """Runs of one size, with rounding to nearest at the first setting."""
    runs = SizeRuns({})
    runs.points = [point("rtn", 1.0), *points]
    runs.sizes = tuple(size for size in SIZES if size.name == "90 M")
    return runs


def cells(table: Table) -> dict[str, str]:
    return {" ".join(row.labels): row.cells[0].text or "" for row in table.rows}


def test_ratios_are_of_means_over_the_seeds_that_both_have() -> None:
    runs = study(
        point("lsi", 0.2),
        point("lsi", 0.4, 1),
        point("lsi", 9.0, 2),
        point("omniquant", 0.5),
        point("omniquant", 0.7, 1),
    )
    assert cells(left_over(runs, "excess"))["w2 lsi, of omniquant"] == "0.50 / 0.50"


def test_runs_without_a_seed_in_common_have_no_ratio() -> None:
    assert cells(left_over(study(point("lsi", 0.2), point("omniquant", 0.5, 1)), "excess")) == {}


def test_a_package_has_no_seed_and_is_compared_with_all_runs() -> None:
    runs = study(point("best", 0.2), point("best", 0.4, 1), point(PACKAGE, 0.6, None))
    assert cells(left_over(runs, "excess"))["w2 best, of AutoRound's package"] == "0.50 / 0.50"


def test_a_pair_may_have_been_run_on_another_training_of_the_model_alone() -> None:
    def of(size: str, entry: str, excess: float, seed: int | None = 0) -> Point:
        return replace(point(entry, excess, seed), size=size)

    runs = SizeRuns({})
    own = [of("300 M", "rtn", 1.0), of("300 M", "best", 0.2), of("300 M", "autoround", 0.4)]
    runs.points = [*own, of(AGAIN_300M, "best", 0.3), of(AGAIN_300M, PACKAGE, 0.4, None)]
    runs.sizes = tuple(size for size in SIZES if size.name == "300 M")
    table = cells(left_over(runs, "excess"))
    assert table == {"w2 best, of autoround": "0.50 / 0.50", "w2 best, of AutoRound's package": "0.75 / 0.75"}


def test_of_two_methods_the_better_one_counts_by_text() -> None:
    runs = study(point("lsi", 0.3), point("gptq", 0.4, on_wiki=0.6), point("awq", 0.5))
    assert cells(left_over(runs, "excess"))["w2 lsi, of the better of gptq and awq"] == "0.75 / 0.60"
    assert "w2 lsi, of the better of gptq and awq" not in cells(
        left_over(study(point("lsi", 0.3), point("awq", 0.5)), "excess")
    )


@pytest.mark.parametrize("others", [0.0, -0.01, 0.1])
def test_a_method_that_loses_next_to_nothing_is_not_divided_by(others: float) -> None:
    runs = study(point("lsi", 0.3), point("omniquant", others))
    assert cells(left_over(runs, "excess"))["w2 lsi, of omniquant"] == "above 2 / above 2"


def test_where_rounding_costs_next_to_nothing_there_is_no_ratio() -> None:
    small = [point("rtn", NOISE / 2, width="w4", on_wiki=2 * NOISE), point("lsi", 0.001, width="w4")]
    runs = study(*small, point("omniquant", 0.002, width="w4"))
    assert cells(left_over(runs, "excess"))["w4 lsi, of omniquant"] == f"{DASH} / 0.50"


def test_in_short_there_are_the_least_and_the_most() -> None:
    wide = [point("rtn", 1.0, width="w3"), point("lsi", 0.9, width="w3"), point("omniquant", 1.0, width="w3")]
    runs = study(point("lsi", 0.3, on_wiki=0.2), point("omniquant", 0.4), *wide)
    table = cells(left_in_short(runs))
    assert table["lsi, of omniquant"] == "0.50 to 0.90"
    assert table["best, of autoround"] == DASH
