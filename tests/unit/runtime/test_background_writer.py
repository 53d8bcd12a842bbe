"""Large blocks are written beside the next one: files, order and errors are those of waiting for each."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configuration import compose_run
from helpers.interruption import at_rename, before_rename, interrupt, only_run, outcome, soon_interrupted
from helpers.marks import slow_but
from helpers.models import load_small
from omegaconf import DictConfig

from lsiq.errors import OutputError
from lsiq.experiment.config import parse
from lsiq.experiment.run import run
from lsiq.models.result import BlockResult
from lsiq.pipeline.block_loop import quantize
from lsiq.results.store import BlockStore, Digest, Streams
from lsiq.runtime import processes
from lsiq.runtime.files import read_tensors

SmallRun = Callable[..., DictConfig]
LSI = ["method=lsi", "method.training.epochs=2", "method.training.batch=2"]
STREAM = torch.ones(2, 3, 4)


@pytest.fixture
def model(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["llama"]


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every block count as large, and let its streams be worth writing."""
    monkeypatch.setattr("lsiq.results.store.LARGE", 0)
    monkeypatch.setattr("lsiq.results.store.SECONDS", 0.0)
    monkeypatch.setattr("lsiq.runtime.pace.TIMES_WRITING", 0.0)


@contextlib.contextmanager
def held_up(file: str) -> Iterator[threading.Event]:
    """Let a file have its name only when the event is set; what waits for the file meanwhile fails."""
    gate = threading.Event()

    def wait() -> None:
        if not gate.wait(60):
            raise AssertionError(f"{file} was waited for")

    with at_rename(file, wait):
        yield gate


def result(value: float) -> BlockResult:
    return BlockResult({}, {"norm.weight": torch.full((8,), value)})


def stored(folder: Path) -> dict[str, Any]:
    """All that the files of blocks and streams hold, but for how long it took."""
    found = {}
    for file in (*folder.glob("**/block_*.safetensors"), *folder.glob("**/streams.safetensors")):
        one = read_tensors(file)
        read = {key: json.loads(one.metadata.get(key, "{}")) for key in ("report", "metrics")}
        found[str(file.relative_to(folder))] = one.digest, without_times({**one.metadata, **read})
    return found


def without_times(node: Any) -> Any:
    """Return plain data without its entries that are seconds, or a share of them."""
    if isinstance(node, list):
        return [without_times(item) for item in node]
    if isinstance(node, dict):
        return {
            key: without_times(value) for key, value in node.items() if not re.search("seconds|weight_path_share", key)
        }
    return node


METHODS = {
    "gptq": ["method=gptq"],
    "lsi": LSI,
    "rotate": ["method=rotate", "method@method.then=gptq"],
    "e2e": ["method=e2e", "method.run=null", "method@method.start=lwc", "method.start.training.epochs=1"],
}


@pytest.mark.parametrize("name", slow_but(["gptq", "lsi"], METHODS))
def test_the_files_are_those_of_waiting_for_each_block(
    model: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    late: list[str] = []

    def slowly(written: Path, name: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            late.append(name)
            threading.Event().wait(0.2)  # the loop is far ahead then; what it changed of a block would be in its file

    run(small_run(model, *METHODS[name], "eval=none", f"paths.runs={tmp_path / 'large'}"))
    _, folder = only_run(tmp_path / "large")
    with before_rename(slowly):
        run(small_run(model, *METHODS[name], "eval=none"))
    _, slow = only_run(tmp_path / "runs")
    assert late.count("block_000.safetensors") == late.count("block_001.safetensors") == (2 if name == "e2e" else 1)
    monkeypatch.setattr("lsiq.results.store.LARGE", 2**26)
    run(small_run(model, *METHODS[name], "eval=none", f"paths.runs={tmp_path / 'small'}"))
    _, alone = only_run(tmp_path / "small")
    assert outcome(folder) == outcome(slow) == outcome(alone)
    assert stored(folder) == stored(slow) == stored(alone)


def test_the_next_block_is_learned_meanwhile(model: Path, tmp_path: Path) -> None:
    config = parse(compose_run(*LSI, "quant.weight.group=32", f"model.path={model}"))
    tokens = torch.randint(0, 4096, (4, 32), generator=torch.Generator().manual_seed(0))
    store = BlockStore(tmp_path / "blocks")
    store.open()
    file = tmp_path / "blocks" / "block_000.safetensors"
    there: list[bool] = []

    with held_up(file.name) as gate:

        def log(values: Mapping[str, float]) -> None:
            there.append(file.exists())
            if second:
                gate.set()  # the second block is being learned

        second = False
        loop = quantize(load_small(model), config.method, config.quant, tokens, 2, 0, store, log)
        next(loop)
        second = True
        learning = len(there)
        list(loop)
    assert there[: learning + 1] == [False] * (learning + 1)
    assert store.complete(2)
    assert not read_tensors(tmp_path / "streams.safetensors").tensors


def test_what_names_a_block_comes_to_the_disk_after_it(model: Path, small_run: SmallRun, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []  # the file, how many blocks it speaks of, and how many are there

    def look(written: Path, name: str) -> None:
        blocks = [file.name for file in (tmp_path / "runs").glob("*/blocks/block_*.safetensors")]
        if name.startswith("block_"):
            threading.Event().wait(0.2)
            seen.append((name, int(name[6:9]), len(blocks)))
        elif name == "streams.safetensors":
            seen.append((name, int(read_tensors(written).metadata["done"]), len(blocks)))
        elif name == "record.json":
            values = json.loads(written.read_text())
            seen.append((name, 2 if values["quantised"] or values["status"] == "finished" else 0, len(blocks)))

    with before_rename(look):
        run(small_run(model, "method=gptq"))
    assert all(there >= needed for _, needed, there in seen), seen
    spoken = {(name, needed) for name, needed, _ in seen}
    assert spoken >= {("streams.safetensors", 1), ("streams.safetensors", 2), ("record.json", 2)}


def test_streams_on_their_way_hold_up_no_block(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "blocks")
    store.open()
    with held_up("streams.safetensors") as gate:
        before = store.write(0, result(0.0))
        store.write_streams(Streams(1, [0.1], STREAM, STREAM + 1), before)
        for index in (1, 2):
            before = store.write(index, result(float(index)), before)
            store.write_streams(Streams(1 + index, [0.1], STREAM, STREAM + 1), before)  # left out
        assert len(store.finished_blocks(3)) == 3
        assert not (tmp_path / "streams.safetensors").exists()
        gate.set()
        store.wait()
    found = store.read_streams(store.finished_blocks(3))
    assert found is not None
    assert found.position == 1


def test_streams_are_written_once_enough_work_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsiq.results.store.SECONDS", 0.2)
    store = BlockStore(tmp_path / "blocks")
    store.open()
    before: Digest = ""
    for index in range(3):
        before = store.write(index, result(float(index)), before)
        store.write_streams(Streams(1 + index, [0.1] * (1 + index), STREAM, STREAM + 1), before)
        store.wait()
        time.sleep(0.15)
    # The first two came within 0.2 s of the start; the third one's are the first that it would cost much to lose.
    assert read_tensors(tmp_path / "streams.safetensors").metadata["done"] == "3"
    monkeypatch.setattr("lsiq.results.store.SECONDS", 60.0)
    store.write_streams(Streams(3, [0.1] * 3, STREAM + 1, STREAM), before)
    store.wait()
    assert torch.equal(read_tensors(tmp_path / "streams.safetensors").tensors["floats"], STREAM)


def test_small_streams_of_a_large_block_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsiq.results.store.LARGE", STREAM.nbytes * 2 + 1)
    store = BlockStore(tmp_path / "blocks")
    store.open()
    with held_up("block_000.safetensors") as gate:
        before = store.write(0, BlockResult({}, {"norm.weight": torch.ones(1000)}))
        store.write_streams(Streams(1, [0.1], STREAM, STREAM + 1), before)
        gate.set()
        store.wait()
    assert read_tensors(tmp_path / "streams.safetensors").metadata["before"] == store.finished_blocks(1)[0].digest


def test_who_is_interrupted_while_waiting_for_a_block_can_wait_again(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "blocks")
    store.open()
    with held_up("block_000.safetensors") as gate:
        before = store.write(0, result(0.0))
        with pytest.raises(KeyboardInterrupt), soon_interrupted(0.2):
            store.write(1, result(1.0), before)
        gate.set()
        store.wait()
    assert [file.name for file in (tmp_path / "blocks").iterdir()] == ["block_000.safetensors"]


def test_several_processes_wait_for_each_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_group", processes._Group(rank=0, size=2))
    store = BlockStore(tmp_path / "blocks")
    store.open()
    digest = store.write(0, result(1.0))
    assert digest == read_tensors(tmp_path / "blocks" / "block_000.safetensors").digest


@pytest.mark.parametrize("asks", [lambda store: store.write(1, result(1.0)), BlockStore.wait, lambda s: s.read(0)])
def test_a_disk_that_refuses_a_block_is_named_where_it_is_next_asked(
    tmp_path: Path, asks: Callable[[BlockStore], object]
) -> None:
    store = BlockStore(tmp_path / "nowhere" / "blocks")
    before = store.write(0, result(0.0))
    store.write_streams(Streams(1, [0.1], STREAM, STREAM + 1), before)
    with pytest.raises(OutputError, match=r"block_000\.safetensors: cannot be written \(.*free space"):
        asks(store)


@pytest.mark.parametrize("block", [0, 1])
def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_the_blocks_before_stay(
    model: Path, small_run: SmallRun, tmp_path: Path, block: int
) -> None:
    run(small_run(model, "method=gptq", f"paths.runs={tmp_path / 'other'}"))
    _, alone = only_run(tmp_path / "other")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, before[1]))  # a record fits, a block does not
    full = ("record.json", "block_000.safetensors")[block]
    try:
        with (
            at_rename(full, fill),
            pytest.raises(OutputError, match=rf"block_00{block}.*cannot be written \(File too large\)"),
        ):
            run(small_run(model, "method=gptq"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    record, folder = only_run(tmp_path / "runs")
    assert (record.status, record.quantised) == ("failed", False)
    assert "cannot be written" in (record.error or "")
    assert not list(folder.glob("**/.*.partial"))
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("blocks/*")}
    assert len(kept) == block
    run(small_run(model, "method=gptq"))
    assert outcome(folder) == outcome(alone)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_an_interrupted_run_ends_when_the_block_on_its_way_is_on_the_disk(
    model: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    run(small_run(model, "method=gptq", f"paths.runs={tmp_path / 'other'}"))
    _, alone = only_run(tmp_path / "other")
    records = 0

    def stop(written: Path, name: str) -> None:
        nonlocal records
        if name == "block_000.safetensors":
            interrupted.wait(60)
            threading.Event().wait(0.2)  # by then a run that does not wait has ended
        records += name == "record.json"
        if name == "record.json" and records == 2:  # the one with the block's row
            interrupted.set()
            interrupt()

    interrupted = threading.Event()
    with before_rename(stop), pytest.raises(KeyboardInterrupt, match="1 finished blocks are kept"):
        run(small_run(model, "method=gptq"))
    record, folder = only_run(tmp_path / "runs")
    assert record.status == "interrupted"
    (block,) = folder.glob("blocks/block_*.safetensors")
    written = block.stat().st_mtime_ns
    run(small_run(model, "method=gptq"))
    assert outcome(folder) == outcome(alone)
    assert block.stat().st_mtime_ns == written
