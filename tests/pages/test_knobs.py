"""The page of settings: which runs make a line, and what a line says."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.configuration import compose_run

from lsiq.experiment.composed import plain_config
from lsiq.report.compact import Run
from lsiq.tables.papers.knobs import KNOBS, NONE, Knob, beside, lines, moved, numbers
from lsiq.tables.study import load

KNOB = {knob.name: knob for knob in KNOBS}
RATE = KNOB["increments"]


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return load()[0].runs


@pytest.fixture
def base(runs: list[Run]) -> Run:
    """A run of `lsi` on the text that decides."""
    corpora = ["wikitext2"]
    return next(
        run for run in runs if (run.model, run.method) == ("tiny-llama", "lsird") and run.get("eval.corpora") == corpora
    )


def with_part(run: Run, name: str, change: dict[str, Any] | None, **fields: Any) -> Run:
    """The same run with another setting of a part, or without the part, and other facts."""
    config: Any = copy.deepcopy(dict(run.config))
    parts = config["method"]["parts"]
    index = next(i for i, part in enumerate(parts) if part["_target_"].split(".")[-2] == name)
    if change is None:
        del parts[index]
    else:
        parts[index] |= change
    return replace(run, config=config, **fields)


def measured(run: Run, divergence: float, **fields: Any) -> Run:
    return replace(run, metrics={"kl/wikitext2@512": divergence}, **fields)


def turned(base: Run) -> list[Run]:
    """Runs at three rates, of which the middle one is best, the last with two seeds; and one without increments."""
    return [
        measured(with_part(base, "singular", {"lr": 1e-2}), 0.6),
        measured(with_part(base, "singular", {"lr": 1e-2}, seed=1), 0.8),
        measured(with_part(base, "singular", {"lr": 3e-4}), 0.55),
        measured(with_part(base, "singular", {"lr": 1e-3}), 0.5),
        measured(with_part(base, "singular", None), 0.65),
    ]


def test_a_line_joins_runs_that_differ_in_the_setting_and_the_seed(base: Run) -> None:
    (line,) = lines(turned(base), RATE)
    assert (line.size, line.width, line.chosen_on) == ("11 M", "w2", True)
    assert list(line.values) == [NONE, 3e-4, 1e-3, 1e-2]
    assert line.values[1e-2].values == (0.6, 0.8)
    assert line.least == 1e-3


@pytest.mark.parametrize("other", ["part", "setting", "tokens", "text", "training"])
def test_runs_that_differ_in_more_are_on_no_line_together(base: Run, other: str) -> None:
    first, second = turned(base)[2:4]
    third = measured(with_part(base, "singular", {"lr": 3e-3}), 0.4)
    odd = {
        "part": with_part(third, "singular", {"corner": "full"}),
        "setting": with_part(third, "clip", {"lr": 0.5}),
        "tokens": replace(third, tokens={"kl/wikitext2@512": "other"}),
        "training": replace(third, metrics=third.metrics | {"float/ppl/wikitext2@512": 80.0}),
        "text": replace(third, config={**third.config, "eval": {**third.config["eval"], "windows": 3}}),
    }[other]
    (line,) = lines([first, second, odd], RATE)
    assert 3e-3 not in line.values
    (joined,) = lines([first, second, third], RATE)
    assert joined.values[3e-3].values == (0.4,)


def test_labels_and_ways_to_compute_do_not_part_runs(base: Run) -> None:
    first, second = turned(base)[2:4]
    config: Any = copy.deepcopy(dict(second.config))
    config["method"] |= {"label": "other"}
    config["method"]["training"] |= {"kernels": "plain"}
    (line,) = lines([first, replace(second, config=config, method="other")], RATE)
    assert set(line.values) == {3e-4, 1e-3}


def test_one_value_beside_none_makes_no_line(base: Run) -> None:
    assert lines(turned(base)[3:], RATE) == []


def test_of_two_runs_of_one_seed_the_later_one_counts(base: Run) -> None:
    first, second = turned(base)[2:4]
    again = measured(second, 0.7, created="2999-01-01")
    assert lines([again, first, second], RATE)[0].values[1e-3].values == (0.7,)


def test_a_setting_that_is_none_of_a_part(base: Run) -> None:
    config: Any = copy.deepcopy(dict(base.config))
    config["method"]["training"]["ahead"]["blocks"] = 2
    ahead = measured(replace(base, config=config), 0.45)
    (line,) = lines([measured(base, 0.5), ahead], KNOB["ahead"])
    assert {value: sample.mean for value, sample in line.values.items()} == {0: 0.5, 2: 0.45}


def test_the_page_says_what_the_records_say(runs: list[Run]) -> None:
    found = {(line.size, line.width): line for line in lines(runs, RATE)}
    smollm2 = next(
        run for run in runs if (run.model, run.setting, run.method) == ("smol", "w2a16g64", "lsird") and run.seed == 0
    )
    assert found["SmolLM2", "w2"].values[1e-3].mean == smollm2.metrics["kl/wikitext2@1024"]
    assert {line.chosen_on for key, line in found.items() if key[0] == "11 M"} == {True}
    host = {(line.size, line.width, line.chosen_on): line.least for line in lines(runs, KNOB["host-clipping"])}
    assert (host["11 M", "w2", False], host["SmolLM2", "w2", False]) == (0.03, 0.1)


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_todays_value_is_what_the_method_file_has(knob: Knob) -> None:
    methods = {"host": "omniquant", "weights": "best-blocks", "start": "best"}
    method = methods.get(knob.name.partition("-")[0], "lsi")
    names = knob.key.split(".")
    node: Any = plain_config(compose_run(f"method={method}"))
    for name in names:
        if isinstance(node, list):
            node = next(part for part in node if part["_target_"].split(".")[-2] == name)
        else:
            node = node[name]
    assert node == knob.today


def test_figure_and_table_show_every_line(base: Run) -> None:
    found = lines(turned(base), RATE)
    (axis,) = moved(found, RATE).canvas.axes
    assert axis.get_title() == "2 bits"
    assert [np.asarray(curve.get_ydata()).tolist() for curve in axis.get_lines()] == [[1.3, 1.1, 1.0, 1.4]]
    table = numbers(found, RATE).markdown()
    assert (
        "| 11 M | 2 bits | validation | 0.6500 (1) | 0.5500 (1) | 0.5000 (1) | 0.7000 ± 0.1414 (2) | 0.001 |" in table
    )


def test_runs_with_a_part_stand_beside_the_one_without(base: Run) -> None:
    def run(change: dict[str, Any] | None, shift: float, scatter: float) -> Run:
        means = [0.5 + shift + scatter * (-1) ** block for block in range(8)]
        other = measured(with_part(base, "singular", change), 0.5 + shift)
        return replace(other, window_means={"kl/wikitext2@512": means})

    runs = [
        run(None, 0, 0),
        run({"lr": 1e-3}, 0.05, 0.001),
        run({"lr": 3e-3}, -0.05, 0.001),
        run({"lr": 1e-2}, 0.05, 0.4),
    ]
    corner = KNOB["corner"]
    found = {knob.name: lines(runs, knob) for knob in (RATE, corner)}
    (row,) = beside(found, [RATE, corner]).rows
    assert [cell.text for cell in row.cells] == ["**+10.0 %**", "**-10.0 %**", "+10.0 %"]
    (row,) = beside(found, [RATE], base=3e-3).rows
    assert [cell.text for cell in row.cells] == ["**+11.1 %**", "**+22.2 %**", "+22.2 %"]
