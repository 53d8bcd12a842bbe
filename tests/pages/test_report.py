"""Reports find runs, list them without torch, and say what differs and what got worse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
from omegaconf import DictConfig

from lsiq.errors import InputError
from lsiq.experiment.run import run
from lsiq.report.differences import side_by_side, what_got_worse
from lsiq.report.runs import list_table, read_runs
from lsiq.report.summary import summary
from lsiq.report.terminal import show_record
from lsiq.results.find import find_run
from lsiq.results.record import Record
from lsiq.runtime.terminal import warn
from lsiq.track.panels import Table

KEY = "ppl/file@64"


@pytest.fixture(scope="module")
def two_runs(checkpoints: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run at 2 bits and one at 4."""
    from helpers.configuration import compose_run

    runs = tmp_path_factory.mktemp("runs")
    for bits in (2, 4):
        run(
            compose_run(
                f"model.path={checkpoints['llama']}",
                "method=rtn",
                "calib=file",
                f"calib.path={text_file}",
                "calib.samples=4",
                "calib.seqlen=32",
                "eval=file",
                f"eval.path={text_file}",
                "eval.seqlen=64",
                f"quant.weight.bits={bits}",
                "quant.weight.group=32",
                "tracker=none",
                f"paths.runs={runs}",
            )
        )
    return runs


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lsiq.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_run_is_found_by_a_part_of_its_id(two_runs: Path) -> None:
    record, folder = find_run(two_runs, "w2a16")
    assert record.setting == "w2a16g32"
    assert find_run(two_runs, folder.name)[1] == find_run(two_runs, str(folder))[1] == folder
    with pytest.raises(InputError, match="2 runs are called so"):
        find_run(two_runs, "rtn")
    with pytest.raises(InputError, match="no such run"):
        find_run(two_runs, "gptq")


def test_runs_are_listed_chosen_and_sorted(two_runs: Path) -> None:
    records = read_runs(two_runs)
    coarse, fine = records
    table = list_table(records, [], None)
    assert table.columns[:4] == ["run", "status", KEY, "excess/file@64"]
    assert [row[2] for row in table.rows] == [coarse.metrics[KEY], fine.metrics[KEY]]
    assert [row[0] for row in list_table(records, [KEY], KEY).rows] == [
        record.run_id for record in sorted(records, key=lambda record: record.metrics[KEY])
    ]
    assert [record.run_id for record in read_runs(two_runs, ["quant.weight.bits=4"])] == [fine.run_id]
    assert read_runs(two_runs, ["setting=w4a16g32", "method=gptq"]) == []
    assert read_runs(two_runs, ["method=gptq", "quant.weight.bits=4"]) == [], "the order of conditions does not matter"
    with pytest.raises(InputError, match=r"quant\.bits=4: key=value is expected"):
        read_runs(two_runs, ["quant.bits=4"])
    with pytest.raises(InputError, match="ppl/c4: no run has measured it"):
        list_table(records, ["ppl/c4"], None)


def test_two_runs_stand_side_by_side_with_intervals(two_runs: Path) -> None:
    runs = [find_run(two_runs, named) for named in ("w2a16", "w4a16")]
    tables = {table.name: table for table in side_by_side(runs, 0.95, whole=False) if isinstance(table, Table)}
    assert tables["settings that differ"].rows == [["quant.weight.bits", "2", "4"]]
    metrics = {row[0]: row[1:] for row in tables["metrics"].rows}
    assert metrics[KEY] == [record.metrics[KEY] for record, _ in runs]
    assert not any(str(key).startswith("loss_change") for key in metrics)
    intervals = tables["B - A"]
    assert {row[0] for row in intervals.rows} == {"kl/file@64", "loss/file@64"}
    for *_, pairs, blocks, _ in intervals.rows:
        assert (pairs, blocks) == (runs[0][0].protocol["ppl/file@64"]["windows"], 8)
    whole = next(t for t in side_by_side(runs, 0.95, whole=True) if isinstance(t, Table) and t.name == "metrics")
    assert set(runs[0][0].metrics) <= {row[0] for row in whole.rows}


def test_what_got_worse_is_what_the_runs_left(two_runs: Path) -> None:
    coarse, fine = (find_run(two_runs, named) for named in ("w2a16", "w4a16"))
    blocks, linears = what_got_worse(fine, coarse, 3)
    assert isinstance(blocks, Table)
    assert isinstance(linears, Table)
    assert blocks.name == "2 of 2 blocks got worse"
    assert linears.name == "14 of 14 linears got worse, the worst 3"
    rows = {}
    for name, (_, folder) in {"A": fine, "B": coarse}.items():
        found = pandas.read_parquet(folder / "trajectory.parquet")
        rows[name] = found.set_index(["block", "linear"])["error_after"]
    ratios = (rows["B"] / rows["A"]).sort_values(ascending=False)
    assert [tuple(row[:2]) for row in linears.rows] == list(ratios.index[:3])
    assert [row[-1] for row in linears.rows] == pytest.approx(list(ratios[:3]))
    assert list(what_got_worse(coarse, fine, 3)) == ["0 of 2 blocks got worse.", "0 of 14 linears got worse."]


def test_runs_that_cannot_be_paired_are_still_compared(
    two_runs: Path, checkpoints: dict[str, Path], small_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    shorter = run(small_run(checkpoints["llama"], "eval.windows=9", "calib=none"))
    runs = [find_run(two_runs, "w2a16"), find_run(tmp_path / "runs", shorter.run_id)]
    *_, remark = side_by_side(runs, 0.95, whole=False)
    assert isinstance(remark, str)
    assert remark.startswith("No interval of B - A: ppl/file@64")
    blocks, _ = what_got_worse(*runs, 3)
    assert blocks == "No errors of blocks that both runs have measured."


def test_a_summary_is_markdown_with_all_that_an_issue_needs(two_runs: Path) -> None:
    record, _ = find_run(two_runs, "w2a16")
    text = summary(record)
    assert text.startswith("### llama · w2a16g32 · rtn · seed 0\n")
    assert f"| file@64 | rtn | {record.metrics[KEY]:.5g} |" in text
    assert "quant.weight.bits=2\n" in text
    assert "calib.fields=[text]\n" in text
    assert "eval.items=null\n" in text
    assert text.count("<details>") == text.count("</details>") == 2
    broken = Record("m_w3a16_lsi_s1_0", "failed", "2026-01-01", {}, 1, {}, error="block 0: the loss is not finite")
    assert "> block 0: the loss is not finite" in summary(broken)


def test_the_commands_print_tables_markdown_or_one_line(two_runs: Path) -> None:
    runs = ("--runs", str(two_runs))
    assert KEY in call("list", *runs).stdout
    assert call(*runs).stdout == call("list", *runs).stdout
    shown = call("compare", "w2a16", "w4a16", *runs, "--markdown").stdout
    assert "| quant.weight.bits | 2 | 4 |" in shown
    assert "linears got worse" in call("diff", "w4a16", "w2a16", *runs).stdout
    assert call("show", "w2a16", *runs).stdout.startswith("### llama")
    wrong = {
        ("list", "--runs", "/nowhere"): "--runs=/nowhere: no such folder",
        ("show", "x", *runs): "x: no such run",
        ("compare", "w2a16", *runs): "give two runs or more",
        ("compare", "w2a16", "w4a16", *runs, "--level=2"): "--level=2",
    }
    for arguments, wanted in wrong.items():
        done = call(*arguments)
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if line.strip()]
        assert line.startswith("error: ")
        assert wanted in line


def test_listing_needs_neither_torch_nor_pandas(two_runs: Path) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['report', 'list', '--runs', {str(two_runs)!r}]\n"
        "runpy.run_module('lsiq.report', run_name='__main__')\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'wandb', 'pydantic', 'hydra'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_warning_keeps_its_square_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    warn("install lsiq[wandb]")
    assert "install lsiq[wandb]" in capsys.readouterr().err


def test_a_run_of_a_model_without_published_numbers_ends_with_its_table(
    two_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, _ = find_run(two_runs, "w2a16")
    model = {key: value for key, value in record.config["model"].items() if key != "published"}
    show_record(replace(record, config={**record.config, "model": model}))
    assert "file@64" in capsys.readouterr().out
