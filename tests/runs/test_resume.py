"""Evaluating and exporting never lose a run: what was quantised is kept, and the same command goes on from there."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.interruption import at_rename, interrupt, only_run, outcome
from helpers.marks import slow_but
from helpers.models import SHAPES, save_model
from omegaconf import DictConfig

import lsiq.experiment.evaluate
import lsiq.experiment.stages
from lsiq.errors import ConfigError, InputError, LsiqError, NumericalError, OutputError
from lsiq.experiment.run import run
from lsiq.results.store import BlockStore, Streams
from lsiq.runtime.files import read_tensors, write_tensors

SmallRun = Callable[..., DictConfig]


@pytest.fixture
def model(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["llama"]


def block_times(folder: Path) -> list[int]:
    return [file.stat().st_mtime_ns for file in sorted(folder.glob("blocks/*.safetensors"))]


def test_an_evaluation_that_fails_leaves_the_blocks_and_is_repeated_from_there(
    model: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(small_run(model, f"paths.runs={tmp_path / 'other'}"))
    measure = lsiq.experiment.stages.evaluate

    def out_of_memory(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lsiq.experiment.stages, "evaluate", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(small_run(model))
    failed, folder = only_run(tmp_path / "runs")
    assert (failed.status, failed.error) == ("evaluation failed", "RuntimeError: out of memory")
    assert failed.quantised
    assert len(failed.blocks) == 2
    before = block_times(folder)
    assert len(before) == 2

    monkeypatch.setattr(lsiq.experiment.stages, "evaluate", measure)
    again = run(small_run(model))
    assert (again.status, again.error) == ("finished", None)
    assert block_times(folder) == before
    assert again.metrics == undisturbed.metrics
    assert again.average_bits == undisturbed.average_bits


def test_a_model_without_a_finite_loss_keeps_its_blocks_and_can_be_exported(
    tmp_path: Path, small_run: SmallRun
) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(SHAPES["llama"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1e38  # each weight is finite, the logits are not
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="the loss of the model is"):
        run(small_run(folder, "calib=none"))
    record, kept = only_run(tmp_path / "runs")
    assert record.status == "evaluation failed"
    before = block_times(kept)
    with pytest.raises(NumericalError):
        run(small_run(folder, "calib=none"))
    assert block_times(kept) == before
    run(small_run(folder, f"from={record.run_id}", "export=plain", "export.verify=false"))
    record, kept = only_run(tmp_path / "runs")
    assert (record.status, record.exports["plain"]["status"]) == ("evaluation failed", "finished")


def test_a_run_that_was_killed_while_evaluating_goes_on(model: Path, small_run: SmallRun, tmp_path: Path) -> None:
    finished = run(small_run(model))
    _, folder = only_run(tmp_path / "runs")
    values = json.loads((folder / "record.json").read_text())
    values |= {"status": "running", "metrics": {}}  # what is on disk between quantising and the end
    (folder / "record.json").write_text(json.dumps(values))
    before = block_times(folder)
    assert run(small_run(model)).metrics == finished.metrics
    assert block_times(folder) == before


def test_perplexities_are_in_the_record_before_tasks_begin(
    model: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def look(*_: object) -> None:  # a run that is killed now leaves what is on disk
        record, folder = only_run(tmp_path / "runs")
        seen.update(record.metrics, status=record.status, windows=(folder / "windows.parquet").is_file())

    monkeypatch.setattr(lsiq.experiment.evaluate, "measure_tasks", look)
    finished = run(small_run(model, "eval.tasks=[bundled_cloze]"))
    assert finished.metrics
    assert seen == {**finished.metrics, "status": "running", "windows": True}


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_blocks_that_are_not_all_there_are_quantised_again(
    model: Path, small_run: SmallRun, tmp_path: Path, damage: str
) -> None:
    finished = run(small_run(model))
    _, folder = only_run(tmp_path / "runs")
    values = json.loads((folder / "record.json").read_text()) | {"status": "evaluation failed"}
    (folder / "record.json").write_text(json.dumps(values))
    block = folder / "blocks" / "block_001.safetensors"
    content = block.read_bytes()
    kept = BlockStore(folder / "blocks").read(1)
    block.unlink()
    if damage == "cut":
        block.write_bytes(content[:-100])
    again = run(small_run(model))
    assert (again.status, again.metrics) == ("finished", finished.metrics)
    new = BlockStore(folder / "blocks").read(1)
    assert all(torch.equal(new.weights[name].codes, weight.codes) for name, weight in kept.weights.items())
    assert len(again.blocks) == 2


def test_an_export_that_cannot_be_written_leaves_a_finished_run(
    model: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    arguments = ("export=plain", f"export.folder={tmp_path / 'taken' / 'export'}")
    with pytest.raises(OutputError, match=r"set export\.folder=DIR"):
        run(small_run(model, *arguments))
    record, folder = only_run(tmp_path / "runs")
    assert record.status == "finished"
    assert record.metrics
    assert record.exports["plain"]["status"] == "failed"
    assert "cannot be written" in record.exports["plain"]["error"]
    before = block_times(folder)

    (tmp_path / "taken").unlink()
    assert run(small_run(model, *arguments)).exports["plain"]["status"] == "finished"
    assert (tmp_path / "taken" / "export" / "model.safetensors").is_file()
    assert block_times(folder) == before


def test_a_finished_run_is_exported_by_name_or_folder_and_stays_what_it_was(
    model: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    finished = run(small_run(model))
    _, folder = only_run(tmp_path / "runs")
    before = block_times(folder)
    by_name = run(small_run(model, f"from={finished.run_id}", "export=plain"))
    by_folder = run(small_run(model, f"from={folder}", "export=compressed-tensors"))
    assert (by_folder.metrics, by_folder.seconds["total"]) == (finished.metrics, finished.seconds["total"])
    assert by_name.run_id == finished.run_id
    assert set(by_folder.exports) == {"plain", "compressed-tensors"}
    assert block_times(folder) == before
    assert run(small_run(model, "export=plain")).exports == by_folder.exports  # it is there already
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not an empty folder"):
        run(small_run(model, f"from={folder}", "export=plain", f"export.folder={kept}"))
    assert (kept / "notes.txt").read_text() == "mine"


def test_what_cannot_be_exported_later_says_why(small_run: SmallRun, tmp_path: Path) -> None:
    folder = save_model(SHAPES["llama"], tmp_path / "model")
    finished = run(small_run(folder))
    named = f"from={finished.run_id}"
    with pytest.raises(InputError, match="from=nothing: no such run"):
        run(small_run(folder, "from=nothing", "export=plain"))
    with pytest.raises(ConfigError, match="nothing to do with it; give export="):
        run(small_run(folder, named))
    with pytest.raises(ConfigError, match=r"quant=w2a16: from=.* takes its settings from that run"):
        run(small_run(folder, named, "export=plain"), [named, "export=plain", "quant=w2a16"])
    with pytest.raises(LsiqError, match=r"export=gguf holds|quant\.weight\.scale=float16"):
        run(small_run(folder, named, "export=gguf"))
    other = save_model(SHAPES["llama"], tmp_path / "other", std=0.05)
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="no longer the checkpoint that was quantised"):
        run(small_run(other, named, "export=plain"))
    assert run(small_run(moved, named, "export=plain")).exports["plain"]["status"] == "finished"
    shutil.rmtree(tmp_path / "runs" / finished.run_id / "blocks")
    with pytest.raises(InputError, match="run it again with force=true"):
        run(small_run(moved, named, "export=compressed-tensors"))
    record, _ = only_run(tmp_path / "runs")
    assert record.status == "finished"
    assert record.exports["compressed-tensors"]["status"] == "failed"


# Where a file of that name comes, or the file of that number. They come in this order: record (begun), the model's own
# where there is one, then for each block it, the streams and the record.
E2E = ["method=e2e", "method.run=null", "method@method.start=lwc"]
STOPPED_AT = {
    "rtn": (["method=rtn"], "block_001.safetensors"),
    "gptq": (["method=gptq"], "streams.safetensors"),
    "lsi": (["method=lsi", "method.training.epochs=2", "method.training.batch=2"], 4),
    "rotate": (["method=rotate", "method.steps=3", "method@method.then=gptq"], 6),
    "prefix": (["method=prefix", "method@method.then=awq"], 7),
    "lqer": (["method=qera-exact", "method.rank=4"], 6),
    "e2e": ([*E2E, "method.start.training.epochs=1", "method.training.epochs=1"], 9),
    "no-data": (["method=rtn", "calib=none"], "block_001.safetensors"),
}


@pytest.mark.parametrize("name", slow_but(["gptq", "lsi"], STOPPED_AT))
def test_a_run_that_was_stopped_goes_on_to_the_very_same_result(
    model: Path, small_run: SmallRun, tmp_path: Path, name: str
) -> None:
    arguments, rename = STOPPED_AT[name]
    run(small_run(model, *arguments, f"paths.runs={tmp_path / 'other'}"))
    _, undisturbed = only_run(tmp_path / "other")
    with at_rename(rename, interrupt), pytest.raises(KeyboardInterrupt):
        run(small_run(model, *arguments))
    stopped, folder = only_run(tmp_path / "runs")
    assert stopped.status == "interrupted"
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("**/block_*.safetensors")}
    assert kept
    run(small_run(model, *arguments))
    assert outcome(folder) == outcome(undisturbed)
    # What was finished was not written again.
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_the_streams_are_not_run_through_again(model: Path, small_run: SmallRun, tmp_path: Path) -> None:
    arguments = ["method=gptq", "eval=none"]
    with at_rename("block_001.safetensors", interrupt), pytest.raises(KeyboardInterrupt):
        run(small_run(model, *arguments))
    _, folder = only_run(tmp_path / "runs")
    streams = folder / "streams.safetensors"
    stored = read_tensors(streams)
    assert stored.metadata["done"] == "1"
    assert stored.tensors["floats"].shape == stored.tensors["quantised"].shape == (4, 32, 96)
    # With other streams in their place the second block comes out otherwise: they are what it is made from.
    first = run(small_run(model, *arguments, f"paths.runs={tmp_path / 'other'}"))
    rotated = {name: tensor.roll(1, -1) for name, tensor in stored.tensors.items()}
    write_tensors(streams, rotated, stored.metadata)
    again = run(small_run(model, *arguments))
    assert again.blocks[0]["error"] == first.blocks[0]["error"]
    assert again.blocks[1]["error"] != first.blocks[1]["error"]
    assert not read_tensors(streams).tensors  # nothing of their size stays behind


def all_streams_are_written_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsiq.results.store.LARGE", 1)
    monkeypatch.setattr("lsiq.results.store.SECONDS", 0.0)
    monkeypatch.setattr("lsiq.runtime.pace.TIMES_WRITING", 0.0)


def test_large_streams_are_written_beside_the_next_block(
    model: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small_run(model, "method=gptq", f"paths.runs={tmp_path / 'other'}"))
    _, alone = only_run(tmp_path / "other")
    all_streams_are_written_as_large_ones(monkeypatch)
    run(small_run(model, "method=gptq"))
    _, folder = only_run(tmp_path / "runs")
    assert outcome(folder) == outcome(alone)
    assert not read_tensors(folder / "streams.safetensors").tensors


def test_blocks_whose_streams_were_not_worth_writing_are_run_through_again(
    model: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small_run(model, "method=gptq", f"paths.runs={tmp_path / 'other'}"))
    _, undisturbed = only_run(tmp_path / "other")
    monkeypatch.setattr("lsiq.results.store.LARGE", 1)
    with at_rename("block_001.safetensors", interrupt), pytest.raises(KeyboardInterrupt):
        run(small_run(model, "method=gptq"))
    _, folder = only_run(tmp_path / "runs")
    (first,) = folder.glob("blocks/block_000.safetensors")
    written = first.stat().st_mtime_ns
    assert not (folder / "streams.safetensors").exists()
    run(small_run(model, "method=gptq"))
    assert outcome(folder) == outcome(undisturbed)
    assert first.stat().st_mtime_ns == written


def test_streams_make_way_while_others_are_still_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_streams_are_written_as_large_ones(monkeypatch)
    store, gate, stream = BlockStore(tmp_path / "blocks"), threading.Event(), torch.ones(2, 3, 4)
    store._streams.start(gate.wait)
    store.write_streams(Streams(1, [0.1], stream, stream + 1), "first")
    gate.set()
    store._streams.wait()
    assert not (tmp_path / "streams.safetensors").exists()
    store.write_streams(Streams(2, [0.1, 0.2], stream, stream + 1), "second")
    store._streams.wait()
    assert read_tensors(tmp_path / "streams.safetensors").metadata["done"] == "2"


def test_a_disk_that_refuses_large_streams_is_named_at_the_next_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_streams_are_written_as_large_ones(monkeypatch)
    store, stream = BlockStore(tmp_path / "nowhere" / "blocks"), torch.ones(2, 3, 4)
    store.write_streams(Streams(1, [0.1], stream, stream + 1), "first")
    with pytest.raises(OutputError, match=r"streams\.safetensors: cannot be written"):
        store.write_streams(Streams(2, [0.1, 0.2]), "second")


def test_a_damaged_block_alone_is_made_again(model: Path, small_run: SmallRun, tmp_path: Path) -> None:
    finished = run(small_run(model, "method=gptq"))
    _, folder = only_run(tmp_path / "runs")
    before = outcome(folder)
    (folder / "record.json").write_text(
        json.dumps(json.loads((folder / "record.json").read_text()) | {"status": "evaluation failed"})
    )
    first, second = sorted(folder.glob("blocks/*.safetensors"))
    kept = second.stat().st_mtime_ns
    content = bytearray(first.read_bytes())
    content[-1000] ^= 1
    first.write_bytes(content)
    assert run(small_run(model, "method=gptq")).metrics == finished.metrics
    assert outcome(folder) == before
    assert second.stat().st_mtime_ns == kept  # it was made after the very block that is there again


def test_blocks_of_another_state_are_never_mixed_in(model: Path, small_run: SmallRun, tmp_path: Path) -> None:
    with at_rename("block_001.safetensors", interrupt), pytest.raises(KeyboardInterrupt):
        run(small_run(model, "method=gptq"))
    _, folder = only_run(tmp_path / "runs")
    (file,) = folder.glob("blocks/*.safetensors")
    stored = read_tensors(file)
    write_tensors(file, stored.tensors, {**stored.metadata, "stamp": "of torch 1.0"})
    with pytest.raises(InputError, match=r"block_000.* other versions, sources or inputs.* force=true"):
        run(small_run(model, "method=gptq"))
    assert file.is_file()
    assert run(small_run(model, "method=gptq", "force=true")).status == "finished"


def test_what_the_run_itself_scored_is_not_measured_again(
    model: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(small_run(model, f"paths.runs={tmp_path / 'other'}"))
    # After the two blocks: the trajectory and the record, then the own scores and the table of windows.
    with at_rename(11, interrupt), pytest.raises(KeyboardInterrupt):
        run(small_run(model))
    _, folder = only_run(tmp_path / "runs")
    assert len(list(folder.glob("scores/*.safetensors"))) == 1

    def never(*args: object) -> None:
        raise AssertionError("a block was run")

    monkeypatch.setattr("lsiq.evals.windows.run_blocks", never)
    again = run(small_run(model))
    assert again.metrics == undisturbed.metrics
    assert again.cached == {"float/ppl/file@64": again.cached["float/ppl/file@64"]}
    assert not (folder / "scores").exists()
