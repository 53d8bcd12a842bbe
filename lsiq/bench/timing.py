"""What benchmarks measure with: milliseconds on a GPU or the host, counted operations, the rate of large products."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopsByDtype(TorchDispatchMode):
    """Counts the floating point operations of matrix products and attention, by the dtype they run in."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            first = next(arg for arg in args if isinstance(arg, Tensor))
            if "scaled_dot_product" in func._overloadpacket.__name__:
                args = [_with_heads(arg, first.shape[1]) for arg in args]
            self.counts[str(first.dtype).removeprefix("torch.")] += count(*args, **(kwargs or {}), out_val=out)
        return out


def _with_heads(argument: Any, heads: int) -> Any:
    """Return a tensor `(batch, heads, T, channels)` of no content for keys and values that several queries share.

    torch counts attention only where each query has keys of its own; as many products are made either way.
    """
    if not isinstance(argument, Tensor) or argument.dim() != 4 or argument.shape[1] == heads:
        return argument
    return torch.empty(argument.shape[0], heads, *argument.shape[2:], dtype=argument.dtype, device="meta")


class Mark:
    """A point in time, on the GPU or the host."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.seconds = time.perf_counter()
        if self.event is not None:
            self.event.record()

    def since(self, earlier: Mark) -> float:
        """Milliseconds since an earlier mark; waits for the GPU."""
        if self.event is None or earlier.event is None:
            return (self.seconds - earlier.seconds) * 1000
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event)


def median_ms(action: Callable[[], object], repeats: int, device: torch.device, warm: int = 5) -> float:
    """Return the median milliseconds of an action, one after the other without pause, after a warm-up."""
    for _ in range(warm):
        action()
    marks = [Mark(device)]
    for _ in range(repeats):
        action()
        marks.append(Mark(device))
    times = sorted(later.since(earlier) for earlier, later in itertools.pairwise(marks))
    return times[len(times) // 2]


def measured_rate(dtype: str, device: torch.device) -> float:
    """Operations per second of a large square product."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    for timed in (False, True):
        start, repeats = time.perf_counter(), 10
        for _ in range(repeats if timed else 1):
            _ = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def report_ceilings(precision: str, device: torch.device) -> float:
    """Print what the machine can do at most; return its matrix rate in a precision, in operations a second."""
    rate = measured_rate(precision, device)
    size = 2**30 if device.type == "cuda" else 2**26
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = median_ms(lambda: b.copy_(a), 10, device)
    print(f"matrix products: {rate / 1e12:.4g} TFLOP/s ({precision}); copy: {2 * size / copy / 1e9:.3g} TB/s")
    return rate
