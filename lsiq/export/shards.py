"""Writing a checkpoint in the transformers layout, one shard in memory at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lsiq.models.folder import TOKENIZER_FILES
from lsiq.models.gguf_file import is_gguf

if TYPE_CHECKING:
    from lsiq.export.source import Source
    from lsiq.formats.tensor import QuantizedTensor
    from lsiq.models.result import BlockResult


class ShardWriter:
    """Takes named tensors and writes them to `model-….safetensors` files of at most `limit` bytes, and their index."""

    def __init__(self, folder: Path, limit: int = 4 * 2**30) -> None:
        self._folder, self._limit = folder, limit
        self._tensors: dict[str, Tensor] = {}
        self._size = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._size + size > self._limit:
            self._flush()
        self._tensors[name] = tensor.cpu().contiguous()
        self._size += size
        self._total += size

    def finish(self) -> None:
        """Write what is left, and give the files the names that transformers expects."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            os.replace(self._part(0), self._folder / "model.safetensors")
            return
        places: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._part(index), self._folder / final)
            places |= dict.fromkeys(names, final)
        write_json(
            self._folder / "model.safetensors.index.json",
            {"metadata": {"total_size": self._total}, "weight_map": places},
        )

    def _flush(self) -> None:
        from safetensors.torch import save_file

        part = self._part(len(self._shards))
        save_file(self._tensors, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors writes for the owner alone; an export is to be shared
        self._shards.append(list(self._tensors))
        self._tensors, self._size = {}, 0

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index:05d}.safetensors"


def copy_companions(source: Source, folder: Path) -> None:
    """Write tokenizer and generation settings to `folder`, as they lie beside the weights or in the GGUF file."""
    place = source.tokenizer_place or source.checkpoint
    if is_gguf(place):
        source.model.tokenizer.save_pretrained(folder)
    else:
        _copy(place, TOKENIZER_FILES, folder)
    if not is_gguf(source.checkpoint):
        _copy(source.checkpoint, ("generation_config.json",), folder)


def _copy(place: Path, patterns: Sequence[str], folder: Path) -> None:
    for file in {file for pattern in patterns for file in place.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, folder / file.name)


@contextlib.contextmanager
def tokenizer_folder(source: Source) -> Iterator[Path]:
    """A folder with the tokenizer's files: where they lie, or one that is gone afterwards."""
    place = source.tokenizer_place or source.checkpoint
    if not is_gguf(place):
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        copy_companions(source, Path(folder))
        yield Path(folder)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_packed(
    source: Source,
    folder: Path,
    pack: Callable[[QuantizedTensor], Mapping[str, Tensor]],
    beside: Callable[[BlockResult], Mapping[str, Tensor]] | None = None,
    pack_outside: Callable[[QuantizedTensor], Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a run's tensors, each quantised weight as the parts that `pack` makes of it, by their names.

    Args:
        beside: gives what a block has besides, by its name inside the block.
        pack_outside: the same as `pack` for embeddings and head, where they are rounded.
    """
    writer = ShardWriter(folder)
    for name, tensor in source.outside():
        writer.add(name, tensor)
    if pack_outside is not None:
        _add_packed(writer, source.outside_result(), "", pack_outside)
    for index in range(source.model.depth):
        result, prefix = source.block(index), source.prefix(index)
        for name, tensor in result.floats.items():
            writer.add(prefix + name, tensor)
        _add_packed(writer, result, prefix, pack)
        for name, tensor in ({} if beside is None else beside(result)).items():
            writer.add(prefix + name, tensor.clone())  # no two tensors of a file may share memory
    writer.finish()


def _add_packed(
    writer: ShardWriter, result: BlockResult, prefix: str, pack: Callable[[QuantizedTensor], Mapping[str, Tensor]]
) -> None:
    for name, weight in result.weights.items():
        for part, tensor in pack(weight).items():
            writer.add(f"{prefix}{name.removesuffix('.weight')}.{part}", tensor)
