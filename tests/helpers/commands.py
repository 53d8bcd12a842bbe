"""Giving the command as a user does, and what an error of it looks like."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.configuration import CONF

RUN = CONF.parent / "run.py"
SERVER = Path(__file__).with_name("command_server.py")


def call(
    *arguments: str, cwd: Path, without: str | None = None, fresh: bool = False
) -> tuple[subprocess.CompletedProcess[str], float]:
    """Give a command, in a process that cannot import the package `without`; the second value is its CPU seconds.

    Wall time would tell of the machine's other work; a command that waits is ended after five minutes.

    Args:
        fresh: starts Python anew, as a user's shell does. Else the process is a fork of one that has imported the
            command line, and no torch: it does the same in less than half the time.
    """
    environment = os.environ | {"HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    paths: list[str] = []
    if without is not None:
        (cwd / "barred").mkdir()
        (cwd / "barred" / f"{without}.py").write_text(f"raise AssertionError('{without} was imported')")
        paths = [str(cwd / "barred")]
        environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [str(RUN), *arguments]
    if not fresh:
        served = server()
        assert served.stdin is not None
        assert served.stdout is not None
        print(
            json.dumps({"words": words, "cwd": str(cwd), "environment": environment, "paths": paths}), file=served.stdin
        )
        ended = json.loads(served.stdout.readline())
        return subprocess.CompletedProcess(words, ended["code"], ended["out"], ended["err"]), ended["seconds"]
    start = children_seconds()
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=300)
    return done, children_seconds() - start


@functools.cache
def server() -> subprocess.Popen[str]:
    """The process whose forks carry out commands, for as long as this one lives."""
    folders = [str(SERVER.parent.parent), str(RUN.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, str(SERVER)]
    made = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    )
    assert made.stdin is not None
    atexit.register(made.wait)
    atexit.register(made.stdin.close)  # the first thing done at exit: it ends when there is no more to read
    return made


def children_seconds() -> float:
    """Return the CPU time of all processes that this one started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def assert_one_line(done: subprocess.CompletedProcess[str], wanted: list[str]) -> None:
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in wanted:
        assert part in lines[0], lines[0]
