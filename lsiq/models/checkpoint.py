"""Checkpoints read lazily: one tensor at a time, by name, from memory-mapped files."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lsiq.errors import InputError
from lsiq.models.folder import weight_files
from lsiq.models.gguf_file import is_gguf


class DeviceCheckpoint:
    """Random half-precision weights, drawn where they are used: each tensor depends on its own name alone."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device)

    def read(self, name: str, shape: torch.Size) -> Tensor:
        device = self._generator.device
        if len(shape) == 1:
            return (torch.ones if "norm" in name and name.endswith("weight") else torch.zeros)(shape, device=device)
        self._generator.manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape, dtype=torch.float16, device=device).normal_(0.0, 0.02, generator=self._generator)

    def check_unchanged(self) -> None:
        """Nothing lies on a disk that could have changed."""


class Checkpoint(Protocol):
    """Named tensors of known shape; reading one reads nothing else."""

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """Return the tensor on the CPU, in the dtype it is stored in; InputError if missing or of another shape."""
        ...

    def check_unchanged(self) -> None:
        """Raise InputError where what was read may not be what is there now."""
        ...


class FileCheckpoint:
    """Tensors of safetensors files, of a GGUF file, or of pickled files that hold nothing but tensors."""

    def __init__(self, folder: Path, tensors: Mapping[str, Any], files: Sequence[Path]) -> None:
        self.folder = folder
        self._states = {file: _state(file) for file in files}
        self._tensors = tensors
        self._finite: set[str] = set()  # a tensor is read once for each pass over the model, and checked once

    def check_unchanged(self) -> None:
        if changed := [file for file, before in self._states.items() if _state(file) != before]:
            raise InputError(
                f"{changed[0]}: changed while the run was reading it; give the same command again, which starts a run "
                "of the changed model, or put it back as it was to go on with this one"
            )

    def read(self, name: str, shape: torch.Size) -> Tensor:
        self.check_unchanged()  # also because what is cut off while it is mapped ends the process when it is read
        # Checkpoints written from the bare base model leave its prefix out; transformers accepts both, and so do we.
        stored = name if name in self._tensors else name.removeprefix("model.")
        if stored not in self._tensors:
            raise InputError(f"{self.folder}: the checkpoint has no tensor {name}; it is incomplete, fetch it again")
        try:
            tensor = self._tensors[stored]()
        except Exception as error:  # safetensors raises its own kind for each way a file can be damaged
            raise InputError(f"{self.folder}: {name} cannot be read ({error}); fetch the checkpoint again") from error
        if tensor.shape != shape:
            raise InputError(
                f"{self.folder}: {name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(shape)}; "
                "the files do not belong together"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise InputError(f"{self.folder}: {name} is {tensor.dtype}, not a float weight; give the float checkpoint")
        if name not in self._finite and not tensor.isfinite().all():
            raise InputError(f"{self.folder}: {name} holds values that are not finite; fetch the checkpoint again")
        self._finite.add(name)
        return tensor


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class RandomCheckpoint:
    """Random weights of the asked shapes: each tensor depends on the seed and its own name alone."""

    def __init__(self, seed: int, std: float = 0.02) -> None:
        self._seed, self._std = seed, std

    def check_unchanged(self) -> None:
        pass

    def read(self, name: str, shape: torch.Size) -> Tensor:
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        if len(shape) == 1:
            return torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
        return torch.empty(shape, dtype=torch.float16).normal_(0.0, self._std, generator=generator)


def open_checkpoint(folder: Path, allow_pickle: bool) -> FileCheckpoint:
    """Open the weights of `folder`, or of the GGUF file of that name, without reading them.

    Raises:
        InputError: no weights, a damaged file, or pickled weights that were not asked for.
    """
    if is_gguf(folder):
        from lsiq.models.gguf_tensors import GGUFTensors

        return FileCheckpoint(folder, GGUFTensors(folder), [folder])
    tensors: dict[str, Any] = {}
    files = weight_files(folder, allow_pickle)
    checkpoint = FileCheckpoint(folder, tensors, files)
    for file in files:
        try:
            tensors.update(_open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file))
        except InputError:
            raise
        except Exception as error:  # each library has its own exceptions for a damaged file
            raise InputError(f"{file}: cannot be read ({error}); fetch it again") from error
    return checkpoint


def _open_safetensors(file: Path) -> dict[str, Any]:
    from safetensors import safe_open

    handle = safe_open(file, framework="pt", device="cpu")
    return {name: lambda name=name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)


def _open_pickle(file: Path) -> dict[str, Any]:
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{file}: does not hold a plain state dict; convert it to safetensors")
    return {name: lambda tensor=tensor: tensor for name, tensor in state.items()}


class MemoryCheckpoint:
    """A checkpoint that is read once: making random weights takes longer than reading real ones.

    Attributes:
        seconds: what reading has taken so far.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors: dict[str, Tensor] = {}
        self.seconds = 0.0

    def read(self, name: str, shape: torch.Size) -> Tensor:
        if name not in self._tensors:
            start = time.perf_counter()
            self._tensors[name] = self._checkpoint.read(name, shape)
            self.seconds += time.perf_counter() - start
        return self._tensors[name]

    def check_unchanged(self) -> None:
        self._checkpoint.check_unchanged()

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())
