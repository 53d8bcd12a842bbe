"""Files that are there whole or not at all, also after a loss of power, and that cannot be read back changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


_OWN = ("tensors", "checksum")


class DamagedError(Exception):
    """A file is not what was written: cut off, changed, or never finished."""


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        digest: of names, types, shapes and values of the tensors; equal tensors have equal digests.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    digest: str


@contextlib.contextmanager
def replacing(file: Path, durable: bool = True) -> Iterator[Path]:
    """Give the name of a file to write, which takes the place of `file` once it is complete and on the disk.

    Where it is not `durable` the disk is not waited for: a loss of power may leave a damaged file.

    Whoever reads `file` meanwhile sees what was there before. An error leaves that in place, and nothing else behind.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        if durable:
            _flush(partial)
        os.replace(partial, file)
        if durable:
            _flush(file.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def remove_partial(folder: Path) -> None:
    """Remove what writers that were killed left in `folder`, which nobody else may be writing to."""
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write `file`; OSError where that cannot be done, and it is what it was."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], durable: bool = True) -> str:
    """Write a safetensors file that carries a checksum of all that is in it, and return the digest of its tensors.

    Args:
        durable: whether it outlives a loss of power from when this returns; `read_tensors` finds what did not.

    Raises:
        OSError: it cannot be written, and is what it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = tensor_digest(plain)
    checksum = _checksum(digest, metadata)
    with replacing(file, durable) as partial:
        try:
            save_file(plain, partial, metadata={**metadata, "tensors": digest, "checksum": checksum})
        except SafetensorError as error:  # its own kind for what the system refuses; the number stands in its text
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error
    return digest


def read_tensors(file: Path) -> Stored:
    """Return what `write_tensors` wrote, on the CPU.

    Raises:
        FileNotFoundError: it is not there.
        DamagedError: it is cut off or changed.
    """
    from safetensors import safe_open

    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            metadata = dict(handle.metadata() or {})
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # safetensors has its own kind for each way a file can be damaged
        raise DamagedError(f"{file} is damaged ({error})") from error
    digest = tensor_digest(tensors)
    recorded, checksum = (metadata.pop(name, None) for name in _OWN)
    if recorded != digest or checksum != _checksum(digest, metadata):
        raise DamagedError(f"{file} is damaged (its checksum does not fit what it holds)")
    return Stored(tensors, metadata, digest)


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values of tensors that lie on the CPU."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum(digest: str, metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([digest, sorted(metadata.items())]).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
