"""Time spent in one part of a loop, on a CPU or a GPU, without making the loop wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar

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


_SPENT: ContextVar[dict[str, float] | None] = ContextVar("seconds by stage", default=None)


@contextlib.contextmanager
def collect_stages() -> Iterator[dict[str, float]]:
    """While this lasts, the stages of a method add their wall time to the yielded dict, by name.

    A GPU is waited for at both ends of each stage; without a collector stages cost nothing.
    """
    seconds: dict[str, float] = {}
    token = _SPENT.set(seconds)
    try:
        yield seconds
    finally:
        _SPENT.reset(token)


@contextlib.contextmanager
def measured_stage(name: str) -> Iterator[None]:
    """Count what happens inside as the stage `name`, where somebody collects."""
    seconds = _SPENT.get()
    if seconds is None:
        yield
        return
    start = _now()
    yield
    seconds[name] = seconds.get(name, 0.0) + _now() - start


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
