"""Python's garbage collector, kept away from what is imported."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected_imports() -> Iterator[None]:
    """Import torch and what builds on it without garbage collections, now and later.

    Some 700,000 objects come with them and stay until the process ends. The collector would look through them again
    and again, which is a fifth of the time of importing them. Where torch is there already nothing is changed: what
    lies beside it by then may well be garbage.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
