"""Giving the command as a user does, and what an error of it looks like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.configuration import CONF

RUN = CONF.parent / "run.py"


def call(*arguments: str, cwd: Path, without: str | None = None) -> tuple[subprocess.CompletedProcess[str], float]:
    """Give a command, in a process that cannot import the package `without`; the second value is its CPU seconds.

    Wall time would tell of the machine's other work; a command that waits is ended after half a minute.
    """
    start = children_seconds()
    environment = os.environ | {"HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    if without is not None:
        (cwd / "barred").mkdir()
        (cwd / "barred" / f"{without}.py").write_text(f"raise AssertionError('{without} was imported')")
        paths = [str(cwd / "barred"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, str(RUN), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
        timeout=30,
    )
    return done, children_seconds() - start


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
