"""Time spent in one part of a loop, on a CPU or a GPU, without making the loop wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Adds up the time between entering and leaving.

    On a GPU by events, so that nothing waits until the time is read. While a CUDA graph is recorded the events become
    part of it; they tell the time of its last replay, which `replayed` takes for that of all replays since.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._recorded: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        recording = torch.cuda.is_current_stream_capturing()
        first, last = (torch.cuda.Event(enable_timing=True, external=recording) for _ in range(2))
        first.record()
        yield
        last.record()
        (self._recorded if recording else self._events).append((first, last))

    def replayed(self, times: int) -> None:
        """Add `times` replays of the recorded graph, each as long as the last one; waits for the GPU."""
        if times:
            torch.cuda.synchronize()
            self._seconds += times * sum(first.elapsed_time(last) for first, last in self._recorded) / 1000

    def forget_recorded(self) -> None:
        """The recorded graph will not be replayed again."""
        self._recorded.clear()

    def seconds(self) -> float:
        """The time so far; waits for the GPU."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        self._events.clear()
        return self._seconds
