"""What was measured before, by everything that decides it: reference models are measured once for a whole sweep."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lsiq import distributed
from lsiq.track.console import warn

_PACKAGE = Path(__file__).parent.parent
# The sources that decide what a reference model scores: an entry is not found again once one of them has changed.
_SOURCES = ("evals/*.py", "models/*.py", "formats/*.py", "methods/rtn.py", "fold.py")


@dataclass(frozen=True)
class Entry:
    """Tensors that were measured, and where they come from (`run`, `created`)."""

    tensors: Mapping[str, Tensor]
    origin: Mapping[str, str]


class EvaluationCache:
    """A folder of measurements, each named by the hash of what decides it.

    Nothing in it is ever changed: entries appear whole, by renaming, so that any number of runs may share a folder,
    and equal keys mean equal content. It may be deleted at any time.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], origin: Mapping[str, str]) -> None:
        """Open the cache.

        Args:
            folder: where entries lie; None keeps and finds nothing.
            identity: what decides every measurement of this run: model, precision, machine, versions.
            origin: what is written beside new entries.
        """
        self._folder = folder
        self._identity = {**identity, "sources": source_hash()}
        self._origin = dict(origin)

    def key(self, **what: Any) -> str:
        """Name a measurement by what is particular to it."""
        text = json.dumps({**self._identity, **what}, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def read(self, key: str) -> Entry | None:
        """Return an entry, or None; one that is damaged is named and counts as missing.

        Of several processes all find it or none.
        """
        found = self._read(key)
        return found if all(distributed.gather(found is not None)) else None

    def _read(self, key: str) -> Entry | None:
        if self._folder is None or not self._file(key).is_file():
            return None
        from safetensors import safe_open

        try:
            with safe_open(self._file(key), framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                return Entry(tensors, dict(file.metadata() or {}))
        except Exception as error:  # safetensors has its own kind for each way a file can be damaged  # noqa: BLE001
            warn(f"{self._file(key)}: cannot be read ({error}); it is measured again")
            return None

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a measurement. A folder that cannot be written costs a warning, never the run."""
        if self._folder is None or not distributed.first():
            return
        from safetensors.torch import save_file

        partial = self._folder / f".{key}.{os.getpid()}.{uuid.uuid4().hex}.partial"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, self._origin)
            os.replace(partial, self._file(key))
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            warn(f"paths.cache={self._folder}: cannot be written ({error.strerror}); set paths.cache=DIR or null")
            self._folder = None

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.safetensors"


def source_hash() -> str:
    """A hash of the code that measures."""
    digest = hashlib.blake2b(digest_size=10)
    for file in sorted(file for pattern in _SOURCES for file in _PACKAGE.glob(pattern)):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
