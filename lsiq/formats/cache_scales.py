"""The scales under which one block's keys and values lie in an FP8 cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CacheScales:
    """One for all keys of a block and one for all its values; both are numbers of float32."""

    key: float
    value: float

    def tensor(self) -> Tensor:
        """Return both as `(2,)` in float32, that of keys first."""
        import torch

        return torch.tensor([self.key, self.value], dtype=torch.float32)

    @classmethod
    def of(cls, tensor: Tensor) -> CacheScales:
        """Return what `tensor` made `(2,)` of."""
        key, value = tensor.tolist()
        return cls(key, value)
