"""Peak memory of this process and of its GPU."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reset_peak() -> None:
    """Count peaks from here, where the system allows it, so that jobs of one sweep do not inherit each other's."""
    with contextlib.suppress(OSError):  # Linux only; elsewhere the peak of the whole process is reported
        Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> dict[str, int]:
    """Return the peak resident bytes of the host and, where a GPU is used, the peak allocated bytes of the device."""
    peaks = {"host": _host_peak()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["device"] = torch.cuda.max_memory_allocated()
    return peaks


def highest(readings: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return of each place, the host first, the highest of several peaks; a place that a reading lacks has none there.

    Linux counts resident pages in shares of each processor, so of one process a later reading can be a little lower.
    """
    readings = list(readings)
    places = sorted({place for reading in readings for place in reading}, reverse=True)
    return {place: max(reading.get(place, 0) for reading in readings) for place in places}


def _host_peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still get of a device's memory."""
    if device.type == "cuda":
        import torch

        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved - allocated
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return host_bytes()


def host_bytes() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def taken_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that this process's tensors take; 0 for a CPU, which does not count them."""
    if device.type != "cuda":
        return 0
    import torch

    return torch.cuda.memory_allocated(device)
