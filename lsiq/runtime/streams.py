"""Where streams live: what passes from block to block, `(N, T, d)`, in memory or in memory-mapped files."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lsiq.errors import OutputError

_FOLDER: ContextVar[Path | None] = ContextVar("folder of streams", default=None)
# By the address of a stream's first byte.
_MAPS: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()


@contextlib.contextmanager
def stored_in(folder: Path | None) -> Iterator[None]:
    """While this lasts, new streams are files in `folder`; None keeps them in memory.

    The files have no names: their space is free again when the stream is dropped or the process ends, however it does.
    """
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def on_disk() -> bool:
    return _FOLDER.get() is not None


def empty(shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
    """Return room for a stream.

    Args:
        pinned: in memory, lay it where a GPU copies from it by itself.

    Raises:
        OutputError: the disk has no room for it.
    """
    folder = _FOLDER.get()
    if folder is None:
        return torch.empty(*shape, dtype=dtype, pin_memory=pinned)
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix=".stream.") as file:
            file.truncate(max(size, 1))
            if hasattr(os, "posix_fallocate"):  # a disk that fills up later would kill the process
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            mapping = mmap.mmap(file.fileno(), max(size, 1))
    except OSError as error:
        raise OutputError(
            f"paths.streams=disk: {size / 2**30:.2f} GiB cannot be kept in {folder} ({error.strerror}); free space, "
            "set paths.runs=DIR, use fewer calib.samples, or paths.streams=memory"
        ) from error
    if size == 0:
        return torch.empty(*shape, dtype=dtype)
    stream = torch.frombuffer(mapping, dtype=dtype).view(*shape)
    _MAPS[stream.untyped_storage().data_ptr()] = mapping
    return stream


def release(*streams: Tensor) -> None:
    """Let go of the memory that holds pages of these streams, where they are files; what they hold stays."""
    for stream in streams:
        if (mapping := _MAPS.get(stream.untyped_storage().data_ptr())) is not None:
            mapping.madvise(mmap.MADV_DONTNEED)
