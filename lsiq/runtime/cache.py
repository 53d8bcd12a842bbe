"""What was measured before, by everything that decides it: reference models are measured once for a whole sweep."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lsiq.errors import OutputError
from lsiq.runtime import processes
from lsiq.runtime.files import DamagedError, read_tensors, write_tensors
from lsiq.runtime.locks import exclusive
from lsiq.runtime.terminal import warn


@dataclass(frozen=True)
class Entry:
    """Tensors that were measured, and where they come from (`run`, `created`)."""

    tensors: Mapping[str, Tensor]
    origin: Mapping[str, str]


class ContentCache:
    """A folder of measurements, each named by the hash of what decides it.

    Nothing in it is ever changed: entries appear whole, by renaming, so that any number of runs may share a folder,
    and equal keys mean equal content. It may be deleted at any time.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: Mapping[str, Any],
        origin: Mapping[str, str],
        run_folder: Path | None = None,
    ) -> None:
        """Open the cache.

        Args:
            folder: where entries lie; None keeps and finds nothing.
            identity: what decides every measurement of this run: model, precision, machine, versions, sources.
            origin: what is written beside new entries.
            own: where the run keeps what its own model scored, so that it need not be measured again after a stop.
        """
        self._folder, self._run_folder = folder, run_folder
        self._identity = dict(identity)
        self._origin = dict(origin)

    def key(self, **parts: Any) -> str:
        """Name a measurement by what is particular to it."""
        text = json.dumps({**self._identity, **parts}, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def has(self, key: str) -> bool:
        """Whether there is an entry, damaged or not."""
        return self._folder is not None and _file(self._folder, key).is_file()

    @contextlib.contextmanager
    def alone(self, key: str, label: str) -> Iterator[None]:
        """Keep other processes from measuring the same while the `with` lasts; wait for one that is at it.

        Where files cannot be locked nothing keeps them, and an entry is measured twice and written twice, whole. Of
        processes that carry out one run together the first holds the lock for all.
        """
        if self._folder is None or os.environ.get("RANK", "0") != "0":
            yield
            return
        file = self._folder / "locks" / f"{key}.lock"
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OutputError):
                stack.enter_context(exclusive(file, label, ""))
            yield

    def once(self, key: str, label: str, measure: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return the tensors of an entry, measured by one process if by any."""
        if (entry := self.read(key)) is not None:
            return entry.tensors
        with self.alone(key, label):
            if (entry := self.read(key)) is not None:
                return entry.tensors
            tensors = measure()
            self.write(key, tensors)
            return tensors

    def read(self, key: str, private: bool = False) -> Entry | None:
        """Return an entry, or None; one that is damaged is named and counts as missing.

        Of several processes all find it or none.
        """
        entry = self._read(key, private)
        return entry if all(processes.gather(entry is not None)) else None

    def _read(self, key: str, private: bool) -> Entry | None:
        folder = self._run_folder if private else self._folder
        if folder is None:
            return None
        try:
            stored = read_tensors(_file(folder, key))
        except FileNotFoundError:
            return None
        except DamagedError as error:
            warn(f"{error}; it is measured again")
            return None
        return Entry(stored.tensors, stored.metadata)

    def write(self, key: str, tensors: Mapping[str, Tensor], private: bool = False) -> None:
        """Keep a measurement. A folder that cannot be written costs a warning, never the run."""
        folder = self._run_folder if private else self._folder
        if folder is None or not processes.first():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # To wait for a disk can take longer than to measure anew what a loss of power damages.
            write_tensors(_file(folder, key), tensors, self._origin, durable=False)
        except OSError as error:
            warn(f"{folder}: cannot be written ({error.strerror}); what was measured is not kept for other runs")
            self._folder, self._run_folder = (self._folder, None) if private else (None, self._run_folder)


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"
