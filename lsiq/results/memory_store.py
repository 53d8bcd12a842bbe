"""Finished blocks in memory, for who quantises a model without a run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lsiq.errors import InputError
from lsiq.models.loading import Model
from lsiq.models.result import BlockResult
from lsiq.results import model_file
from lsiq.results.block_file import to_result, to_tensors
from lsiq.results.store import Digest, StoredBlock, Streams
from lsiq.runtime.files import Stored, tensor_digest


class MemoryStore:
    """What `lsiq.results.store.BlockStore` keeps in files, kept in memory: a block as the same tensors, on the CPU.

    Nothing is there when it is made, and nothing is left when it goes; so nothing is restored from it but blocks of
    the loop that filled it.
    """

    folder = Path("memory")
    unfinished = None

    def __init__(self) -> None:
        self._blocks: dict[int, Stored] = {}
        self._reports: dict[int, Mapping[str, Any]] = {}
        self._model: dict[str, Tensor] = {}

    def open(self) -> None:
        """Nothing has to be made."""

    def wait(self) -> None:
        """Nothing is written in the background."""

    def complete(self, depth: int) -> bool:
        """Whether `depth` blocks are there."""
        return len(self.finished_blocks(depth)) == depth

    def finished_blocks(self, depth: int) -> list[StoredBlock]:
        """Return the finished blocks from the first on, up to where one is missing; tensors left out."""
        count = next((index for index in range(depth) if index not in self._blocks), depth)
        return [StoredBlock(BlockResult({}), self._blocks[i].digest, self._reports[i]) for i in range(count)]

    def restore(self, index: int, before: Digest) -> StoredBlock | None:
        """Return a block if it is there."""
        del before  # blocks of another state cannot be here
        if index not in self._blocks:
            return None
        return StoredBlock(self.read(index), self._blocks[index].digest, self._reports[index])

    def write(
        self, index: int, result: BlockResult, before: Digest | None = None, report: Mapping[str, Any] | None = None
    ) -> str:
        """Keep a block and its report, and return the digest of its tensors."""
        del before
        tensors, metadata = to_tensors(result)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._blocks[index] = Stored(plain, metadata, tensor_digest(plain))
        self._reports[index] = dict(report or {})
        return self._blocks[index].digest

    def read(self, index: int) -> BlockResult:
        """Return a block; InputError where it is not there."""
        if index not in self._blocks:
            raise InputError(f"block {index}: was not quantised; quantise the whole model first")
        return to_result(self.folder / f"block {index}", self._blocks[index])

    def write_streams(self, streams: Streams, before: Digest) -> None:
        """Nobody goes on from here, so what enters the next block is not kept."""
        del streams, before

    def read_streams(self, blocks: Sequence[StoredBlock]) -> Streams | None:
        """Return None: what enters a block is not kept."""
        del blocks

    def write_model(self, model: Model) -> None:
        """Keep how the quantised model differs from the float one outside its blocks."""
        self._model = model_file.to_tensors(model)

    def model_digest(self) -> str:
        """The digest of what the model was made into before its first block; empty where it stayed as it was."""
        return tensor_digest({name: tensor.cpu() for name, tensor in self._model.items()}) if self._model else ""

    def read_model(self, model: Model) -> Model:
        """Return `model` as the blocks want it: rotated, after a prefix, with scales of keys and values."""
        return model_file.as_prepared(model, self._model)

    def changes_model(self) -> bool:
        """Whether the blocks need a rotated residual stream or a prefix."""
        return model_file.changes_model(self._model)
