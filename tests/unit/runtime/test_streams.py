"""Streams on disk: the same numbers, a bounded memory, nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.configuration import compose_run
from helpers.models import load_small
from omegaconf import DictConfig

from lsiq.errors import OutputError
from lsiq.experiment.config import parse
from lsiq.experiment.run import run
from lsiq.pipeline.block_loop import quantize
from lsiq.results.store import BlockStore
from lsiq.runtime import streams

SmallRun = Callable[..., DictConfig]


def resident() -> int:
    """The bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_stream_on_disk_takes_no_memory_once_released_and_keeps_its_values(tmp_path: Path) -> None:
    with streams.stored_in(tmp_path):
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


def test_between_two_blocks_only_what_enters_the_next_one_is_held(checkpoint: Path, tmp_path: Path) -> None:
    config = parse(compose_run("method=gptq", "quant.weight.group=32", f"model.path={checkpoint}"))
    model = load_small(checkpoint)
    store = BlockStore(tmp_path / "blocks")
    store.open()
    tokens = torch.randint(0, 4096, (6, 33), generator=torch.Generator().manual_seed(0))

    def held() -> int:
        alive = (o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (6, 33, 96))
        return len({stream.untyped_storage().data_ptr() for stream in alive})

    loop = quantize(model, config.method, config.quant, tokens, 2, 0, store, lambda values: None)
    assert [held() for _ in loop] == [2, 2]
    assert held() == 0


def test_a_disk_that_is_too_small_says_so_before_anything_is_written(tmp_path: Path) -> None:
    with streams.stored_in(tmp_path), pytest.raises(OutputError, match=r"paths\.streams=disk: .* cannot be kept in"):
        streams.empty((2**18, 2**18, 2**10), torch.float32)  # 256 TiB
