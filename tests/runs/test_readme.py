"""README's commands are carried out, on small models and few samples; tests/pages/test_docs.py checks the others."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from helpers.configuration import compose_run
from helpers.pages import ROOT, blocks, commands

from lsiq.experiment.run import run
from lsiq.results.record import Record

README = ROOT / "README.md"
COMMANDS = commands(README)
FEW = ["calib.samples=2", "calib.batch=2", "calib.seqlen=64", "method.training.epochs=1", "eval.windows=1"]
SMALL = ["calib.samples=4", "calib.batch=2", "calib.seqlen=32", "quant.weight.group=32", "eval.seqlen=64"]


def command(*words: str) -> list[str]:
    """The only command of README that has all these words; its own words behind the program."""
    found = [given for given in COMMANDS if set(words) <= set(given)]
    assert len(found) == 1, f"README has {len(found)} commands with {words}"
    return found[0][2:]


def carry_out(given: list[str], *overrides: str) -> Record:
    words = [*given, "tracker=none", *overrides]
    return run(compose_run(*words), words)


@pytest.fixture(scope="module")
def small(checkpoints: dict[str, Path], text_file: Path) -> list[str]:
    """What stands for DIR and its texts, and makes a run take a second."""
    calib = ["calib=file", f"calib.path={text_file}", "eval=file", f"eval.path={text_file}"]
    return [f"model.path={checkpoints['llama']}", *calib, *SMALL]


@pytest.fixture(scope="module")
def runs(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record, Record]:
    """A folder with the run whose export README asks for, and a second run."""
    pytest.importorskip("compressed_tensors")
    folder = tmp_path_factory.mktemp("readme")
    first = carry_out(command("export=compressed-tensors"), *small, f"paths.runs={folder / 'runs'}")
    return folder, first, carry_out(["method=rtn"], *small, f"paths.runs={folder / 'runs'}")


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_first_command_prints_what_readme_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ["python", "run.py"] in COMMANDS
    carry_out([], *FEW, f"paths.runs={tmp_path}")
    shown = blocks(README, "text")[0].splitlines()
    out, err = capsys.readouterr()
    printed = [line.rstrip() for line in (out + err).splitlines()]
    assert shown[0] in printed

    def columns(lines: list[str]) -> list[str]:
        return re.split(r"\s*┃\s*", next(line for line in lines if "corpus" in line))

    assert columns(printed) == columns(shown)


@pytest.mark.slow
def test_the_main_job_finds_the_numbers_of_readme(tmp_path: Path) -> None:
    # .ci/run names the folder in which it has just carried it out.
    record = carry_out([], f"paths.runs={os.environ.get('LSIQ_MAIN_JOB', tmp_path)}")
    row = next(line for line in blocks(README, "text")[0].splitlines() if "bundled@512" in line)
    real, rtn, lsi = (float(cell) for cell in row.split("│")[2:5])
    found = record.metrics
    assert found["float/ppl/bundled@512"] == pytest.approx(real, rel=1e-4)
    assert found["rtn/ppl/bundled@512"] == pytest.approx(rtn, rel=1e-3)
    assert found["ppl/bundled@512"] == pytest.approx(lsi, rel=0.02)  # runs of two processes were 0.3 % apart


def test_your_own_model_and_text(small: list[str], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    given = command("model.path=DIR", "calib.path=train.txt", "eval.path=test.txt")
    record = carry_out(given, *small, "method.training.epochs=1", f"paths.runs={tmp_path}")
    assert record.status == "finished"
    assert record.config["model"]["path"] == str(checkpoints["llama"])
    assert record.method == "lsi-quick"
    assert "ppl/file@64" in record.metrics


def test_an_export_at_the_end_of_a_run_and_one_later(runs: tuple[Path, Record, Record]) -> None:
    pytest.importorskip("gguf")
    folder, first, _ = runs
    assert first.exports["compressed-tensors"]["status"] == "finished"
    given = [word.replace("RUN_A", first.run_id) for word in command("from=RUN_A")]
    given.append(f"paths.runs={folder / 'runs'}")
    assert run(compose_run(*given), given).exports["gguf"]["status"] == "finished"


def test_the_reports_of_two_runs(
    runs: tuple[Path, Record, Record], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, first, second = runs
    monkeypatch.chdir(folder)  # reports read runs/
    asked = [given[2:] for given in COMMANDS if given[:2] == ["python", "-m"] and given[2] == "lsiq.report"]
    assert len(asked) == 3
    for words in asked:
        named = {"RUN_A": first.run_id, "RUN_B": second.run_id}
        monkeypatch.setattr(sys, "argv", [named.get(word, word) for word in words])
        runpy.run_module("lsiq.report", run_name="__main__", alter_sys=False)
        printed = capsys.readouterr().out
        if "--html" in words:
            (file,) = folder.glob("**/*.html")
            assert str(file.relative_to(folder)) in printed.replace("\n", "")
            printed = file.read_text(encoding="utf-8")
        assert first.run_id in printed or "gptq" in printed
        assert "rtn" in printed
