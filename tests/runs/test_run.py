"""The main job: one command, one record, the same number as an independent implementation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.configuration import CONF, compose_run
from helpers.evaluations import plain_perplexity
from helpers.marks import slow
from helpers.models import SHAPES, save_model
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM

from lsiq.errors import LsiqError, OutputError
from lsiq.experiment.run import run
from lsiq.results.record import Record, read_record, write_record
from lsiq.results.store import BlockStore
from lsiq.runtime.memory import peak_bytes

SmallRun = Callable[..., DictConfig]


def rounded_copy(checkpoint: Path, folder: Path, bits: int, group: int) -> Path:
    """Round every linear of every block with a few lines of torch that share nothing with the package."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    levels = 2**bits - 1
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            w = module.weight.data
            g = w.reshape(-1, group)
            low = torch.minimum(g.min(1, keepdim=True).values, torch.zeros(1))
            high = torch.maximum(g.max(1, keepdim=True).values, torch.zeros(1))
            step = (high - low) / levels
            zero = torch.round(-low / step)
            module.weight.data = ((torch.round(g / step) + zero).clamp(0, levels).sub(zero) * step).reshape(w.shape)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_bytes((checkpoint / "tokenizer_config.json").read_bytes())
    return folder


@pytest.mark.parametrize(("bits", "group"), [slow(2, 32), (3, 16), slow(4, 32), slow(8, 32)])
def test_rtn_gives_the_perplexity_of_an_independent_implementation(
    checkpoint: Path, text_file: Path, tmp_path: Path, small_run: SmallRun, bits: int, group: int
) -> None:
    record = run(small_run(checkpoint, f"quant.weight.bits={bits}", f"quant.weight.group={group}"))
    expected = plain_perplexity(rounded_copy(checkpoint, tmp_path / "rounded", bits, group), text_file.read_text(), 64)
    assert record.metrics["ppl/file@64"] == pytest.approx(expected, rel=1e-5)  # measured: 1e-8
    reference = plain_perplexity(checkpoint, text_file.read_text(), 64)
    assert record.metrics["float/ppl/file@64"] == pytest.approx(reference, rel=1e-5)
    assert record.metrics["excess/file@64"] == pytest.approx(math.log(expected / reference), abs=1e-5)
    assert record.average_bits == bits + (16 + bits) / group


def test_the_record_says_where_its_numbers_come_from(checkpoint: Path, small_run: SmallRun, tmp_path: Path) -> None:
    record = run(small_run(checkpoint))
    written = json.loads((tmp_path / "runs" / record.run_id / "record.json").read_text())
    assert written["status"] == "finished"
    assert written["seed"] == 0
    assert written["config"]["quant"]["weight"]["bits"] == 3
    assert set(written["inputs"]) == {"model", "calib.path", "eval.path"}
    assert written["calibration"]["samples"] == 4
    assert len(written["calibration"]["tokens"]) == 16
    protocol = written["protocol"]["ppl/file@64"]
    assert protocol["predicted_tokens"] == protocol["windows"] * 63
    assert {"python", "torch", "transformers", "lsiq"} <= set(written["versions"])
    assert {"load", "quantize", "evaluate", "total"} <= set(written["seconds"])
    assert written["peak_bytes"]["host"] > 0
    assert [block["index"] for block in written["blocks"]] == [0, 1]
    assert all(0 < block["error"] < 1 for block in written["blocks"])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of the process cannot be set back")
def test_no_stage_of_a_run_takes_the_peak_of_what_the_process_did_before(checkpoint: Path, small_run: SmallRun) -> None:
    before = torch.ones(100_000_000)  # 400 MB, as an earlier job of a sweep may have taken
    peak = peak_bytes()["host"]
    del before
    record = run(small_run(checkpoint))
    assert record.stage_peaks["load"]["host"] < peak - 300_000_000
    assert max(stage["host"] for stage in record.stage_peaks.values()) <= record.peak_bytes["host"]


def test_the_peak_of_a_run_is_that_of_its_highest_stage_of_whatever_process(
    checkpoint: Path, small_run: SmallRun
) -> None:
    record = run(small_run(checkpoint))
    before = replace(record, stage_peaks={**record.stage_peaks, "quantize": {"host": 2**60, "device": 2**60}})
    before.note_peaks()
    assert before.peak_bytes == {"host": 2**60, "device": 2**60}


def test_a_finished_run_comes_back_at_once_and_force_runs_anew(checkpoint: Path, small_run: SmallRun) -> None:
    first = run(small_run(checkpoint))
    again = run(small_run(checkpoint))
    assert again == first  # the very record, creation time and all
    forced = run(small_run(checkpoint, "force=true"))
    assert forced.metrics == first.metrics  # and the same numbers, to the bit
    assert forced.seconds != first.seconds


def test_all_windows_that_are_too_long_are_told_of_at_once(checkpoint: Path, small_run: SmallRun) -> None:
    message = (
        r"^calib\.seqlen=4096 and eval\.seqlen=2048: the model has (\d+) positions; use at most \1 \(model\.seqlen=\1 "
    )
    with pytest.raises(LsiqError, match=message):
        run(small_run(checkpoint, "calib.seqlen=4096", "eval.seqlen=2048"))


@pytest.mark.parametrize(("epochs", "rate", "harmed"), [(1, 3.0, True), (10, 0.03, False)])
def test_a_block_that_training_left_worse_is_told_of(
    checkpoint: Path, small_run: SmallRun, capsys: pytest.CaptureFixture[str], epochs: int, rate: float, harmed: bool
) -> None:
    words = ["method=lsi", f"method.training.epochs={epochs}", f"method.parts.clip.lr={rate}"]
    record = run(small_run(checkpoint, *words, "method.training.precision=float32"))
    worse = [block["error"] > 1.1 * block["metrics"]["loss_first"] for block in record.blocks]
    assert worse[0] == harmed
    said = capsys.readouterr().err
    told = [f"block {index}: its error is" in said for index in (0, 1)]
    assert told == worse


def test_a_changed_text_or_checkpoint_is_another_run(text_file: Path, tmp_path: Path, small_run: SmallRun) -> None:
    model = save_model(SHAPES["llama"], tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    first = run(small_run(model, f"eval.path={text}"))
    text.write_text(text_file.read_text() + "And then the tide turned.\n")
    second = run(small_run(model, f"eval.path={text}"))
    save_model(SHAPES["llama"], tmp_path / "model", std=0.05)
    third = run(small_run(model, f"eval.path={text}"))
    assert len({first.run_id, second.run_id, third.run_id}) == 3


def test_a_failed_run_leaves_a_record_and_is_tried_again(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = BlockStore.write

    def disk_full(self: BlockStore, *args: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(BlockStore, "write", disk_full)
    with pytest.raises(LsiqError, match="the disk is full"):
        run(small_run(checkpoint))
    (file,) = (tmp_path / "runs").glob("*/record.json")
    failed = read_record(file.parent)
    assert failed is not None
    assert (failed.status, failed.error) == ("failed", "the disk is full")
    monkeypatch.setattr(BlockStore, "write", written)
    assert run(small_run(checkpoint)).status == "finished"


def test_the_float_setting_measures_the_float_model(checkpoint: Path, small_run: SmallRun) -> None:
    record = run(small_run(checkpoint, "quant=fp16"))
    assert record.metrics["ppl/file@64"] == record.metrics["float/ppl/file@64"]
    assert record.average_bits is None


def test_a_method_without_data_runs_without_calibration(checkpoint: Path, small_run: SmallRun) -> None:
    with_data = run(small_run(checkpoint))
    without = run(small_run(checkpoint, "calib=none"))
    assert without.metrics == with_data.metrics
    assert without.calibration == {}
    assert [block["error"] for block in without.blocks] == [None, None]


def test_random_weights_run_through_the_whole_program(tmp_path: Path) -> None:
    shape = (
        "{model_type:llama,hidden_size:64,intermediate_size:128,num_hidden_layers:2,"
        "num_attention_heads:4,num_key_value_heads:2,vocab_size:4096}"
    )
    record = run(
        compose_run(
            "model=llama-2-7b",
            "model.weights=random",
            "method=rtn",
            f"model.architecture={shape}",
            "calib=random",
            "calib.samples=2",
            "calib.seqlen=32",
            "eval=random",
            "eval.seqlen=32",
            "eval.windows=2",
            "quant.weight.group=32",
            "tracker=none",
            f"paths.runs={tmp_path}",
        )
    )
    assert record.status == "finished"
    assert 1000 < record.metrics["ppl/random@32"] < 20000  # near the size of the vocabulary: it knows nothing


def test_records_survive_the_round_trip_and_other_schemas_are_left_alone(tmp_path: Path) -> None:
    record = Record("id", "finished", "2026-01-01", {"a": 1}, 0, {}, metrics={"ppl/x@8": 3.5})
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record
    path = tmp_path / "record.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))
    assert read_record(tmp_path) is None


def test_the_objective_of_a_run_is_its_first_perplexity(checkpoint: Path, small_run: SmallRun) -> None:
    record = run(small_run(checkpoint))
    assert record.objective == record.metrics["ppl/file@64"]


# What other settings ask for: trackers, corpora of the hub, tasks, exports, sweeps, kernels and compiling, pages.
OF_OTHER_SETTINGS = {
    *("wandb", "trackio", "mlflow", "tensorboard", "datasets", "lm_eval", "sklearn", "nltk", "gguf"),
    *("compressed_tensors", "joblib", "submitit", "ray", "optuna", "lsiq.kernels", "torch._inductor.compile_fx"),
    *("lsiq.tables", "lsiq.report.page", "matplotlib", "IPython"),
}
MODULES_OF_A_RUN = f"""
import sys
from lsiq.cli.main import main
main()
unused = set({sorted(OF_OTHER_SETTINGS)}) & set(sys.modules)
assert not unused, sorted(unused)
"""


@pytest.mark.parametrize("method", ["rtn", slow("lsi-quick")])
def test_a_run_imports_nothing_that_its_settings_do_not_ask_for(
    checkpoints: dict[str, Path], tmp_path: Path, method: str
) -> None:
    words = [f"model.path={checkpoints['llama']}", "model.seqlen=64", f"method={method}", "quant.weight.group=32"]
    words += ["calib.samples=2", "eval.windows=2", "tracker=none"]
    done = subprocess.run(
        [sys.executable, "-c", MODULES_OF_A_RUN, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.product
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt"])
def test_the_bundled_models_run_from_any_folder(model: str, tmp_path: Path) -> None:
    command = [sys.executable, str(CONF.parent / "run.py"), f"model={model}", "method=rtn", "tracker=none"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "bundled@512" in first.stdout
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.stdout == first.stdout
    assert "found" in again.stderr
