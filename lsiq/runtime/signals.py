"""SIGTERM as Ctrl-C, and environment variables that are set for a while."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """While this lasts, the variable has this value; afterwards it is as it was."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class Terminated(KeyboardInterrupt):
    """The process was asked to end; what is caught for Ctrl-C holds for this as well."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated when the first SIGTERM comes; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():  # only that one can take signals
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
