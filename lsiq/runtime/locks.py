"""One process at a time: locks on files, which the operating system lets go when their holder dies."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lsiq.errors import OutputError
from lsiq.runtime.terminal import say

if TYPE_CHECKING:
    from filelock import FileLock

    from lsiq.runtime.settings import PathSettings


# Seconds between two looks at a lock that another process holds.
_POLL = 0.2


@contextlib.contextmanager
def exclusive(file: Path, label: str, way_out: str) -> Iterator[bool]:
    """Hold the lock `file` inside the `with`; yields whether another process held it first and has let go since.

    The lock is `flock` on the file, which stays behind and says who held it last. It ends with the process, however
    that ends. It is kept between machines where the file system passes it on (NFS 4, Lustre mounted with flock).

    Args:
        what: what is locked, for the line that a waiting process shows.
        way_out: what the message advises where the file cannot be locked.

    Raises:
        OutputError: the file cannot be written, or its file system has no locks.
    """
    from filelock import FileLock  # takes longer than to find a finished record

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, fallback_to_soft=False, poll_interval=_POLL)
        waited = not _try(lock)
        if waited:
            say(f"{label}: {_holder(file)}; waiting for it")
            lock.acquire()
    except OSError as error:
        raise OutputError(f"{file}: cannot be locked ({error.strerror}); {way_out}") from error
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only who has it is not said
            file.write_text(json.dumps(owner) + "\n", encoding="utf-8")
        yield waited
    finally:
        lock.release()


def run_lock(paths: PathSettings, run_id: str) -> contextlib.AbstractContextManager[bool]:
    """The lock that the process which works on a run holds; see `exclusive`."""
    if paths.locks is None:
        return contextlib.nullcontext(False)
    way_out = "set paths.runs=DIR or paths.locks=DIR where files can be locked, or paths.locks=null to go without"
    return exclusive(Path(paths.locks).expanduser() / f"{run_id}.lock", run_id, way_out)


def _try(lock: FileLock) -> bool:
    from filelock import Timeout

    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _holder(file: Path) -> str:
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} works on it since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process works on it"  # it has taken the lock and not yet said who it is


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
