"""Python's garbage collector, kept away from what is imported."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected_imports(beside_torch: bool = False) -> Iterator[None]:
    """Import torch and what builds on it without garbage collections, now and later.

    Some 700,000 objects come with them and stay until the process ends. The collector would look through them again
    and again, which is a third of the time of importing them. Where torch is there already nothing is changed: what
    lies beside it by then may well be garbage.

    Args:
        beside_torch: where torch is there already as well, in a process that has done nothing with it.
    """
    if ("torch" in sys.modules and not beside_torch) or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
