"""Tables by size: which runs stand in which row, and what a cell says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from helpers.configuration import CONF

from lsiq.errors import InputError
from lsiq.report.compact import Run, read_runs
from lsiq.tables.papers.model_sizes import AGAIN_90M
from lsiq.tables.papers.size import all_of, by_size, excess_by_size
from lsiq.tables.papers.size_runs import ENTRIES, LABELS, PACKAGE, PACKAGE_LONGER, PEERS, SizeRuns, load_sizes
from lsiq.tables.papers.trainings import PARTS, ratios
from lsiq.tables.study import Sample
from lsiq.tables.table import DASH, Cell, Row, Table

RECORDS = CONF.parent / "analysis" / "records"
Change = Callable[[Run], Run | None]


@pytest.fixture(scope="module")
def records() -> dict[str, list[Run]]:
    return {file: read_runs(RECORDS / f"{file}.jsonl") for file in LABELS}


@pytest.fixture(scope="module")
def sizes(records: dict[str, list[Run]]) -> SizeRuns:
    """The runs of the scale study alone, whatever other files hold."""
    return SizeRuns(records)


def values(sizes: SizeRuns, size: str, width: str, entry: str, metric: str = "excess/file") -> list[float]:
    sample = sizes.sample(size, width, entry, metric)
    return [] if sample is None else sorted(sample.values)


def recorded(records: dict[str, list[Run]], *runs: tuple[str, str, str, str], metric: str) -> list[float]:
    """The metric of the runs with a file, a model, a setting and a label, that measured both texts."""
    return sorted(
        run.metrics[metric]
        for file, *job in runs
        for run in records[file]
        if [run.model, run.setting, run.method] == job and len(run.get("eval.corpora")) == 2
    )


def test_labels_of_their_day_stand_in_todays_rows(records: dict[str, list[Run]], sizes: SizeRuns) -> None:
    lsi = [("scale", "l90", "w2a16g128", "lsird"), ("scale-seeds", "l90", "w2a16g128", "lsi")]
    assert values(sizes, "90 M", "w2", "lsi") == recorded(records, *lsi, metric="excess/file@512")
    assert len(values(sizes, "90 M", "w2", "lsi")) >= 3
    host = [("scale", "smol", "w3a16g64", "oq"), ("scale-seeds", "smollm2-135m", "w3a16g64", "omniquant")]
    assert values(sizes, "SmolLM2", "w3", "omniquant", "kl/wikitext2") == recorded(
        records, *host, metric="kl/wikitext2@1024"
    )


def test_names_that_changed_their_meaning_are_kept_apart(records: dict[str, list[Run]], sizes: SizeRuns) -> None:
    metric, job = "excess/file@1024", ("smollm2-135m", "w2a16g64")
    best = recorded(records, ("scale", "smol", "w2a16g64", "best0"), metric=metric)
    assert values(sizes, "SmolLM2", "w2", "best") == best
    variant = recorded(records, ("scale-seeds", *job, "best"), metric=metric)
    assert values(sizes, "SmolLM2", "w2", "rounding with CL, then latents") == variant
    assert set(best).isdisjoint(variant)
    today = recorded(records, ("scale-seeds", *job, "lsi-diagonal"), metric=metric)
    assert values(sizes, "SmolLM2", "w2", "lsi-diagonal") == today
    fast = recorded(records, ("scale", "smol", "w2a16g64", "diag3"), metric=metric)
    assert values(sizes, "SmolLM2", "w2", "lsi-diagonal at 3e-3") == fast


def test_runs_on_the_text_of_choice_are_left_out(records: dict[str, list[Run]], sizes: SizeRuns) -> None:
    chosen = [run for run in records["scale"] if run.get("eval.corpora") == ["wikitext2"]]
    assert {run.model for run in chosen} == {"tiny-llama"}
    shown = {value for point in sizes.points if point.size == "11 M" for value in point.metrics.values()}
    assert shown.isdisjoint(run.metrics["excess/wikitext2@512"] for run in chosen)
    assert values(sizes, "11 M", "w2", "best") == []


def test_every_row_and_every_label_is_used(sizes: SizeRuns, records: dict[str, list[Run]]) -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    shown = {size.name for size in sizes.sizes if size.tick}
    assert {point.entry for point in sizes.points if point.size in shown} <= set(names)
    rows = {row.labels[0] for width in ("w2", "w3") for row in by_size(sizes, width, "excess", 3).rows}
    assert rows == {name for name in names if any(point.entry == name for point in sizes.points)}
    reported = {
        file: {run.method for run in records[file] if len(run.get("eval.corpora")) == 2 and run.model not in PEERS}
        for file in LABELS
    }
    assert {file: set(labels) for file, labels in LABELS.items()} == reported


def test_variants_stand_behind_the_row_that_they_vary(sizes: SizeRuns) -> None:
    rows = [row.labels for row in all_of(sizes, AGAIN_90M).rows]
    assert rows == sorted(rows, key=lambda labels: labels[0])
    at_2_bits = [name for width, name in rows if width == "w2"]
    assert at_2_bits[:4] == [PACKAGE, PACKAGE_LONGER, "lsi", "lsi-diagonal"]
    assert at_2_bits[-2:] == ["best", "best-10"]
    assert set(at_2_bits) == {point.entry for point in sizes.of(AGAIN_90M)}


def test_a_peers_excess_is_over_the_float_model_that_others_measured(sizes: SizeRuns) -> None:
    # ln(117.616 / 37.2888), ln(133.894 / 24.3178): perplexities of records of ar-w2 and smollm2-135m
    for width, text, excess in (("w2", "file", 1.149), ("w2", "wikitext2", 1.706), ("w3", "file", 0.280)):
        (value,) = values(sizes, "SmolLM2", width, "AutoRound's package", f"excess/{text}")
        assert value == pytest.approx(excess, abs=5e-4)
    assert values(sizes, "SmolLM2", "w2", "AutoRound's package", "kl/file") == []


def test_a_peers_float_model_was_measured_on_its_tokens() -> None:
    """Whole texts have runs of an earlier tokenization, the package's among them, and of today's."""
    files = ("smollm2", "smollm2-activations")
    records = {file: read_runs(RECORDS / f"{file}.jsonl") for file in files}
    peer = next(run for run in records["smollm2"] if run.model == "ar-w2-200")
    bases = {run.metrics["float/ppl/file@2048"] for file in files for run in records[file] if "ar-" not in run.model}
    (base,) = {
        run.metrics["float/ppl/file@2048"]
        for file in files
        for run in records[file]
        if run.tokens == peer.tokens and "ar-" not in run.model
    }
    assert len(bases) == 2
    (excess,) = values(SizeRuns(records), "SmolLM2, whole texts", "w2", "AutoRound's package")
    assert excess == pytest.approx(math.log(peer.metrics["float/ppl/file@2048"] / base))


def test_rounding_counts_once_for_each_model(sizes: SizeRuns) -> None:
    (note,) = sizes.notes["SmolLM2"]
    assert "de-quantised from GGUF Q4_1" in note
    rounded = sizes.sample("SmolLM2", "w2", "rtn", "excess/file")
    assert rounded is not None
    assert (rounded.values, rounded.exact, rounded.notes) == ((pytest.approx(9.792, abs=1e-3),), True, (note,))
    trainings = sizes.sample("90 M", "w2", "rtn", "excess/file")
    assert trainings is not None
    assert (len(trainings.values), trainings.exact) == (2, False)


def changed(records: dict[str, list[Run]], change: Change) -> dict[str, list[Run]]:
    return {file: [new for run in runs if (new := change(run)) is not None] for file, runs in records.items()}


def test_runs_that_a_table_cannot_hold_are_errors(records: dict[str, list[Run]]) -> None:
    def unknown(run: Run) -> Run:
        return replace(run, method="mystery") if run.method == "lsird" else run

    def other_text(run: Run) -> Run:
        return replace(run, tokens=dict.fromkeys(run.tokens, "0" * 16)) if run.method == "lsi" else run

    def no_float(run: Run) -> Run | None:
        return run if run.model != "smollm2-135m" else None

    for change, words in (
        (unknown, "scale.jsonl: smol, mystery: the tables by size have no such model or row"),
        (other_text, "measured on different tokens"),
        (no_float, "no run of smollm2-135m says"),
    ):
        with pytest.raises(InputError, match=words):
            SizeRuns(changed(records, change))


def test_of_two_runs_of_a_label_and_seed_the_later_one_counts(records: dict[str, list[Run]]) -> None:
    again = next(run for run in records["scale"] if (run.model, run.setting, run.method) == ("smol", "w2a16g64", "rs"))
    later = replace(again, created="2099-01-01", metrics={**again.metrics, "excess/file@1024": 0.5})
    twice = SizeRuns({**records, "scale": [later, *records["scale"]]})
    assert values(twice, "SmolLM2", "w2", "lsi without increments") == [0.5]


def test_cells_say_of_how_many_runs_they_are(sizes: SizeRuns) -> None:
    cells = (Cell(Sample((1.0, 1.2))), Cell(Sample((1.0,))), Cell(Sample((1.0,), exact=True)))
    table = Table("t", "a ± b", ("method", "a", "b", "c"), (Row(("x",), cells),), counted=True)
    assert "| x | 1.10 ± 0.14 (2) | 1.00 (1) | 1.00 |" in table.markdown()
    assert r"x & 1.10 $\pm$ 0.14 (2) & 1.00 (1) & 1.00 \\" in table.latex()
    assert r"\caption{a $\pm$ b}" in table.latex()
    lines = by_size(sizes, "w3", "excess", 4).markdown().splitlines()
    (best,) = (line for line in lines if line.startswith("| best |"))
    assert best.startswith("| best | – | – | – | – | 0.1683 (1) |")


def test_the_figure_joins_means_and_shows_single_runs(sizes: SizeRuns) -> None:
    figure = excess_by_size(sizes, ("w2",))
    left, right = figure.canvas.axes
    assert [axis.get_title() for axis in (left, right)] == ["2 bits, C4", "2 bits, WikiText-2"]
    (line,) = (line for line in left.lines if line.get_label() == "gptq")
    samples = [sizes.sample(size, "w2", "gptq", "excess/file") for size in ("11 M", "90 M", "SmolLM2")]
    eleven, ninety, smollm2 = [sample.mean for sample in samples if sample is not None]
    # SmolLM2 is of another recipe, and no line leads to it.
    assert np.array_equal(np.asarray(line.get_ydata()), [eleven, ninety, np.nan, smollm2], equal_nan=True)
    drawn = [
        sorted(np.asarray(entry.get_ydata()).tolist()) for entry in left.lines if str(entry.get_label()).startswith("_")
    ]
    assert values(sizes, "90 M", "w2", "gptq") in drawn
    (legend,) = figure.canvas.legends
    drawn = {point.entry for point in sizes.points if point.size in ("11 M", "90 M", "SmolLM2")}
    assert [text.get_text() for text in legend.get_texts()] == [
        entry.name for entry in ENTRIES if entry.look and entry.name in drawn
    ]


def test_a_mean_that_is_not_above_zero_stands_on_the_edge(records: dict[str, list[Run]]) -> None:
    def better(run: Run) -> Run:
        metrics = {**run.metrics, "excess/file@512": -0.01}
        return replace(run, metrics=metrics) if run.method == "rs" and run.model == "l90" else run

    left, right = excess_by_size(SizeRuns(changed(records, better)), ("w2",)).canvas.axes
    assert [text.get_text() for text in left.texts] == ["≤ 0"]
    assert not right.texts
    assert math.isfinite(left.get_ylim()[0])


def test_peers_are_those_of_the_records(records: dict[str, list[Run]]) -> None:
    others = ("peers-90m", "peers-300m", "smollm2")
    of_files = [*records.values(), *(read_runs(RECORDS / f"{file}.jsonl") for file in others)]
    assert {run.model for runs in of_files for run in runs if run.model.startswith("ar")} == set(PEERS)


def test_ratios_are_those_of_the_means_and_a_dash_stands_where_one_method_was_not_run() -> None:
    runs = load_sizes()
    table = ratios(runs, "kl", ("w2",))
    rows = {row.labels: row.write(table) for row in table.rows}
    assert list(rows) == [("w2", part, words) for part, models in PARTS.items() for words in models.values()]
    means = {m: runs.sample("30 M", "w2", m, "kl/file") for m in ("rtn", "lsi", "omniquant")}
    assert all(means.values())
    rounding, lsi, host = (sample.mean for sample in means.values() if sample is not None)
    row = rows["w2", "100 M tokens", "30 M"]
    assert row[0] == f"{rounding:.3f}"
    assert row[table.heads[3:].index("lsi / omniquant, C4")] == f"{lsi / host:.2f}"
    assert rows["w2", "11 M", "40 M tokens"][table.heads[3:].index("lsi-diagonal / omniquant, C4")] == DASH
    assert not any(size.name.startswith("11 M, ") and "tokens" in size.name for size in runs.sizes)
