"""Tensors of a GGUF file by their transformers names, each de-quantised when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsiq.errors import InputError
from lsiq.models.gguf_config import find_architecture
from lsiq.models.gguf_file import FLOATS, Header, StoredTensor, gguf_package, read_header

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFTensors(Mapping[str, Callable[[], Tensor]]):
    """By a parameter's name in transformers, what reads it: floats as they are stored, all else as float32.

    Rows of Q and K come in the order of transformers, norms as it has them. Only the pages of the tensor that is read
    are touched.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            InputError: no such architecture, a tensor type that cannot be de-quantised, or no package gguf.
        """
        gguf = gguf_package()
        self._path, self._header = path, read_header(path)
        self._architecture = find_architecture(self._header, path)
        number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == self._header.architecture)
        self._names = gguf.get_tensor_name_map(number, self._header.get("block_count"))
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        for kind in sorted({tensor.kind for tensor in self._header.tensors.values()} - set(FLOATS)):
            _check_type(gguf, kind, path)

    def _stored(self, name: str) -> str | None:
        return self._names.get_name(name, try_suffixes=(".weight", ".bias"))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._stored(name) in self._header.tensors

    def __getitem__(self, name: str) -> Callable[[], Tensor]:
        stored = self._stored(name)
        if stored is None:
            raise KeyError(name)
        tensor = self._header.tensors[stored]
        return lambda: self._as_in_transformers(stored, _read(self._data, tensor))

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.tensors)

    def __len__(self) -> int:
        return len(self._header.tensors)

    def _as_in_transformers(self, stored: str, rows: Tensor) -> Tensor:
        if self._architecture.norm_offset and stored.endswith("norm.weight"):
            return rows.float() - self._architecture.norm_offset
        if not self._architecture.interleaved:
            return rows
        heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(stored.split(".")[-2])
        return rows if heads is None else halves_apart(rows, head_count(self._header, heads))


def head_count(header: Header, key: str) -> int:
    return header.get(key) or header.get("attention.head_count")


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Return rows `(out, …)` in which channels 2i and 2i + 1 of a head were neighbours as transformers has them."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _read(data: np.ndarray, tensor: StoredTensor) -> Tensor:
    if tensor.kind in FLOATS:
        dtype = _DTYPES[FLOATS[tensor.kind]]
        raw = data[tensor.offset : tensor.offset + prod(tensor.shape) * dtype.itemsize]
        return torch.from_numpy(np.array(raw)).view(dtype).view(tensor.shape)
    gguf: Any = gguf_package()
    kind = gguf.GGMLQuantizationType(tensor.kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = data[tensor.offset : tensor.offset + prod(tensor.shape) // block * size]
    return torch.from_numpy(gguf.dequantize(raw.reshape(*tensor.shape[:-1], -1), kind))


def _check_type(gguf: Any, kind: int, path: Path) -> None:
    """Raise InputError where numbers of a type cannot be made floats; a block of zeros is tried."""
    name = str(kind)
    try:
        quant_type = gguf.GGMLQuantizationType(kind)
        name = quant_type.name
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[quant_type][1]), np.uint8), quant_type)
    except (RuntimeError, ValueError, KeyError) as error:  # what the package raises for types it has no decoder of
        raise InputError(f"{path}: holds tensors of type {name}, which the package gguf cannot read") from error
