"""Several processes carry out a run as one does, up to the order of summation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import CONF, compose_run
from lsiq import distributed
from lsiq.results import Record, read_record
from lsiq.run import run
from lsiq.store import BlockStore

METHODS = {
    "rtn": [],
    "gptq": ["quant.weight.bits=4"],
    "awq": ["method.search=block", "method.samples=3"],
    "smoothquant": ["quant=w8a8"],
    "duquant": ["quant=w8a8", "method.steps=8"],
    "l2qer": ["method.rank=8"],
    "lsi": ["method.training.epochs=2", "method.training.batch=3", "method.training.precision=float32"],
    "omniquant": ["method.training.epochs=1", "method.training.keep=best", "method.training.ahead.blocks=1"],
    "best": ["method.start.training.epochs=1", "method.training.epochs=1", "method.training.batch=4"],
}


def overrides(method: str, model: Path, text: Path, runs: Path) -> list[str]:
    group = [] if METHODS[method][:1] == ["quant=w8a8"] else ["quant.weight.group=32"]
    return [
        *(f"method={method}", f"model.path={model}", "calib=file", f"calib.path={text}", "calib.samples=7"),
        *("calib.seqlen=32", "calib.batch=2", "eval=file", f"eval.path={text}", "eval.seqlen=64", "eval.batch=2"),
        *(*METHODS[method], *group, "tracker=none", f"paths.runs={runs}"),
    ]


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def runs(checkpoints: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that two processes made."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [overrides(method, checkpoints["llama"], text_file, folder) for method in METHODS]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(2, str(Path(__file__).parent / "processes.py"), str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("record: ") == len(METHODS)  # one process speaks
    return folder


def change(one: Path, two: Path, record: Record) -> float:
    """Largest over the blocks: the norm of the weights' difference relative to the weights'."""
    worst = 0.0
    for index in range(len(record.blocks)):
        a, b = (BlockStore(folder / record.run_id / "blocks").read(index) for folder in (one, two))
        for name in a.weights:
            mine, other = a.weights[name].decode(), b.weights[name].decode()
            worst = max(worst, ((mine - other).norm() / mine.norm()).item())
    return worst


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_do_what_one_does(
    method: str, checkpoints: dict[str, Path], text_file: Path, tmp_path: Path, runs: Path
) -> None:
    one = run(compose_run(*overrides(method, checkpoints["llama"], text_file, tmp_path)))
    two = read_record(runs / one.run_id)
    assert two is not None
    print(method, change(tmp_path, runs, one), {k: abs(one.metrics[k]-two.metrics[k])/abs(one.metrics[k]) for k in ("ppl/file@64", "float/ppl/file@64", "kl/file@64")}, [abs(a["error"]/b["error"]-1) for a,b in zip(one.blocks,two.blocks)])
