"""One job at a time that goes on beside its caller."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Background:
    """Carries out jobs in a thread of its own. A process does not end before its last job has."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._job: Future[Any] | None = None
        self._staged: dict[str, Tensor] = {}

    @property
    def busy(self) -> bool:
        return self._job is not None and not self._job.done()

    def in_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors for the next job once the last one is over; what lies on a GPU is copied, the rest is not.

        The copies last until others of their names are asked for. Raises what the last job raised.
        """
        self.wait()
        return {
            name: tensor if tensor.device.type == "cpu" else self._room(name, tensor).copy_(tensor)
            for name, tensor in tensors.items()
        }

    def _room(self, name: str, like: Tensor) -> Tensor:
        room = self._staged.get(name)
        if room is None or room.shape != like.shape or room.dtype != like.dtype:
            # Pinned memory is what a GPU copies to fastest, and dear to ask for: it is kept.
            room = self._staged[name] = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        return room

    def start(self, job: Callable[[], T]) -> Future[T]:
        """Begin a job once the last one is over, and return what it will return; raises what the last one raised."""
        self.wait()
        self._job = future = self._thread.submit(job)
        return future

    def wait(self) -> None:
        """Return when the last job is over; raises what it raised, once. Who is interrupted here can wait again."""
        if (job := self._job) is not None:
            concurrent.futures.wait([job])
            self._job = None
            job.result()
