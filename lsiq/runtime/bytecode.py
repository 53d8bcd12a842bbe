"""Python's bytecode of large packages, without which every process compiles them anew."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def missing_bytecode(*packages: str) -> str | None:
    """Say what to do where importing `packages` compiles them and nothing is kept of it; None where that is not so.

    Containers set PYTHONDONTWRITEBYTECODE, `uv` installs without bytecode, and the packages of a cluster may not be
    the user's to write to. Every process then imports for two to three times as long (docs/performance.md).
    """
    missing = [file for name in packages if (file := _compiled_anew(name)) is not None]
    if not missing:
        return None
    sites = " ".join(dict.fromkeys(str(file.parents[1]) for file in missing))  # what they import lies beside them
    compile_once = f"once: python -m compileall -q -j 0 {sites}"
    if sys.dont_write_bytecode:
        why, remedy = "Python is told to write none (PYTHONDONTWRITEBYTECODE)", compile_once
    else:
        why, remedy = "cannot be written to", f"set PYTHONPYCACHEPREFIX to a folder of yours, or {compile_once}"
    return f"every run compiles its imports anew, for seconds: {missing[0].parent} has no bytecode, and {why}; {remedy}"


def _compiled_anew(name: str) -> Path | None:
    """The first file of a package whose import would compile it for this process alone; None where it would not."""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None or spec.origin is None or spec.cached is None or os.path.exists(spec.cached):
        return None
    place = next(folder for folder in Path(spec.cached).parents if folder.exists())
    return None if os.access(place, os.W_OK) and not sys.dont_write_bytecode else Path(spec.origin)
