"""A quantised weight as it is stored: codes on a grid, and what decodes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lsiq.errors import NumericalError
from lsiq.formats.base import WeightFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes `(out, in)` uint8, scale and zero `(out, groups, 1)`, and the format they belong to."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    format: WeightFormat

    def decode(self) -> Tensor:
        """The weights `(out, in)` that the codes stand for, in the dtype of the scale."""
        return self.format.decode(self.codes, self.scale, self.zero)

    @property
    def stored_bits(self) -> int:
        return self.format.stored_bits(*self.codes.shape)

    def to(self, device: torch.device | Literal["cpu"]) -> QuantizedTensor:
        return QuantizedTensor(self.codes.to(device), self.scale.to(device), self.zero.to(device), self.format)

    def cpu(self) -> QuantizedTensor:
        return self.to("cpu")


def quantize(w: Tensor, fmt: WeightFormat, name: str = "weight") -> QuantizedTensor:
    """Round `w (out, in)` to the nearest point of the grid that spans each group.

    Raises:
        NumericalError: `w` holds a value that is not finite.
    """
    if not w.isfinite().all():
        raise NumericalError(f"{name} holds values that are not finite; the checkpoint is damaged, fetch it again")
    w = w.float()
    scale, zero = fmt.fit(*fmt.extremes(w))
    return QuantizedTensor(fmt.encode(w, scale, zero), scale, zero, fmt)
