"""Stopping a run in the middle: at a moment of its own writes, seen by Python's audit events, or by a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lsiq.results.record import Record, read_record
from lsiq.runtime.files import read_tensors

# What a record says of time, memory and the place a run was made at; everything else must not depend on a stop.
_OF_THE_PROCESS = (
    "created",
    "seconds",
    "peak_bytes",
    "stage_peaks",
    "command",
    "commit",
    "clean",
    "cached",
    "config",
    "blocks",
)
_TIMES = ("seconds", "weight_path_share")
_watch: list[Callable[[str, tuple[Any, ...]], None]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watch:
        watch(event, arguments)


sys.addaudithook(_hook)


@contextlib.contextmanager
def before_rename(watch: Callable[[Path, str], None]) -> Iterator[None]:
    """Hand `watch` each file of the folder of a run just before it gets its name, and that name."""

    def renamed(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[0]).endswith(".partial") and "/cache/" not in str(arguments[0]):
            watch(Path(arguments[0]), Path(arguments[1]).name)

    _watch.append(renamed)
    try:
        yield
    finally:
        _watch.remove(renamed)


@contextlib.contextmanager
def at_rename(file: int | str, action: Callable[[], None]) -> Iterator[None]:
    """Do `action` just before a file gets its name: one so called, or number `file` (from 1) of those of a run."""
    seen = 0

    def watch(partial: Path, name: str) -> None:
        nonlocal seen
        seen += 1
        if file in (seen, name):
            action()

    with before_rename(watch):
        yield


@contextlib.contextmanager
def soon_interrupted(after: float) -> Iterator[None]:
    """Let what this thread waits for be interrupted as by Ctrl-C, once, `after` seconds from now.

    A signal that comes just before the thread begins to wait is seen by Python only when the wait is over. So it is
    sent until it is seen.
    """
    me, seen = threading.get_ident(), threading.Event()

    def handle(*_: object) -> None:
        if not seen.is_set():
            seen.set()
            raise KeyboardInterrupt

    def send() -> None:
        while not seen.wait(after):
            signal.pthread_kill(me, signal.SIGINT)

    before, sender = signal.signal(signal.SIGINT, handle), threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        seen.set()
        sender.join()
        signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), 9)


def carry_out(cfg: str, rename: int | str | None, background: bool) -> None:
    """In a process of its own: the run, killed where the file `rename` would get its name.

    It stands here, for a fresh process finds helpers by their names, and not modules of tests.

    Args:
        background: whether its small blocks are written beside the next one, as large ones are.
    """
    import torch
    from omegaconf import OmegaConf

    import lsiq.results.store
    import lsiq.runtime.pace
    from lsiq.experiment.run import run

    torch.set_num_threads(1)
    if background:
        lsiq.results.store.LARGE = 0
        lsiq.results.store.SECONDS = lsiq.runtime.pace.TIMES_WRITING = 0.0
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    with contextlib.nullcontext() if rename is None else at_rename(rename, kill):
        run(OmegaConf.create(cfg))


def outcome(folder: Path) -> dict[str, Any]:
    """What must be the same however often a run was stopped: its numbers and all that is stored of its blocks."""
    record = read_record(folder)
    assert record is not None
    numbers = {key: value for key, value in asdict(record).items() if key not in _OF_THE_PROCESS}
    numbers["training_form"].pop("why", None)  # how much memory was free
    numbers["errors"] = [block["error"] for block in record.blocks]
    numbers["of_blocks"] = [
        {key: value for key, value in block["metrics"].items() if not key.endswith(_TIMES)} for block in record.blocks
    ]
    stored = sorted(folder.glob("**/block*/*.safetensors"))
    return numbers | {"stored": {str(file.relative_to(folder)): read_tensors(file).digest for file in stored}}


def only_run(runs: Path) -> tuple[Record, Path]:
    """The one run below a folder."""
    (file,) = runs.glob("*/record.json")
    record = read_record(file.parent)
    assert record is not None
    return record, file.parent


@contextlib.contextmanager
def acts() -> Iterator[list[str]]:
    """What is done meanwhile that reaches beyond this process: programs, connections, files written or removed."""
    done: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _ACTS or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            done.append(f"{event} {arguments[:2]}")

    _watch.append(watch)
    try:
        yield done
    finally:
        _watch.remove(watch)


_ACTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.rename", "os.remove", "os.mkdir")
_ACTS += ("os.rmdir", "os.symlink", "os.link", "os.chmod", "shutil.rmtree", "socket.connect", "pickle.find_class")
