"""Evaluating and exporting never lose a run: what was quantised is kept, and the same command goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SHAPES, save_model
from omegaconf import DictConfig

import lsiq.experiment
from lsiq.errors import ConfigError, InputError, LsiqError, NumericalError, OutputError
from lsiq.results import Record, read_record
from lsiq.run import run
from lsiq.store import BlockStore

SmallRun = Callable[..., DictConfig]


@pytest.fixture
def model(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["llama"]


def only_run(tmp_path: Path) -> tuple[Record, Path]:
    (file,) = (tmp_path / "runs").glob("*/record.json")
    record = read_record(file.parent)
    assert record is not None
    return record, file.parent


def block_times(folder: Path) -> list[int]:
    return [file.stat().st_mtime_ns for file in sorted(folder.glob("blocks/*.safetensors"))]


def test_an_evaluation_that_fails_leaves_the_blocks_and_is_repeated_from_there(
    model: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(small_run(model, f"paths.runs={tmp_path / 'other'}"))
    measure = lsiq.experiment.evaluate

    def out_of_memory(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lsiq.experiment, "evaluate", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(small_run(model))
    failed, folder = only_run(tmp_path)
    assert (failed.status, failed.error) == ("evaluation failed", "RuntimeError: out of memory")
    assert failed.quantised
    assert len(failed.blocks) == 2
    before = block_times(folder)
    assert len(before) == 2

    monkeypatch.setattr(lsiq.experiment, "evaluate", measure)
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
    record, kept = only_run(tmp_path)
    assert record.status == "evaluation failed"
    before = block_times(kept)
    with pytest.raises(NumericalError):
        run(small_run(folder, "calib=none"))
    assert block_times(kept) == before
    run(small_run(folder, f"from={record.run_id}", "export=plain", "export.verify=false"))
    record, kept = only_run(tmp_path)
    assert (record.status, record.exports["plain"]["status"]) == ("evaluation failed", "finished")


def test_a_run_that_was_killed_while_evaluating_goes_on(model: Path, small_run: SmallRun, tmp_path: Path) -> None:
    finished = run(small_run(model))
    _, folder = only_run(tmp_path)
    values = json.loads((folder / "record.json").read_text())
    values |= {"status": "running", "metrics": {}}  # what is on disk between quantising and the end
    (folder / "record.json").write_text(json.dumps(values))
    before = block_times(folder)
    assert run(small_run(model)).metrics == finished.metrics
    assert block_times(folder) == before


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_blocks_that_are_not_all_there_are_quantised_again(
    model: Path, small_run: SmallRun, tmp_path: Path, damage: str
) -> None:
    finished = run(small_run(model))
    _, folder = only_run(tmp_path)
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
    record, folder = only_run(tmp_path)
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
    _, folder = only_run(tmp_path)
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
    with pytest.raises(InputError, match="from=nothing: no record there"):
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
    record, _ = only_run(tmp_path)
    assert record.status == "finished"
    assert record.exports["compressed-tensors"]["status"] == "failed"
