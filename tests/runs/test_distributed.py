"""Several processes carry out a run as one does, up to the order of summation."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.configuration import ROOT, compose_run
from helpers.marks import product, slow
from helpers.summation import ORDER_OF_SUMMATION, learned_difference
from omegaconf import DictConfig

from lsiq.errors import ConfigError
from lsiq.experiment.checks import check_processes
from lsiq.experiment.config import parse
from lsiq.experiment.run import run
from lsiq.results.record import Record, read_record
from lsiq.results.store import BlockStore
from lsiq.runtime import processes as distributed
from lsiq.runtime.batch_exchange import share_of_batch

SmallRun = Callable[..., DictConfig]
FLOAT32 = "method.training.precision=float32"
METHODS = {
    "rtn": [],
    "gptq": ["quant.weight.bits=4", "quant.kv.format=fp8", "quant.kv.scale=calibrated"],
    "awq": ["method.search=block", "method.samples=3"],
    "smoothquant": ["quant=w8a8"],
    "duquant": ["quant=w8a8", "method.steps=8"],
    "rotate": ["quant=w8a8", "method.steps=8"],
    "l2qer": ["method.rank=8"],
    "omniquant": ["method.training.epochs=1", "method.training.ahead.blocks=1", "method.training.keep=best", FLOAT32],
    "lwc": ["method.training.epochs=2", "method.training.keep=held", FLOAT32],  # one process holds back nothing
    "lsi-corner": ["method.training.epochs=2", "method.training.batch=3", FLOAT32],
    "best": [
        *(f"method.weight_only.{at}training.epochs=1" for at in ("start.", "")),
        *(f"method.weight_only.{at}training.precision=float32" for at in ("start.", "")),
    ],
}
QUICK = ("gptq", "lsi-corner")  # start of two processes takes as long as all of them
# Measured: 0 for what gathers statistics; 2.8e-8 for omniquant, 4.6e-7 for best. In lsi a weight half way between two
# codes takes the other one, and what is learned after that differs: 1.1e-2 of the weights, 1.8e-3 of the perplexity.
WEIGHTS = {"omniquant": 1e-6, "lwc": 1e-6, "best": 5e-6, "lsi-corner": 0.03}
PERPLEXITY = {"omniquant": 1e-6, "lwc": 1e-6, "best": 1e-6, "lsi-corner": 5e-3}


def overrides(method: str, model: Path, text: Path, runs: Path) -> list[str]:
    """A run whose sequences, batches and windows two processes cannot share evenly."""
    group = [] if METHODS[method][:1] == ["quant=w8a8"] else ["quant.weight.group=32"]
    return [
        *(f"method={method}", f"model.path={model}", "calib=file", f"calib.path={text}", "calib.samples=7"),
        *("calib.seqlen=32", "calib.batch=2", "eval=file", f"eval.path={text}", "eval.seqlen=64", "eval.batch=2"),
        *(*METHODS[method], *group, "tracker=none", f"paths.runs={runs}"),
    ]


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = ROOT / "tests" / "helpers" / "processes.py"
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )


@pytest.fixture(scope="module")
def by_two(
    checkpoints: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Give the folder of runs that two processes made, of this method and of those that are as quick or slow."""

    @functools.cache
    def made(quick: bool) -> Path:
        folder, methods = tmp_path_factory.mktemp("two"), [method for method in METHODS if (method in QUICK) == quick]
        jobs = [overrides(method, checkpoints["llama"], text_file, folder) for method in methods]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        done = torchrun(folder / "jobs.json")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("record: ") == len(methods)  # one of them speaks
        return folder

    return lambda method: made(method in QUICK)


def changes(one: Path, two: Path, record: Record) -> list[float]:
    """By block, the largest norm of the difference of two weights relative to the weight's."""
    stores = [BlockStore(folder / record.run_id / "blocks") for folder in (one, two)]
    found = []
    for index in range(len(record.blocks)):
        a, b = (store.read(index).weights for store in stores)
        found.append(max(((a[n].decode() - b[n].decode()).norm() / a[n].decode().norm()).item() for n in a))
    return found


@pytest.mark.parametrize("method", [slow(m) if m in QUICK else product(m) for m in METHODS])
def test_two_processes_do_what_one_does(
    method: str, checkpoints: dict[str, Path], text_file: Path, tmp_path: Path, by_two: Callable[[str], Path]
) -> None:
    two = by_two(method)
    one = run(compose_run(*overrides(method, checkpoints["llama"], text_file, tmp_path)))
    found = read_record(two / one.run_id)  # the same run by name
    assert found is not None
    assert max(changes(tmp_path, two, one)) <= WEIGHTS.get(method, 0)
    for name in ("ppl", "kl", "float/ppl"):
        expected = pytest.approx(one.metrics[f"{name}/file@64"], rel=PERPLEXITY.get(method, 0), abs=0)
        assert found.metrics[f"{name}/file@64"] == expected, name
    assert found.calibration == one.calibration
    assert (one.machine["processes"], found.machine["processes"]) == (1, 2)
    written = {file.name for file in (two / one.run_id).iterdir()}
    # Streams are shares: several processes do not keep them, and run stored blocks anew.
    assert written == {file.name for file in (tmp_path / one.run_id).iterdir()} - {"streams.safetensors"}


@pytest.mark.slow
def test_what_is_learned_agrees_before_a_code_flips(
    checkpoints: dict[str, Path], text_file: Path, tmp_path: Path, by_two: Callable[[str], Path]
) -> None:
    one = run(compose_run(*overrides("lsi-corner", checkpoints["llama"], text_file, tmp_path)))
    assert learned_difference(tmp_path / one.run_id, by_two("lsi-corner") / one.run_id) <= ORDER_OF_SUMMATION


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run_with_its_message(
    checkpoints: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "jobs.json").write_text(json.dumps([overrides("rtn", checkpoints["llama"], text_file, tmp_path)]))
    done = torchrun(tmp_path / "jobs.json", "--break")
    assert done.returncode != 0
    assert done.stderr.count("error: the second process cannot go on") == 1
    assert done.stderr.count("error: ") == 1
    (file,) = tmp_path.glob("*/record.json")
    record = read_record(file.parent)
    assert record is not None
    assert (record.status, record.error) == ("failed", "the second process cannot go on")


def test_fewer_sequences_than_processes_are_refused(small_run: SmallRun, three: None, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"calib\.samples=2: 2 sequences cannot be shared by 3 processes"):
        check_processes(parse(small_run(checkpoint, "calib.samples=2")), 2)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_group", distributed._Group(rank=1, size=3))


def test_shares_cover_all_and_differ_by_one_at_most(three: None) -> None:
    for count in (0, 1, 2, 3, 7, 128):
        shares = [list(range(count))[distributed.share(count, process)] for process in range(3)]
        assert [item for share in shares for item in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_parts_of_a_batch_name_each_sequence_once(three: None, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    samples = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:n]
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed._group, "rank", rank)
        parts.append(share_of_batch(samples, total=8))
    assert sum(part.weight for part in parts) == pytest.approx(1)
    for sender in range(3):
        assert parts[sender].sent == [part.received[sender] for part in parts]
    own = [distributed.share(8, process).start for process in range(3)]
    sent = torch.cat([part.rows + start for part, start in zip(parts, own, strict=True)])
    assert set(sent.tolist()) == set(samples.tolist())
    assert all(part.count >= 1 for part in parts)  # nobody passes an empty batch
    assert sum(part.count for part in parts if part.weight) == n


@pytest.mark.parametrize("processes", [2, 3])
def test_a_batch_moves_no_more_than_what_some_hold_beyond_their_share(
    monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    generator, n, total, moved = torch.Generator().manual_seed(0), 16, 128, 0
    monkeypatch.setattr(distributed, "_group", distributed._Group(rank=0, size=processes))
    for _ in range(100):
        samples, found, least = torch.randperm(total, generator=generator)[:n], 0, 0
        for rank in range(processes):
            monkeypatch.setattr(distributed._group, "rank", rank)
            part, own, share = share_of_batch(samples, total), distributed.share(total), distributed.share(n)
            found += part.count - part.received[rank]
            held = int(((samples >= own.start) & (samples < own.stop)).sum())
            least += max(0, share.stop - share.start - held)
        assert found == least
        moved += found
    if processes == 2:
        assert moved / 100 < 2  # measured: 1.31; half of the batch, 8, where nobody asks who holds what
