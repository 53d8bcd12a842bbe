"""What a number format of weights and one of activations are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lsiq.formats.grid import Grid

if TYPE_CHECKING:
    from torch import Tensor

WeightFormat = Grid


@runtime_checkable
class ActivationFormat(Protocol):
    """Settings that round what enters a linear, and queries, keys and values where `attention` says so.

    Attributes:
        bits: per activation; 16 leaves them in float.
        attention: whether queries, keys and values are rounded too.
        softmax: whether attention weights are.
    """

    @property
    def bits(self) -> int: ...

    @property
    def attention(self) -> bool: ...

    @property
    def softmax(self) -> bool: ...

    @property
    def active(self) -> bool:
        """Whether anything is rounded."""
        ...

    @property
    def suffix(self) -> str:
        """What the name of a setting says of the format; empty for integers."""
        ...

    @property
    def family(self) -> str:
        """The name of its kind, as `Grid.family` has it; empty for formats whose width stands only in front."""
        ...

    @property
    def number(self) -> str:
        """What a number is called where multiplications are counted, as `Grid.number` has it."""
        ...

    @property
    def factors(self) -> str:
        """The format of low-rank factors that such activations are multiplied with: a key of `factors.FACTORS`."""
        ...

    @property
    def words(self) -> str:
        """The format in words, for model cards."""
        ...

    def fake(self, x: Tensor) -> Tensor:
        """Return `x (…, channels)` as the format holds it, in its own dtype; rounding lets gradients through."""
        ...

    def fake_softmax(self, weights: Tensor) -> Tensor:
        """Return attention weights in 0 … 1 as the format holds them."""
        ...
