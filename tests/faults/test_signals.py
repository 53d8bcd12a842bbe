"""SIGTERM and Ctrl-C end a run in order: what is finished is kept, and one line says how to go on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.configuration import CONF
from helpers.interruption import only_run, outcome
from helpers.models import SHAPES, save_model

from lsiq.runtime.signals import Terminated, terminable

RUN = str(CONF.parent / "run.py")


def test_the_first_sigterm_is_an_interruption_and_the_handler_goes_with_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with terminable(), pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_who_stops_reading_gets_no_traceback(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, RUN, "--help"]
    done = subprocess.run(command, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.faults
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_what_is_finished_and_says_how_to_go_on(
    tmp_path: Path, text_file: Path, number: signal.Signals, status: int
) -> None:
    model = save_model(SHAPES["llama"] | {"num_hidden_layers": 4}, tmp_path / "my model")
    arguments = [f"model.path={model}", "method=lsi", "method.training.epochs=12", "method.training.batch=2"]
    arguments += ["calib=file", f"calib.path={text_file}", "calib.samples=8", "calib.seqlen=32", "tracker=none"]
    arguments += ["eval=file", f"eval.path={text_file}", "eval.seqlen=64", "quant.weight.group=32"]
    arguments = [word.replace("=", "='") + "'" if " " in word else word for word in arguments]

    def start(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, RUN, *arguments, *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    victim = start()
    deadline = time.monotonic() + 120
    while not any(json.loads(file.read_text())["blocks"] for file in tmp_path.glob("runs/*/record.json")):
        assert time.monotonic() < deadline
        assert victim.poll() is None
        time.sleep(0.05)
    victim.send_signal(number)
    _, said = victim.communicate(timeout=60)
    assert victim.returncode == status
    record, folder = only_run(tmp_path / "runs")
    assert record.status == "interrupted"
    last = said.strip().splitlines()[-1]
    words = shlex.split(last)
    assert " ".join(words[1:6]).endswith("finished blocks are kept;")
    assert int(words[1]) == len(record.blocks) >= 1
    assert words[words.index("python") + 1 :] == ["run.py", *arguments]  # pasted, it is the same command
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("blocks/*")}
    again = start()
    again.communicate(timeout=240)
    assert again.returncode == 0
    undisturbed = start("paths.runs=other")
    undisturbed.communicate(timeout=240)
    assert outcome(folder) == outcome(tmp_path / "other" / folder.name)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
