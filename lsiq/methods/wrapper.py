"""What methods with a `then` share: they transform a block, and the method in `then` quantises it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lsiq.methods.base import Method, Traits, quantize_prepared
from lsiq.models.context import Context, Need
from lsiq.models.result import BlockResult

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.formats.quant import QuantSettings
    from lsiq.linalg.rotation import Rotation
    from lsiq.models.block import Block


@dataclass(frozen=True)
class Transform:
    """What changes in a block before it is quantised; `quantize_prepared` says how the tensors are used.

    Attributes:
        folded: tensors by dotted name that together leave the block's float function as it was.
        clipped: linears' weights by dotted name that are rounded in place of the float ones.
        rotations: what rotates inputs online; None for a method that never does, which then reports no `online_share`.
        metrics: of the search for all this.
    """

    folded: Mapping[str, Tensor] = field(default_factory=dict)
    clipped: Mapping[str, Tensor] = field(default_factory=dict)
    rotations: Mapping[str, Rotation] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Wrapper(Traits):
    """A method around the one in its field `then`. A class says what differs from these answers.

    Attributes:
        label: what the method is called without `then`.
        reads: the streams that it needs itself.
        then: the method that quantises the transformed block.
    """

    label: str
    reads: frozenset[Need] = frozenset()
    then: Method

    @property
    def name(self) -> str:
        """The label, and behind a plus the name of `then`; rounding to nearest goes without saying."""
        return self.label if self.then.name == "rtn" else f"{self.label}+{self.then.name}"

    @property
    def needs(self) -> frozenset[Need]:
        return self.reads | self.then.needs

    def transform(self, block: Block, quant: QuantSettings, context: Context) -> Transform:
        """Return what changes in `block` before `then` quantises it; nothing, unless a class says so."""
        return Transform()

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        """Return what `then` makes of the transformed block, as a result for `block`."""
        changes = self.transform(block, quant, context)
        result = quantize_prepared(self.then, block, changes.folded, quant, context, changes.clipped, changes.rotations)
        metrics = {**changes.metrics, **result.metrics}
        if changes.rotations is not None:
            from lsiq.models.online import online_share

            metrics["online_share"] = online_share(block, result.rotations)
        return replace(result, metrics=metrics)
