"""Tables come from records alone: what stands in a cell, what is in bold, and what the committed pages say."""

from __future__ import annotations

import csv
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.configuration import CONF, SHARED, compose_run
from omegaconf import DictConfig

from lsiq.errors import InputError
from lsiq.experiment.composed import plain_config
from lsiq.experiment.config import parse
from lsiq.experiment.run import run
from lsiq.report.compact import Run, read_runs, without_nulls
from lsiq.results.record import Record, write_record
from lsiq.tables.agree import pairs
from lsiq.tables.collect import collect, strangers
from lsiq.tables.papers.ablations import AXES, METRICS, along, free
from lsiq.tables.papers.comparison_plots import EXCESS, excess_by_method, quality_against_bits
from lsiq.tables.papers.layout import BESIDE, study_jobs
from lsiq.tables.papers.perplexity import bundled_perplexity
from lsiq.tables.protocol import PAPERS, STUDY, Protocol
from lsiq.tables.published import MARKS, Literature, Published
from lsiq.tables.render import README_MARKS, README_PAGE, README_TABLE, execute, in_readme, notebooks, render
from lsiq.tables.study import Runs, Sample, load
from lsiq.tables.table import Cell, Row, Table, best_in_bold, told_apart
from lsiq.tables.traces import read_traces

ROOT = CONF.parent
NOTEBOOKS = notebooks()
SmallRun = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def committed() -> tuple[Runs, Literature]:
    return load()


@pytest.fixture
def record(checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path) -> Record:
    """What a learned run of a small model leaves below `tmp_path / runs`."""
    found = run(small_run(checkpoints["llama"], "method=lsi", "method.training.epochs=2", "method.parts.0.corner=4"))
    found.clean = True
    write_record(found, tmp_path / "runs" / found.run_id)
    return found


# Records


def test_collecting_twice_changes_nothing(record: Record, tmp_path: Path) -> None:
    output = tmp_path / "records" / "all.jsonl"
    collect([tmp_path / "runs"], output)
    once = output.read_bytes()
    assert collect([tmp_path / "runs" / record.run_id], output) == (1, 0)
    assert output.read_bytes() == once
    # 1,946 bytes here; a few kilobytes for many corpora and tasks.
    assert len(once) < 4096


def test_a_collected_run_says_what_its_record_says(record: Record, tmp_path: Path) -> None:
    output = tmp_path / "all.jsonl"
    collect([tmp_path / "runs"], output, tmp_path / "traces")
    (found,) = read_runs(output)
    assert (found.model, found.setting, found.method, found.seed) == ("llama", "w3a16g32", "lsi", 0)
    assert found.metrics["ppl/file@64"] == pytest.approx(record.metrics["ppl/file@64"], rel=1e-5)
    assert found.get("method.training.epochs") == 2
    assert found.get("method.parts.0.corner") == 4
    assert found.get("method.parts.7.corner") is None
    assert found.errors == pytest.approx([row["error"] for row in record.blocks], rel=1e-3)
    (trace,) = read_traces(tmp_path / "traces")
    assert [len(losses) for losses in trace.losses] == [2, 2]
    assert {entry["block"] for entry in trace.histograms} == {0, 1}
    assert sum(trace.histograms[0]["before"]) == 96 * 96
    assert len(trace.increments[0]["epochs"]) == 2


def test_unfinished_runs_and_changed_checkouts_are_left_out(record: Record, tmp_path: Path) -> None:
    folder, output = tmp_path / "runs" / record.run_id, tmp_path / "all.jsonl"
    write_record(replace(record, clean=False), folder)
    assert collect([folder], output) == (0, 1)
    assert collect([folder], output, dirty=True) == (1, 0)
    write_record(replace(record, status="interrupted"), folder)
    assert collect([folder], output) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "-o", "all.jsonl"], ["nowhere", "no records", "folder"]),
        (["runs", "-o", "broken.jsonl"], ["broken.jsonl:1", "not a compact record", "lsiq.tables.collect"]),
    ],
)
def test_collecting_answers_mistakes_in_one_line(
    arguments: list[str], words: list[str], record: Record, tmp_path: Path
) -> None:
    del record
    (tmp_path / "broken.jsonl").write_text(json.dumps({"metrics": {}}) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "lsiq.tables.collect", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_a_study_that_says_the_same_agrees(committed: tuple[Runs, Literature]) -> None:
    runs = [run for run in committed[0].runs if (run.study, run.setting) == ("learned", "w2a16g128")]
    worse = [replace(run, metrics={key: 1.2 * value for key, value in run.metrics.items()}) for run in runs]
    assert len(pairs(runs, runs)) == 8  # two models, methods and texts
    assert all(pair.agrees for pair in pairs(runs, runs))
    # ln 1.2 = 0.18; the largest deviation there is omniquant's on WikiText-2, 0.032.
    assert not any(pair.agrees for pair in pairs(runs, worse))
    # How many sequences pass at once moves a number less than a seed does.
    otherwise = [replace(run, config={**run.config, "calib": {**run.config["calib"], "batch": 4}}) for run in runs]
    assert len(pairs(runs, otherwise)) == 8
    with pytest.raises(InputError, match="no configuration in common"):
        pairs(runs, [replace(run, setting="w8a16") for run in runs])


# Which runs stand in a table


def test_a_run_with_other_settings_does_not_stand_in_the_studys_tables(committed: tuple[Runs, Literature]) -> None:
    found = next(
        r for r in committed[0].runs if (r.study, r.method, r.setting) == ("learned", "lsi-corner", "w2a16g128")
    )
    assert STUDY.holds(found)

    def with_training(**values: Any) -> Run:
        method = {**found.config["method"], "training": {**found.config["method"]["training"], **values}}
        return replace(found, config={**found.config, "method": method})

    assert not STUDY.holds(with_training(epochs=5))
    assert Protocol(STUDY.overrides, "", varied=("method.training.epochs",)).holds(with_training(epochs=5))
    assert STUDY.holds(with_training(precision="float32")), "how it is computed makes no other method"
    assert STUDY.holds(with_training(an_option_of_tomorrow=1))
    assert not STUDY.holds(replace(found, config={**found.config, "calib": {"samples": 32}}))
    for model in ({"outliers": 4, "dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "auto"}):
        assert not STUDY.holds(replace(found, config={**found.config, "model": model})), model
    assert not STUDY.holds(replace(found, method="a-label-of-my-own"))
    assert not STUDY.holds(replace(found, method="rtn+gptq")), "rtn has no then"


def test_the_precision_of_training_a_whole_model_makes_another_method(committed: tuple[Runs, Literature]) -> None:
    found = next(r for r in committed[0].runs if (r.method, r.setting) == ("best", "w4a16g128") and STUDY.holds(r))
    why = {}
    for precision in ("bfloat16", "float32", "tf32"):
        training = {**found.config["method"]["training"], "precision": precision}
        run = replace(found, config={**found.config, "method": {**found.config["method"], "training": training}})
        why[precision] = STUDY.contradiction(run)
    assert why == {"bfloat16": "method.training.precision", "float32": None, "tf32": None}


def test_a_recipe_by_format_is_compared_with_that_of_the_runs_format(committed: tuple[Runs, Literature]) -> None:
    any_run = next(run for run in committed[0].runs if run.get("model.dtype") == "float32")
    for setting, other in (("w2a16g128", "w4a4"), ("w4a4", "w2a16g128")):
        plain = plain_config(compose_run("sweep=study", "method=best", f"quant={setting}"))
        kept = {key: without_nulls(plain[key]) for key in ("model", "calib", "method", "quant")}
        assert STUDY.holds(replace(any_run, method="best", setting=setting, config=kept))
        quant = without_nulls(plain_config(compose_run(f"quant={other}"))["quant"])
        assert not STUDY.holds(replace(any_run, method="best", setting=other, config={**kept, "quant": quant}))


def test_a_part_for_shifts_alone_may_be_missing_from_a_run_that_is_older(committed: tuple[Runs, Literature]) -> None:
    """LLaMA's norms take none, so that its runs of before are those of today; a later run counts where they do."""
    before = next(row.protocol for row in BESIDE if row.method == "best-before")
    found = [r for r in committed[0].runs if r.method == "best-before" and before.holds(r)]
    with_part = {r.run_id: r.get("method.start.then.then.parts.equivalent") is not None for r in found}
    assert set(with_part.values()) == {False, True}
    assert {r.model for r in found if not with_part[r.run_id]} >= {"tiny-llama"}
    later = next(r for r in found if with_part[r.run_id])
    changed = json.loads(json.dumps(later.config))
    changed["method"]["start"]["then"]["then"]["parts"][-1]["lr"] = 5e-3
    assert before.contradiction(replace(later, config=changed)) == "method.start.then.then.parts.2.lr"
    sample = committed[0].sample(before, "tiny-opt", "w4a4", "best-before", "excess/bundled@512")
    assert sample is not None
    assert max(sample.values) < 0.25, "the runs without the part left more"
    learned = {(r.setting, r.seed) for r in found if r.model == "tiny-opt" and with_part[r.run_id]}
    older = {(r.setting, r.seed) for r in found if r.model == "tiny-opt" and not with_part[r.run_id]}
    assert older <= learned, "OPT's norms take shifts, so a run without the part would stand for today's recipe"


def test_a_free_setting_of_a_part_is_free_by_the_parts_name(committed: tuple[Runs, Literature]) -> None:
    """Parts are lists in records; a table that varied the band of SDE had three of four columns empty."""
    width = "method.parts.expansion.width"
    band = [run for run in committed[0].runs if run.study == "ablation-width"]
    assert {run.get(width) for run in band} == {0, 2, 8}, "the study has 1"
    assert {STUDY.contradiction(run) for run in band} == {"method.parts.0.width"}
    assert {free(width).contradiction(run) for run in band} == {None}
    assert {free("method.parts.expansion.corner").contradiction(run) for run in band} == {"method.parts.0.width"}
    for axis in AXES:
        assert [value for value, _ in along(committed[0], axis, METRICS[0])] == list(axis.values), axis.sweep


def augmented(run: Run, **changes: Any) -> Run:
    """The run as if three times as much text that the model wrote had been beside."""
    return replace(run, config={**run.config, "calib": {**run.config["calib"], "written": 384}}, **changes)


def test_augmented_text_makes_rows_of_their_own_which_do_not_compete(committed: tuple[Runs, Literature]) -> None:
    runs = [run for run in committed[0].runs if (run.study, run.setting) == ("learned", "w2a16g128")]
    plain = bundled_perplexity(Runs(runs), ["w2a16g128"], "t", "C", "excess", ["omniquant", "lsi-corner"])
    assert [row.labels[1] for row in plain.rows] == ["omniquant", "lsi-corner"], "runs that know no such text had none"
    better = [
        augmented(run, metrics={key: 0.9 * value for key, value in run.metrics.items()})
        for run in runs
        if (run.model, run.method) == ("tiny-llama", "lsi-corner")
    ]
    table = bundled_perplexity(Runs([*runs, *better]), ["w2a16g128"], "t", "C", "excess", ["omniquant", "lsi-corner"])
    assert table.rows[:2] == plain.rows
    assert table.rows[2].labels == ("w2a16g128", "lsi-corner, augmented", "2.14")
    assert not any(cell.bold for cell in table.rows[2].cells)
    ours = [row.cells[0].sample for row in table.rows[1:]]
    assert ours[0] is not None
    assert ours[1] is not None
    assert ours[1].mean == pytest.approx(0.9 * ours[0].mean)
    assert table.commands == [
        "python run.py sweep=study calib=augmented model=tiny-opt quant=w2a16g128 method=lsi-corner",
    ]
    assert STUDY.contradiction(better[0]) == "calib.written"
    assert strangers([*runs, *better, replace(better[0], model="opt-125m")]) == {"calib.corpus": 1}
    assert strangers([replace(runs[0], config={**runs[0].config, "calib": {"samples": 32}})]) == {"calib.samples": 1}


def test_a_loss_that_is_not_above_zero_stands_on_the_edge_of_its_figure(committed: tuple[Runs, Literature]) -> None:
    runs = [run for run in committed[0].runs if (run.study, run.setting) == ("learned", "w2a16g128")]
    better = [
        replace(run, metrics={**run.metrics, EXCESS: -0.01}) if run.method == "lsi-corner" else run for run in runs
    ]
    for found, edge in ((runs, []), (better, ["≤ 0"])):
        for figure in (
            excess_by_method(Runs(found), ["w2a16g128"]),
            quality_against_bits(Runs(found), ["w2a16g128"]),
        ):
            assert all([text.get_text() for text in axis.texts] == edge for axis in figure.canvas.axes)
            (legend,) = figure.canvas.legends
            assert [text.get_text() for text in legend.get_texts()][-2:] == ["omniquant", "lsi-corner"]


def test_a_model_without_runs_leaves_the_panel_of_the_other_as_it_is(committed: tuple[Runs, Literature]) -> None:
    runs = [run for run in committed[0].runs if (run.study, run.model) == ("learned", "tiny-llama")]
    canvas = quality_against_bits(Runs(runs), ["w2a16g128"]).canvas
    left, right = canvas.axes
    assert [text.get_text() for text in right.texts] == ["not measured yet\npython run.py sweep=study model=tiny-opt"]
    canvas.draw_without_rendering()
    shown = [tick.label1.get_text() for tick in left.yaxis.get_major_ticks() if tick.label1.get_visible()]
    assert "0.3" in shown
    assert not any(tick.label1.get_visible() for tick in right.yaxis.get_major_ticks())


def test_of_two_runs_of_a_seed_the_later_one_that_measured_it_counts(committed: tuple[Runs, Literature]) -> None:
    found = next(r for r in committed[0].runs if (r.study, r.method, r.seed) == ("learned", "lsi-corner", 0))
    later = replace(found, created="2099-01-01", metrics={"ppl/bundled@512": 1.0})
    sample = Runs([later, found]).sample
    job = (STUDY, found.model, found.setting, "lsi-corner")
    assert sample(*job, "ppl/bundled@512") == Sample((1.0,))
    assert sample(*job, "ppl/wikitext2@512") == Sample((found.metrics["ppl/wikitext2@512"],))


def test_rounding_and_the_float_model_are_read_from_beside_other_methods(committed: tuple[Runs, Literature]) -> None:
    others = Runs(run for run in committed[0].runs if run.method != "rtn")
    found = next(r for r in others.runs if "rtn/ppl/bundled@512" in r.metrics)
    rtn = others.sample(STUDY, found.model, found.setting, "rtn", "ppl/bundled@512")
    assert rtn is not None
    assert rtn.values == (pytest.approx(239.286, abs=1e-3),)  # as in docs/results.md
    assert rtn.spread == 0.0
    few = replace(found, config={**found.config, "eval": {**found.config["eval"], "windows": 32}})
    assert Runs([few]).sample(STUDY, found.model, found.setting, "rtn", "ppl/bundled@512") is None
    assert Runs([few]).sample(STUDY, found.model, "fp16", "fp16", "ppl/bundled@512") is None


# Published numbers


@pytest.mark.parametrize(
    ("model", "setting", "method", "dataset", "text"),
    [
        ("opt-125m", "fp16", "fp16", "wikitext2", "27.65"),
        ("llama-2-7b", "w4a16g128", "gptq", "wikitext2", "5.61"),
        ("opt-125m", "w2a16g128", "omniquant", "wikitext2", "75.43"),  # its own table, not a quotation of it
        ("opt-125m", "w2a16g128", "lsi-corner", "wikitext2", "56.17†"),
        ("llama-7b", "w3a16g128", "lsi-finetune", "ptb", "30.69†"),
        ("opt-1.3b", "w4a8-mxint", "rtn", "wikitext2", "16.12"),  # there called mxint-plain
        ("llama-3-8b", "w2a16g128", "efficientqat", "wikitext2", "9.80"),  # of the later additions
        ("llama-2-7b", "w2a16g128", "efficientqat", "c4", "8.79†"),
    ],
)
def test_published_numbers_come_from_the_most_trustworthy_place(
    committed: tuple[Runs, Literature], model: str, setting: str, method: str, dataset: str, text: str
) -> None:
    found = committed[1].perplexity(model, setting, method, dataset)
    assert found is not None
    assert found.marked == text


@pytest.mark.shared
def test_the_published_tables_are_copies() -> None:
    for file in (SHARED / "published").glob("*.csv"):
        assert (ROOT / "analysis" / "published" / file.name).read_bytes() == file.read_bytes(), file.name


def test_later_additions_name_sources_that_are_described() -> None:
    folder = ROOT / "analysis" / "published"
    described = {row["key"] for place in (folder, folder / "more") for row in _csv(place / "sources.csv")}
    for name in ("perplexity.csv", "zero_shot.csv"):
        rows = _csv(folder / "more" / name)
        assert list(rows[0]) == list(_csv(folder / name)[0]), f"{name}: other columns"
    for name in ("perplexity.csv", "zero_shot.csv", "formats.csv"):
        rows = _csv(folder / "more" / name)
        assert {row["source"] for row in rows} <= described, name
        assert {row["trust"] for row in rows} <= set(MARKS), name


def _csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


# Cells


def bold(*samples: Sample | None, competes: tuple[bool, ...] = (), lower: bool = True) -> list[bool]:
    rows = [Row((str(i),), (Cell(sample),), "", competes[i] if competes else True) for i, sample in enumerate(samples)]
    return [row.cells[0].bold for row in best_in_bold(rows, lower)]


def test_bold_needs_a_t_test_over_seeds() -> None:
    least, near, far = Sample((1.0, 1.1, 1.2)), Sample((1.2, 1.3, 1.4)), Sample((1.3, 1.4, 1.5))
    # Deviations of 0.1, so that t = gap / 0.0816 with four degrees of freedom: p is 0.070 at 0.2 and 0.021 at 0.3.
    assert not told_apart(least, near)
    assert told_apart(least, far)
    assert told_apart(far, least)
    assert bold(least, far) == [True, False]
    assert bold(least, near) == [False, False]
    assert bold(near, least, far) == [False, False, False], "every other must be told apart"
    assert bold(least, far, lower=False) == [False, True]


def test_the_test_does_not_take_deviations_for_equal() -> None:
    """Welch: t = 2.59 with 2.04 degrees of freedom, p = 0.120; with equal deviations and four, 0.061."""
    narrow, wide = Sample((1.0, 1.01, 1.02)), Sample((1.06, 1.16, 1.26))
    assert not told_apart(narrow, wide)
    assert told_apart(narrow, Sample((1.30, 1.40, 1.50)))  # t = 6.7, p = 0.020


def test_a_single_seed_neither_wins_nor_is_beaten() -> None:
    assert bold(Sample((1.0,)), Sample((5.0, 5.1))) == [False, False]
    assert bold(Sample((5.0,)), Sample((1.0, 1.1))) == [False, False]
    assert bold(Sample((1.0, 1.1)), Sample((5.0, 5.1)), Sample((9.0,))) == [False, False, False]


def test_what_has_no_seed_is_a_constant() -> None:
    rounded = Sample((5.0,), exact=True)
    assert bold(rounded, Sample((1.0, 1.1))) == [False, True]  # t = 79 with one degree of freedom, p = 0.008
    assert bold(rounded, Sample((4.7, 4.9))) == [False, False]  # t = 2, p = 0.30
    assert bold(Sample((1.0,), exact=True), Sample((4.7, 4.9, 5.1))) == [True, False]
    assert bold(rounded, Sample((4.0,), exact=True)) == [False, True]
    assert bold(rounded, rounded) == [False, False]
    assert bold(Sample((1.0, 1.0)), Sample((2.0, 2.0))) == [True, False]


def test_a_table_names_the_test_where_something_is_bold() -> None:
    def table(*samples: Sample) -> Table:
        rows = [Row((str(index),), (Cell(sample),)) for index, sample in enumerate(samples)]
        return Table("t", "C", ("m", "a"), best_in_bold(rows))

    told = table(Sample((1.0, 1.1, 1.2)), Sample((1.3, 1.4, 1.5)))
    assert told.markdown().count("Welch's t-test over seeds (two-sided, p < 0.05)") == 1
    assert "within 2 %" in told.markdown()
    assert r"within 2 \%" in told.latex()
    assert "Welch" not in table(Sample((1.0, 1.1, 1.2)), Sample((1.2, 1.3, 1.4))).markdown()


def test_rows_beside_the_study_follow_its_protocol_in_all_but_the_recipe(committed: tuple[Runs, Literature]) -> None:
    for row in BESIDE:
        found = committed[0].find(row.protocol, "tiny-opt", row.setting, row.method)
        assert [run.seed for run in found] == [0, 1, 2], row.label
        assert STUDY.contradiction(found[0]) == "method", row.label
        calib = {**found[0].config["calib"], "samples": 32}
        assert row.protocol.contradiction(replace(found[0], config={**found[0].config, "calib": calib}))
        plain = next(run for run in committed[0].runs if (run.method, run.setting) == ("sde", row.setting))
        assert not row.protocol.holds(plain), "another recipe"
    table = bundled_perplexity(committed[0], ["w4a4"], "t", "C", "excess", ["omniquant"])
    assert [row.labels[1] for row in table.rows] == [
        "omniquant",
        *(row.label for row in BESIDE if row.setting == "w4a4"),
    ]
    assert not table.commands
    assert [row.competes for row in table.rows] == [True, True, False, False, False], "rotations take bits"
    other = bundled_perplexity(committed[0], ["w6a6"], "t", "C", "excess", ["omniquant"])
    assert [row.labels[1] for row in other.rows] == ["omniquant", "best before"]


def test_more_bits_do_not_compete() -> None:
    assert bold(Sample((1.0, 1.1)), Sample((3.0, 3.1)), Sample((5.0, 5.1)), competes=(False, True, True)) == [
        False,
        True,
        False,
    ]


def test_a_cell_shows_ours_beside_the_published_number() -> None:
    ours, theirs = Sample((10.0, 10.2)), Published("9.72", "second-hand", "somebody")
    row = (Cell(ours, theirs, bold=True), Cell(None, theirs, wanted=True), Cell(None, theirs), Cell(ours))
    table = Table("t", "Caption", ("method", *"abcd"), (Row(("lsi",), row),), beside=True)
    assert "| lsi | **10.10 ± 0.14** / 9.72† | – / 9.72† | · / 9.72† | 10.10 ± 0.14 / – |" in table.markdown()
    assert r"lsi & \textbf{10.10 $\pm$ 0.14} / 9.72$^\dagger$ & -- / 9.72$^\dagger$" in table.latex()
    assert "10.00 (1 seed)" in Table("t", "C", ("m", "a"), (Row(("x",), (Cell(Sample((10.0,))),)),)).markdown()


# Commands


def jobs_of(commands: list[str]) -> list[tuple[str, ...]]:
    """The jobs that commands carry out, seeds aside."""
    found = []
    for command in commands:
        words = dict(word.split("=", 1) for word in command.split()[2:] if "=" in word)
        method = "+".join([words["method"], *(words[key] for key in words if key.startswith("method@"))])
        lists = [words["model"].split(","), words["quant"].split(","), method.split(",")]
        found += list(itertools.product(*lists))
    return found


def test_commands_carry_out_just_the_empty_cells() -> None:
    jobs = [
        ("tiny-opt", "w4a4", "gptq"),
        ("tiny-llama", "w4a4", "gptq"),
        ("tiny-llama", "w6a6", "gptq"),
        ("tiny-llama", "w4a4", "awq+gptq"),
        ("tiny-llama", "w4a4", "lsi-corner"),
        ("tiny-opt", "w4a4", "lsi-corner"),
    ]
    commands = STUDY.commands(jobs)
    assert sorted(jobs_of(commands)) == sorted(jobs)
    assert commands[0] == "python run.py sweep=study model=tiny-opt,tiny-llama quant=w4a4 method=gptq,lsi-corner"
    assert len(commands) == 3


def test_every_command_of_the_pages_is_a_run_that_would_start() -> None:
    blocks = [
        block
        for page in (ROOT / "docs" / "tables").glob("*.md")
        if page.stem != "README"  # whose commands tests/pages/test_docs.py checks
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    commands = {command for block in blocks for line in block.splitlines() for command in line.split(" && ")}
    assert commands
    for command in commands:
        words = command.replace("<its run id>", "some-run").split()
        assert words[:2] == ["python", "run.py"]
        given = dict(word.split("=", 1) for word in words[2:] if word != "-m")
        if "sweep" in given:  # what the command does not say, the study does
            study = yaml.safe_load((ROOT / "sweeps" / f"{given['sweep']}.yaml").read_text(encoding="utf-8"))
            given = {key: str(values) for key, values in study["hydra"]["sweeper"]["params"].items()} | given
        parse(compose_run(*(f"{key}={values.rpartition(',')[2]}" for key, values in given.items())))


def test_the_study_is_what_its_files_say() -> None:
    jobs = study_jobs()
    assert len(jobs) == 204  # times three seeds
    assert ("tiny-opt", "w4a8-mxint", "lsi-corner") in jobs
    assert ("tiny-llama", "w2a16g128", "best") in jobs
    assert not {job for job in jobs if job[1:] in {("w4a8-mxint", "best"), ("w4a16", "smoothquant")}}
    assert PAPERS.commands([("opt-125m", "w4a16", "rtn")]) == [
        "python run.py -m experiment=paper-protocol model=opt-125m quant=w4a16 method=rtn seed=0,1,2"
    ]


# Pages


def test_notebooks_are_stored_without_outputs() -> None:
    assert len(NOTEBOOKS) == 13
    for file in NOTEBOOKS:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code), file.name
        assert all(len(cell["source"]) < 16 for cell in code), f"{file.name}: work belongs into lsiq/tables"


@pytest.mark.slow
def test_the_tour_of_the_python_interface_runs() -> None:
    shown = execute(ROOT / "analysis" / "tour.ipynb")
    printed = [
        output.text for cell in shown.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    ]
    assert any("method.training.epochs=-1" in text for text in printed)


def test_executing_a_notebook_gives_its_committed_page_byte_for_byte() -> None:
    (notebook,) = (file for file in NOTEBOOKS if file.stem == "tasks")
    page = render([notebook])["tasks.md"]
    assert (ROOT / "docs" / "tables" / "tasks.md").read_text(encoding="utf-8") == page, "python -m lsiq.tables.render"


@pytest.mark.slow
def test_executing_the_notebooks_gives_the_committed_tables_byte_for_byte() -> None:
    files = render(NOTEBOOKS)  # 14 s on two idle cores, each notebook in a kernel of its own
    pages = {name: text for name, text in files.items() if name.endswith((".md", ".tex"))}
    folder = ROOT / "docs" / "tables"
    for name, text in pages.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"{name}: python -m lsiq.tables.render"
    stored = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in (".md", ".tex")}
    assert stored - {"README.md"} == set(pages)
    figures = {match for text in pages.values() for match in re.findall(r"\((figures/[^)]+)\)", str(text))}
    assert {f"figures/{file.name}" for file in (folder / "figures").glob("*.svg")} == figures
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert in_readme(readme, str(pages[f"{README_PAGE}.md"])) == readme, "README.md: python -m lsiq.tables.render"


def test_a_readme_without_a_place_for_the_table_is_an_error() -> None:
    with pytest.raises(InputError, match=re.escape("README.md: the lines <!-- begin")):
        in_readme("# Title\n", "<!-- page -->\n")


def test_a_page_without_the_table_of_readme_is_an_error() -> None:
    with pytest.raises(InputError, match=README_TABLE):
        in_readme("\n".join(README_MARKS), "# Page\n\n**Other**\n\n| b |\n")


def test_readme_shows_one_table_of_a_page() -> None:
    table = "| left | a |\n| --- | --- |\n| x | 5 |"
    page = (
        f"# Page\n\n**Other**\n\n| b |\n| --- |\n| 4 |\n\n**{README_TABLE}: words**\n\n{table}\n\n**Last**\n\n| c |\n"
    )
    begin, end = README_MARKS
    assert in_readme(f"before\n{begin}\nstale\n{end}\nafter\n", page) == (
        f"before\n{begin}\n\n{table}\n\n{end}\nafter\n"
    )
