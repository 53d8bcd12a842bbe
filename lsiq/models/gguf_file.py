"""GGUF files: what their header says, without torch and in a tenth of a second; weights stay on the disk.

The package gguf reads headers as well, but takes seconds for a vocabulary of 50,000 pieces.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from lsiq.errors import InputError

SUFFIX = ".gguf"
# Numbers of the format's value types (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Numbers of the tensor types that hold floats as they are; the names of all others are the gguf package's.
FLOATS = {0: "F32", 1: "F16", 30: "BF16"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        shape: as torch has it, `(out, in)`.
        kind: number of the tensor type.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Metadata and tensors of a GGUF file, by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """Return what the metadata says of the architecture."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def is_gguf(path: Path) -> bool:
    return path.suffix == SUFFIX


def read_header(path: Path) -> Header:
    """Return the header of a GGUF file.

    Raises:
        InputError: the file cannot be read, is no GGUF file, or only a part of a model.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return _read_header(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _read_header(path: Path, changed: int, size: int) -> Header:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            header, last = _Reader(mapped).header()
    except (OSError, ValueError, struct.error, KeyError, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise InputError(f"{path}: is not a GGUF file that can be read ({error}); fetch it again") from error
    if last > size:
        raise InputError(f"{path}: ends before its tensors do; it is incomplete, fetch it again")
    if (parts := header.metadata.get("split.count", 1)) > 1:
        raise InputError(f"{path}: is one of {parts} parts; join them with llama.cpp's llama-gguf-split --merge")
    return header


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def header(self) -> tuple[Header, int]:
        """Return the header and the offset of the last tensor."""
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, and only 2 and 3 are known")
        tensors, values = self.scalar("Q"), self.scalar("Q")
        metadata = {self.string(): self.value(self.scalar("I")) for _ in range(values)}
        places = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        start = -(-self.at // alignment) * alignment
        stored = {name: StoredTensor(shape, kind, start + offset) for name, shape, kind, offset in places}
        return Header(metadata, stored), max((tensor.offset for tensor in stored.values()), default=0)

    def scalar(self, kind: str) -> Any:
        form = f"<{kind}"
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        text = self.data[self.at : self.at + length].decode("utf-8")
        self.at += length
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in (_STRING, _ARRAY):
            return [self.value(inner) for _ in range(count)]
        form = f"<{count}{_SCALARS[inner]}"
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return list(values)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.scalar("I")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))
        return name, shape[::-1], self.scalar("I"), self.scalar("Q")


def block_types(header: Header) -> list[str]:
    """The types that hold the matrices of the blocks, those of most weights first.

    Raises:
        InputError: the package gguf, which knows their names, is missing.
    """
    weights: Counter[int] = Counter()
    for name, tensor in header.tensors.items():
        if name.startswith("blk.") and len(tensor.shape) > 1:
            weights[tensor.kind] += prod(tensor.shape)
    return [FLOATS.get(kind) or gguf_package().GGMLQuantizationType(kind).name for kind, _ in weights.most_common()]


def weights_from(checkpoint: Path | None) -> str | None:
    """What the float weights were made of, where that is not float: `GGUF Q4_1`."""
    if checkpoint is None or not is_gguf(checkpoint):
        return None
    kinds = [kind for kind in block_types(read_header(checkpoint)) if kind not in FLOATS.values()]
    return f"GGUF {', '.join(kinds)}" if kinds else None


def gguf_package() -> Any:
    """Return the package gguf; InputError where it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("a GGUF file is read with the package gguf; install it: pip install 'lsiq[gguf]'") from error
    return gguf
