"""What a run is carried out on: its device, and what its record says of it."""

from __future__ import annotations

import platform
from typing import Any

import torch

from lsiq.errors import ConfigError
from lsiq.runtime import processes

# The share of a GPU's free memory that the streams may take; the rest is for the block and its training state.
RESIDENT_SHARE = 0.25


def fits(size: int, device: torch.device, share: float = RESIDENT_SHARE) -> bool:
    """Whether `size` bytes, of streams by default, may stay on the device; a CPU has no other place for them."""
    return device.type != "cuda" or size <= share * torch.cuda.mem_get_info(device)[0]


def find_device(name: str) -> torch.device:
    """Return the device that `name` stands for; ConfigError where this machine has none such."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        number = torch.cuda.current_device() if processes.size() == 1 else processes.local_rank()
        return torch.device("cuda", number)
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} GPUs; use device=cpu or auto")
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """What the numbers were computed on."""
    described: dict[str, Any] = {
        "device": device.type,
        "processes": processes.size(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described
