"""Two processes that want the same run: one does it, the other waits and takes the record."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.configuration import CONF
from omegaconf import DictConfig

from lsiq.errors import OutputError
from lsiq.experiment.run import run
from lsiq.results.record import read_record
from lsiq.runtime.locks import exclusive

# Takes the lock argv[1] as soon as the file argv[2] is there, writes down when it held it, and holds it for argv[3] s.
HOLD = """
import sys, time
from pathlib import Path
from lsiq.runtime.locks import exclusive
while not Path(sys.argv[2]).exists(): time.sleep(0.01)
with exclusive(Path(sys.argv[1]), "the work", "") as waited:
    start = time.time()
    time.sleep(float(sys.argv[3]))
    print(waited, start, time.time(), flush=True)
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CONF.parent)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_of_four_processes_one_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    processes = [start(tmp_path / "lock", tmp_path / "go", 0.2) for _ in range(4)]
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=60) for process in processes]
    held = sorted((float(begin), float(end), waited) for waited, begin, end in (out.split() for out, _ in outputs))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(held))
    assert any(waited == "True" for _, _, waited in held)
    said = [err for _, err in outputs if err]
    assert said
    assert all("the work: " in err and "waiting for it" in err for err in said)


def test_a_process_that_is_killed_leaves_no_lock_behind(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    process = start(tmp_path / "lock", tmp_path / "go", 600)
    wait_for(lambda: (tmp_path / "lock").exists() and (tmp_path / "lock").read_text())
    assert json.loads((tmp_path / "lock").read_text())["pid"] == process.pid
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with exclusive(tmp_path / "lock", "the work", "") as waited:
        assert not waited


@pytest.mark.slow
def test_a_killed_run_is_taken_up_by_one_of_those_that_wait_and_done_once(
    checkpoints: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, str(CONF.parent / "run.py"), "method=rtn", f"model.path={checkpoints['llama']}"),
        *("calib=none", "eval=file", f"eval.path={text_file}", "eval.seqlen=64", "quant.weight.group=32"),
        *("tracker=none", f"paths.runs={tmp_path / 'runs'}"),
    ]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob("runs/*/record.json")))
    os.kill(first.pid, signal.SIGSTOP)  # it holds its lock for as long as we like
    others = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in others:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert f"process {first.pid} on " in line
        assert "waiting for it" in line
    first.kill()
    first.wait()
    stories = sorted((process.communicate(timeout=120)[1] for process in others), key=lambda story: "found" in story)
    assert [process.returncode for process in others] == [0, 0]
    assert "quantize" in stories[0]
    assert "quantize" not in stories[1]
    assert "found" in stories[1]
    (record,) = (read_record(file.parent) for file in tmp_path.glob("runs/*/record.json"))
    assert record is not None
    assert record.status == "finished"
    assert record.command.startswith("python run.py method=rtn ")


def test_a_folder_without_locks_is_an_error_with_a_way_out(
    checkpoints: dict[str, Path], small_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(OutputError, match=r"cannot be locked \(.*set .*paths\.locks=DIR .* or paths\.locks=null"):
        run(small_run(checkpoints["llama"], f"paths.locks={tmp_path / 'taken'}"))
    assert run(small_run(checkpoints["llama"], "paths.locks=null")).status == "finished"
