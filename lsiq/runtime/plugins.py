"""Code of users: modules of `lsiq_plugins`, a folder in the working directory or in any installed package.

`lsiq_plugins` is a namespace package, so that several places may have one. Configuration files name its settings
classes as they name this package's: `_target_: lsiq_plugins.my_method.MyMethod`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_NAME = "lsiq_plugins"


def find_in(folder: Path) -> None:
    """Let `lsiq_plugins/` in a folder be found, if it is there."""
    if (folder / _NAME).is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def modules() -> Iterator[ModuleType]:
    """Import and yield every module of `lsiq_plugins`, in the order of their names."""
    for name in sorted(info.name for info in pkgutil.iter_modules(places())):
        yield importlib.import_module(f"{_NAME}.{name}")


def places() -> list[str]:
    """Return the folders called `lsiq_plugins` that Python finds."""
    spec = importlib.util.find_spec(_NAME)
    return [] if spec is None else list(spec.submodule_search_locations or ())


def plugins_hash() -> str:
    """Return a hash of all code of plug-ins; empty where there is none."""
    files = sorted((file.name, file) for place in places() for file in Path(place).glob("*.py"))
    digest = hashlib.blake2b(digest_size=16)
    for name, file in files:
        digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest() if files else ""
