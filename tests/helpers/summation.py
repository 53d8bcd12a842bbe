"""How far apart two runs may learn that differ in the order of their sums alone."""

from __future__ import annotations

from pathlib import Path

import torch

from lsiq.results.store import BlockStore

# Adam divides a gradient by its size, so rounding moves an element by a share of its rate, and a flipped code by more.
# Measured on a CPU with AVX512-BF16, as it is and with MKL and ATen held to AVX2 or to their plainest code: at most
# 6e-4, and 0.027 where a code flipped. A sequence lost from each halved batch: 0.75. Shares weighed wrongly: 0.44.
ORDER_OF_SUMMATION = 0.1


def learned_difference(one: Path, other: Path) -> float:
    """Return the largest difference of a learned tensor of the first block of two runs, relative to its norm."""
    mine, theirs = (BlockStore(folder / "blocks").read(0).state for folder in (one, other))
    assert mine.keys() == theirs.keys() != set()
    tiny = torch.finfo(torch.float32).tiny  # what stays at zero in one run has to in the other
    return max(((theirs[name] - value).norm() / value.norm().clamp_min(tiny)).item() for name, value in mine.items())
