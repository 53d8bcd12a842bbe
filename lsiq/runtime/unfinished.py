"""Work that a stopped run goes on with: tensors in a folder of the run, until what they lead to is stored."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lsiq.runtime import processes
from lsiq.runtime.files import DamagedError, Stored, read_tensors, remove_partial, write_tensors
from lsiq.runtime.terminal import warn

if TYPE_CHECKING:
    from torch import Tensor


class Unfinished:
    """A folder of named states, each whole or not there at all, with a checksum and the stamp of its run.

    Nothing depends on them but how much a stopped run has to do again: what cannot be written is said, and the run
    goes on. Of several processes the first writes.
    """

    def __init__(self, folder: Path, stamp: str | None) -> None:
        self.folder, self.stamp = folder, stamp or ""

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Store a state in place of the one of that name."""
        if not processes.first():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partial(self.folder)
            write_tensors(self._file(name), tensors, {**metadata, "stamp": self.stamp})
        except OSError as error:
            reason = error.strerror or error
            warn(f"{self._file(name)}: cannot be written ({reason}); a stop from here on costs what it would have kept")

    def read(self, name: str) -> Stored | None:
        """Return a state; None where there is none, and with a warning where it is damaged or of another run."""
        file = self._file(name)
        try:
            stored = read_tensors(file)
        except FileNotFoundError:
            return None
        except DamagedError as error:
            warn(f"{error}; that part of the training is done again")
            return None
        if stored.metadata["stamp"] != self.stamp:
            warn(f"{file}: is of other versions, sources or inputs; that part of the training is done again")
            return None
        return stored

    def clear(self) -> None:
        """Leave nothing behind."""
        if processes.first():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
