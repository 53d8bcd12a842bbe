"""Sweeps: what is finished comes back from its records, what failed is tried again, whatever starts the jobs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.configuration import CONF
from helpers.marks import product, slow
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from lsiq.experiment.identity import run_id
from lsiq.experiment.request import prepare
from lsiq.experiment.run import run
from lsiq.results.record import read_record, write_record
from lsiq.runtime.hydra_entry import version_base
from lsiq.sweeps.ledger import Ledger

Sweep = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def job(checkpoints: dict[str, Path], text_file: Path) -> list[str]:
    """A run that takes well under a second; paths.runs stays `runs`."""
    return [
        *("tracker=none", "method=rtn", f"model.path={checkpoints['llama']}", "calib=none"),
        *("quant.weight.group=32", "eval=file", f"eval.path={text_file}", "eval.seqlen=64"),
    ]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(CONF.parent / "run.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)

    return call


def statuses(folder: Path) -> list[str]:
    return sorted(json.loads(file.read_text())["status"] for file in folder.glob("runs/*/record.json"))


@pytest.mark.slow
def test_a_sweep_takes_up_what_is_finished_and_tries_again_what_failed(
    sweep: Sweep, job: list[str], tmp_path: Path
) -> None:
    first = sweep("-m", *job, "quant.weight.group=40,32", "seed=0,1")
    assert first.returncode == 1
    assert first.stderr.count("failed: ") == 2
    assert "quant.weight.group=40 does not divide" in first.stderr
    assert "error: 2 of 4 jobs failed" in first.stderr.splitlines()[-1]
    assert statuses(tmp_path) == ["failed", "failed", "finished", "finished"]
    again = sweep("-m", *job, "quant.weight.group=40,32", "seed=0,1")
    assert "2 of 4 jobs are finished" in again.stderr
    assert "2 of 4 jobs failed" in again.stderr


@pytest.mark.slow
def test_a_thousand_finished_runs_are_recognised_in_five_seconds(
    sweep: Sweep, job: list[str], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    job[job.index(f"eval.path={text_file}")] = f"eval.path={text}"
    with initialize_config_dir(str(CONF), **version_base()):
        whole = compose("config", overrides=job, return_hydra_config=True)
    cfg = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    real, request = run(cfg), prepare(cfg)
    ledger = Ledger(whole.hydra, cfg.paths.cache)
    for seed in range(1000):
        config, plain = replace(request.config, seed=seed), {**request.plain, "seed": seed}
        record = replace(real, run_id=run_id(config, plain, request.inputs), seed=seed, config=plain)
        write_record(record, tmp_path / "runs" / record.run_id)
        cfg.seed = seed
        ledger.remember([*job, f"seed={seed}"], cfg, record)
    assert prepare(cfg).folder.name == record.run_id
    assert read_record(prepare(cfg).folder) == record

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = sweep("-m", *job, "seed=range(1000)")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "1000 jobs done; look at them with: python -m lsiq.report --runs runs"
    assert "1000 of 1000 jobs are finished" in done.stderr
    assert done.stderr.count("found ") == 1000
    # Processor seconds of the whole command, since the clock also counts what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5  # measured: 0.75 to 0.96

    last = [*job, "seed=999"]

    def composed(asked: Sequence[str]) -> DictConfig:
        assert asked == last
        return cfg

    def unknown(asked: Sequence[str]) -> DictConfig:
        raise AssertionError("composed although it was noted")

    assert Ledger(whole.hydra, cfg.paths.cache).recognise(last, unknown) == record
    # Among runs without a record nothing is finished, unless the job itself says where they are.
    empty = Ledger(whole.hydra, None, str(tmp_path / "nothing"))
    assert empty.recognise(job, unknown) is None
    with pytest.raises(AssertionError, match="composed although"):
        empty.recognise([*job, "paths.runs=elsewhere"], unknown)
    for note in (tmp_path / "runs" / "cache" / "jobs").iterdir():
        note.unlink()
    assert Ledger(whole.hydra, cfg.paths.cache).recognise(last, composed) == record
    assert Ledger(whole.hydra, cfg.paths.cache).recognise(last, unknown) == record  # and noted again
    text.write_text(text.read_text().replace("salt", "rice"))
    assert Ledger(whole.hydra, cfg.paths.cache).recognise(last, composed) is None  # another run
    text.write_text(text.read_text().replace("rice", "salt"))
    assert Ledger(whole.hydra, cfg.paths.cache).recognise(last, unknown) == record
    cfg.force = True
    assert Ledger(whole.hydra, None).recognise(last, composed) is None


LAUNCHERS = {
    "processes": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "slurm-local": ("hydra_plugins.hydra_submitit_launcher", []),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_carries_out_the_jobs_and_names_the_one_that_fails(
    launcher: str, sweep: Sweep, job: list[str], tmp_path: Path
) -> None:
    package, settings = LAUNCHERS[launcher]
    pytest.importorskip(package)
    done = sweep("-m", *job, "quant.weight.group=32,40", f"hydra/launcher={launcher}", *settings)
    assert done.returncode == 1
    assert "error: 1 of 2 jobs failed" in done.stderr.splitlines()[-1]
    assert "quant.weight.group=40 does not divide" in done.stderr
    assert "Traceback" not in done.stderr
    assert statuses(tmp_path) == ["failed", "finished"]
    for file in tmp_path.glob("runs/*/record.json"):
        command = json.loads(file.read_text())["command"]
        assert command.startswith("python run.py tracker=none method=rtn ")
        assert command.count("quant.weight.group=") == 1


@pytest.mark.parametrize("killed", [slow("the sweep"), product("one of its processes")])
def test_when_a_sweep_in_processes_ends_early_all_of_them_do_and_the_same_command_goes_on(
    killed: str, sweep: Sweep, job: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = ["-m", *job, "seed=range(10)", "hydra/launcher=processes", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, str(CONF.parent / "run.py"), *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as whole:
        pids = set[int]()
        while len(pids) < 2 or "finished" not in statuses(tmp_path):
            assert whole.poll() is None
            pids |= holders(tmp_path)
            time.sleep(0.02)
        if killed == "the sweep":
            whole.terminate()
        else:
            os.kill(max(pids), signal.SIGKILL)
        last = whole.communicate(timeout=60)[1].splitlines()[-1]
    if killed == "the sweep":
        assert whole.returncode == 128 + signal.SIGTERM
        assert last.startswith("interrupted: go on with: python run.py -m ")
    else:
        assert whole.returncode == 1
        assert last.startswith("error: hydra/launcher=processes: a process was killed")
    for pid in pids:
        assert gone(pid)
    if killed == "the sweep":
        again = sweep(*arguments)
        assert again.returncode == 0
        found = again.stderr.count("found ")
        assert f"{found} of 10 jobs are finished" in again.stderr
        # Each job says one line and nothing else, and joblib how far all of them are.
        assert again.stdout.count("  excess/") == 10 - found
        assert "quantize 1/" not in again.stderr
        assert re.search(rf"Done +\d+ out of +{10 - found}", again.stderr)
        assert statuses(tmp_path) == ["finished"] * 10


def holders(folder: Path) -> set[int]:
    """The processes that hold or held a run's lock."""
    found = set[int]()
    for file in folder.glob("runs/locks/*.lock"):
        with contextlib.suppress(ValueError):  # just being written
            found.add(json.loads(file.read_text())["pid"])
    return found


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds; what only waits to be asked for its status has ended."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.product
def test_ray_starts_a_job_again_whose_worker_died(sweep: Sweep, job: list[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    killed: list[int] = []

    def kill_the_first() -> None:
        while not (locks := [file for file in tmp_path.glob("runs/locks/*.lock") if file.stat().st_size]):
            time.sleep(0.05)
        killed.append(json.loads(locks[0].read_text())["pid"])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first, daemon=True)
    killer.start()
    done = sweep("-m", *job, "quant.weight.group=32,40", "hydra/launcher=ray", "+hydra.launcher.init.num_cpus=2")
    assert killed
    assert "error: 1 of 2 jobs failed" in done.stderr.splitlines()[-1]
    assert statuses(tmp_path) == ["failed", "finished"]
    holders = {json.loads(file.read_text())["pid"] for file in tmp_path.glob("runs/locks/*.lock")}
    assert killed[0] not in holders


@pytest.mark.slow
def test_without_its_package_a_launcher_says_what_to_install(sweep: Sweep, job: list[str]) -> None:
    missing = {"processes": "hydra_plugins.hydra_joblib_launcher", "slurm-local": "submitit", "ray": "ray"}
    for launcher, package in missing.items():
        if importlib.util.find_spec(package) is None:
            last = sweep("-m", *job, f"hydra/launcher={launcher}").stderr.splitlines()[-1]
            assert last.startswith(f"error: hydra/launcher={launcher}: ")
            extra = {"processes": "joblib", "slurm-local": "slurm"}.get(launcher, launcher)
            assert f"pip install 'lsiq[{extra}]'" in last
    if shutil.which("srun") is None:
        assert "there is no srun here" in sweep("-m", *job, "hydra/launcher=slurm").stderr
