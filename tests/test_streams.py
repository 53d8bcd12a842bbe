"""Streams on disk: the same numbers, a bounded memory, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from lsiq import streams
from lsiq.errors import OutputError
from lsiq.run import run

SmallRun = Callable[..., DictConfig]


def resident() -> int:
    """The bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_stream_on_disk_takes_no_memory_once_released_and_keeps_its_values(tmp_path: Path) -> None:
    with streams.kept_in(tmp_path):
        stream = streams.empty((64, 1024, 256), torch.float32)  # 64 MiB
    before = resident()
    for index in range(64):
        stream[index] = index
        streams.release(stream[index])
    assert resident() - before < 8 * 2**20  # measured: 1.4 MiB; 64 without releasing
    assert stream[17].unique().tolist() == [17]
    assert list(tmp_path.iterdir()) == []  # the file has no name: killed or not, nothing stays


def test_a_run_with_streams_on_disk_gives_the_same_numbers(
    checkpoint: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    method = ["method=omniquant", "method.training.epochs=2", "method.training.batch=2"]
    memory = run(small_run(checkpoint, *method))
    disk = run(small_run(checkpoint, *method, "paths.streams=disk", f"paths.runs={tmp_path / 'disk'}"))
    assert disk.run_id == memory.run_id
    assert disk.metrics == memory.metrics
    assert [block["error"] for block in disk.blocks] == [block["error"] for block in memory.blocks]
    names = {file.name for file in (tmp_path / "disk" / disk.run_id).iterdir()}
    assert names == {file.name for file in (tmp_path / "runs" / disk.run_id).iterdir()}


def test_a_disk_that_is_too_small_says_so_before_anything_is_written(tmp_path: Path) -> None:
    with streams.kept_in(tmp_path), pytest.raises(OutputError, match=r"paths\.streams=disk: .* cannot be kept in"):
        streams.empty((2**18, 2**18, 2**10), torch.float32)  # 256 TiB
