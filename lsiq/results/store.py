"""Finished blocks on disk: what is evaluated, exported or taken up again is what was written here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsiq.errors import InputError, OutputError
from lsiq.models.loading import Model
from lsiq.models.result import BlockResult
from lsiq.results import model_file
from lsiq.results.block_file import to_result, to_tensors
from lsiq.runtime import processes
from lsiq.runtime.background_writer import Background
from lsiq.runtime.files import DamagedError, Stored, read_tensors, remove_partial, write_tensors
from lsiq.runtime.pace import Pace
from lsiq.runtime.terminal import warn
from lsiq.runtime.unfinished import Unfinished

# So many bytes or more are written beside the next block: streams of 7 billion parameters take as long as an epoch.
LARGE = 2**26
# Large streams are written once more work was done than running the blocks through anew would take. Many runs on one
# disk would wait for nothing else.
SECONDS = 30.0
# Of a block; not known yet of one that is still being written.
Digest = str | Future[str]
# The digest of a file that cannot be read.
DAMAGED = "damaged"
_AGAIN = "give the run's command again (with force=true where it is finished), and it is made anew"


@dataclass(frozen=True)
class StoredBlock:
    """A finished block that was found in a store.

    Attributes:
        digest: of what is stored; the next block's file names it, so that no block of another state goes unnoticed.
        report: what was written beside it.
    """

    result: BlockResult
    digest: str
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Streams:
    """Where the block loop stands: what enters the next block.

    Attributes:
        position: how many blocks are behind.
        errors: of each of them, the relative error of its outputs.
        floats, quantised: `(N, T, d)`; None without calibration data, and once all blocks are done.
    """

    position: int
    errors: Sequence[float | None]
    floats: Tensor | None = None
    quantised: Tensor | None = None

    def on(self, device: torch.device) -> Streams:
        """Return the same with the streams on a device."""
        moved = (None if stream is None else stream.to(device) for stream in (self.floats, self.quantised))
        return Streams(self.position, self.errors, *moved)


class BlockStore:
    """A folder with one safetensors file per finished block; `lsiq.results.block_file` says what stands in it.

    What a method did to the model as a whole has a file of its own, and so has what enters the next block.

    Every file appears whole or not at all and carries a checksum. With a `stamp`, which stands for all that decides
    the blocks, each file names it and the digest of the block before: what another run left is never taken up.

    What is large is written in the background: a block once the one before it is on the disk, streams once the block
    that they leave is. What could not be written is raised by the next block's `write`, or else by `wait`.
    """

    def __init__(self, folder: Path, stamp: str | None = None) -> None:
        self.folder, self.stamp = folder, stamp
        # Two, so that streams that are being written never hold up a block.
        self._blocks, self._streams = Background(), Background()
        self._streams_pace = Pace()

    def clear(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._streams_file.unlink(missing_ok=True)
        self.unfinished.clear()

    def open(self) -> None:
        """Make the folder, and remove what a killed writer left.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partial(self.folder)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be written ({error.strerror}); set paths.runs=DIR") from error

    def complete(self, depth: int) -> bool:
        """Whether the folder holds `depth` blocks of this run, all of them as they were written."""
        return len(self.finished_blocks(depth)) == depth

    def wait(self) -> None:
        """Return when all that was to be written is on the disk; OutputError where something could not be."""
        try:
            self._blocks.wait()
        finally:
            self._streams.wait()

    def finished_blocks(self, depth: int) -> list[StoredBlock]:
        """Return the finished blocks from the first on, up to where one is missing or damaged; tensors left out."""
        self._blocks.wait()
        blocks: list[StoredBlock] = []
        before = self.model_digest()
        while len(blocks) < depth and (block := self.restore(len(blocks), before)) is not None:
            blocks.append(replace(block, result=BlockResult({})))
            before = block.digest
        return blocks

    def restore(self, index: int, before: Digest) -> StoredBlock | None:
        """Return a block if it is there; None, and a warning, where it is damaged or made after another state.

        Where it is not there this does not wait for what is being written.

        Args:
            before: the digest of the block before it; for the first, `model_digest()`.

        Raises:
            InputError: the block is whole, but of a run with other settings, inputs, versions or sources.
        """
        file = self._file(index)
        try:
            stored = read_tensors(file)
        except FileNotFoundError:
            return None
        except DamagedError as error:
            warn(f"{error}; the block is quantised again")
            return None
        self._check_stamp(file, stored)
        if stored.metadata["before"] != _on_disk(before):
            warn(f"{file} was made after other blocks than are there now; the block is quantised again")
            return None
        return StoredBlock(to_result(file, stored), stored.digest, json.loads(stored.metadata["report"]))

    def _check_stamp(self, file: Path, stored: Stored) -> None:
        if self.stamp is not None and stored.metadata["stamp"] != self.stamp:
            raise InputError(
                f"{file}: was begun with other versions, sources or inputs, and blocks of both would make no model; go "
                "on with what it was begun with, or start anew with force=true"
            )

    def write(
        self, index: int, result: BlockResult, before: Digest | None = None, report: Mapping[str, Any] | None = None
    ) -> Digest:
        """Store a block, with a `report` that is plain data, and return its digest.

        A large one, unless other processes wait to read it, is written in the background: tensors in memory must stay
        as they are until then.

        Args:
            before: the digest of the block before it; for the first, `model_digest()`, which is also the default.

        Raises:
            OutputError: it or the block before it cannot be written; what is stored already stays.
        """
        self._blocks.wait()
        tensors, metadata = to_tensors(result)
        metadata |= {
            "report": json.dumps(dict(report or {})),
            "before": self.model_digest() if before is None else _on_disk(before),
        }
        if _bytes(tensors) < LARGE or processes.size() > 1:
            return self._save(self._file(index), tensors, metadata)
        staged = self._blocks.in_memory(tensors)
        return self._blocks.start(lambda: self._save(self._file(index), staged, metadata))

    @property
    def unfinished(self) -> Unfinished:
        """Where a method that makes all blocks together keeps what it has not finished."""
        return Unfinished(self.folder.with_name("unfinished"), self.stamp)

    @property
    def _streams_file(self) -> Path:
        return self.folder.with_name("streams.safetensors")

    def write_streams(self, streams: Streams, before: Digest) -> None:
        """Store what enters the next block in place of what entered the last one; `before` as in `write`.

        Large streams, and all that leave a block which is still being written, are written in the background. Where
        blocks come faster than it is worth to write these, those of some blocks are left out.
        """
        tensors = {"floats": streams.floats, "quantised": streams.quantised}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        metadata = {"done": str(streams.position), "errors": json.dumps(list(streams.errors))}

        def save(tensors: Mapping[str, Tensor]) -> None:
            name = _on_disk(before)  # which waits for the block, and that is not writing
            with self._streams_pace.writing():
                self._save(self._streams_file, tensors, metadata | {"before": name})

        if not present or (_bytes(present) < LARGE and not self._blocks.busy):  # after the last block nothing is held
            self._streams.wait()
            save(present)
        elif self._streams_due(present):
            copied = self._streams.in_memory(present)
            self._streams.start(lambda: save(copied))

    def _streams_due(self, streams: Mapping[str, Tensor]) -> bool:
        """Whether these should be written, now that the last ones are."""
        return not self._streams.busy and (_bytes(streams) < LARGE or self._streams_pace.due(SECONDS))

    def read_streams(self, blocks: Sequence[StoredBlock]) -> Streams | None:
        """Return what enters the next block after some of the finished `blocks`; None where that is not known."""
        try:
            stored = read_tensors(self._streams_file)
            self._check_stamp(self._streams_file, stored)
        except (FileNotFoundError, InputError):
            return None
        except DamagedError as error:
            warn(f"{error}; the finished blocks are run through again")
            return None
        position = int(stored.metadata["done"])
        if position > len(blocks) or stored.metadata["before"] != (blocks[position - 1].digest if position else ""):
            return None
        tensors = stored.tensors
        return Streams(position, json.loads(stored.metadata["errors"]), tensors.get("floats"), tensors.get("quantised"))

    @property
    def model_file(self) -> Path:
        """How the quantised model differs from the float one outside its blocks; is there only if it does."""
        return self.folder / "model.safetensors"

    def write_model(self, model: Model) -> None:
        """Store how the quantised model differs from the float one outside its blocks: nothing, for most methods."""
        if tensors := model_file.to_tensors(model):
            self._save(self.model_file, tensors, {})

    def model_digest(self) -> str:
        """The digest of what the model was made into before its first block; empty where it stayed as it was."""
        try:
            return read_tensors(self.model_file).digest
        except FileNotFoundError:
            return ""
        except DamagedError as error:
            warn(f"{error}; it is made again")
            return DAMAGED

    def read_model(self, model: Model) -> Model:
        """Return `model` as the stored blocks want it: rotated, after a prefix, with scales of keys and values.

        Raises:
            InputError: the file is damaged, or of another run.
        """
        return model_file.as_prepared(model, self._model_tensors())

    def changes_model(self) -> bool:
        """Whether the blocks need a rotated residual stream or a prefix; InputError as `read_model`."""
        return model_file.changes_model(self._model_tensors())

    def _model_tensors(self) -> Mapping[str, Tensor]:
        try:
            stored = read_tensors(self.model_file)
        except FileNotFoundError:
            return {}
        except DamagedError as error:
            raise InputError(f"{error}; {_AGAIN}") from error
        self._check_stamp(self.model_file, stored)
        return stored.tensors

    def _save(self, file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
        try:
            return write_tensors(file, tensors, {**metadata, "stamp": self.stamp or ""})
        except OSError as error:
            raise OutputError(
                f"{file}: cannot be written ({error.strerror or error}); free space and give the same command again, "
                "or set paths.runs"
            ) from error

    def read(self, index: int) -> BlockResult:
        """Return a stored block, on the CPU; InputError when it is missing or damaged."""
        self._blocks.wait()
        file = self._file(index)
        try:
            stored = read_tensors(file)
        except (FileNotFoundError, DamagedError) as error:
            raise InputError(f"{error}; {_AGAIN}") from error
        self._check_stamp(file, stored)
        if index == 0 and stored.metadata["before"] != self.model_digest():
            raise InputError(f"{self.model_file}: is missing or changed, and the blocks make no model; {_AGAIN}")
        return to_result(file, stored)

    def _file(self, index: int) -> Path:
        return self.folder / f"block_{index:03d}.safetensors"


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _on_disk(digest: Digest) -> str:
    """Return a digest, once the block is on the disk; raises what kept it from getting there."""
    return digest if isinstance(digest, str) else digest.result()
