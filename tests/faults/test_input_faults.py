"""What breaks around a run: each fault is one clear message, costs no finished block and makes no wrong number."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from helpers.interruption import at_rename, interrupt, only_run, outcome
from helpers.marks import slow
from helpers.models import SHAPES, save_model
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from lsiq.errors import InputError, OutputError
from lsiq.experiment.run import run
from lsiq.results.record import Record
from lsiq.runtime.files import read_tensors

SmallRun = Callable[..., DictConfig]
# When this one comes, the first of two blocks, the streams after it and the record of it are there.
SECOND_BLOCK = "block_001.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(SHAPES["llama"], tmp_path / "model")


@pytest.fixture
def stopped(model: Path, small_run: SmallRun, tmp_path: Path) -> tuple[Callable[[], Record], Path, Callable[[], None]]:
    """A run with one of two blocks finished: how to go on, its folder, and a check of what came of it."""
    undisturbed = run(small_run(model, "method=gptq", f"paths.runs={tmp_path / 'other'}"))
    expected = outcome(tmp_path / "other" / undisturbed.run_id)
    go_on = partial(run, small_run(model, "method=gptq"))
    with at_rename(SECOND_BLOCK, interrupt), pytest.raises(KeyboardInterrupt):
        go_on()
    _, folder = only_run(tmp_path / "runs")
    first = folder / "blocks" / "block_000.safetensors"
    written = first.stat().st_mtime_ns

    def check() -> None:
        assert first.stat().st_mtime_ns == written
        go_on()
        assert outcome(folder) == expected
        assert first.stat().st_mtime_ns == written

    return go_on, folder, check


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse what a file would hold beyond `size` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [slow(0), slow(1000), 50_000])  # the record, or the block, cannot be written
def test_a_full_disk_is_said_and_leaves_what_is_finished(stopped: tuple, size: int) -> None:
    go_on, folder, check = stopped
    with largest_file(size), pytest.raises(OutputError, match=r"cannot be written \(File too large\)"):
        go_on()
    assert not list(folder.glob("**/.*.partial"))
    check()


def test_an_output_that_is_read_only_is_said_before_anything_long(model: Path, small_run: SmallRun) -> None:
    # Where root writes everywhere, a folder in which the kernel makes none for anybody.
    runs = Path("/sys/runs")
    with pytest.raises(OutputError, match=r"/sys/runs.* cannot be locked .*set paths\.runs=DIR"):
        run(small_run(model, f"paths.runs={runs}"))


@pytest.mark.parametrize("cut", [slow(0), slow(7), slow(1000), -1])
def test_a_block_that_was_cut_off_is_made_again(stopped: tuple, cut: int, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder, _ = stopped
    block = folder / "blocks" / "block_000.safetensors"
    before = read_tensors(block).digest
    block.write_bytes(block.read_bytes()[:cut])
    stopped[0]()
    assert "block_000.safetensors is damaged" in capsys.readouterr().err.replace("\n", "")
    assert read_tensors(block).digest == before


def test_streams_that_are_damaged_cost_a_pass_and_no_block(stopped: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder, check = stopped
    streams = folder / "streams.safetensors"
    content = bytearray(streams.read_bytes())
    content[-5] ^= 16
    streams.write_bytes(content)
    check()
    assert "the finished blocks are run through again" in capsys.readouterr().err


def test_a_calibration_file_that_vanished_is_named_and_can_come_back(stopped: tuple, text_file: Path) -> None:
    go_on, _, check = stopped
    away = text_file.rename(text_file.with_suffix(".away"))
    try:
        with pytest.raises(InputError, match=r"calib\.path=.*text\.txt: no such file"):
            go_on()
    finally:
        away.rename(text_file)
    check()


def test_a_text_that_changes_after_the_run_was_named_is_not_taken_for_it(
    model: Path, small_run: SmallRun, text_file: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copy(text_file, tmp_path / "own.txt"))
    cfg = small_run(model, f"calib.path={own}")
    change = partial(own.write_text, "Another text altogether. " * 200)
    with at_rename(1, change), pytest.raises(InputError, match=r"calib\.path: changed while the run was reading it"):
        run(cfg)  # the record has its name then, and the text is read after that
    record, folder = only_run(tmp_path / "runs")
    assert (record.status, list(folder.glob("blocks/*"))) == ("failed", [])


def test_a_model_that_changes_under_the_run_ends_it_before_the_block_is_stored(
    stopped: tuple, model: Path, tmp_path: Path
) -> None:
    go_on, folder, check = stopped
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    changed = bytearray(content)
    changed[-2000] ^= 64

    def overwrite(data: bytes) -> None:
        with weights.open("r+b") as file:  # in place: what is mapped changes as well
            file.write(data)

    with at_rename(1, partial(overwrite, changed)), pytest.raises(InputError, match=r"(model|safetensors): changed"):
        go_on()
    assert len(list(folder.glob("blocks/block_*"))) == 1
    overwrite(content)
    check()


def test_weights_that_are_not_finite_are_named_and_the_blocks_before_them_kept(
    model: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        run(small_run(model))
    record, folder = only_run(tmp_path / "runs")
    assert (record.status, record.metrics) == ("failed", {})
    assert [file.name for file in folder.glob("blocks/*")] == ["block_000.safetensors"]


@pytest.mark.faults
def test_a_disk_that_really_is_full(model: Path, small_run: SmallRun, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=200k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("only root may mount a small disk")
    try:
        cfg = small_run(model, "method=gptq", f"paths.runs={disk}", "paths.cache=null")
        with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); free space"):
            run(cfg)
        record, folder = only_run(disk)
        assert record.status == "failed"
        assert len(list(folder.glob("blocks/block_*"))) == 1
        assert os.system(f"mount -o remount,size=20m {disk}") == 0
        undisturbed = run(small_run(model, "method=gptq"))
        run(cfg)
        assert outcome(folder) == outcome(tmp_path / "runs" / undisturbed.run_id)
    finally:
        os.system(f"umount {disk}")
