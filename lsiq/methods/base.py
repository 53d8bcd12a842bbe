"""What every method is: settings with one function, block in, result out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lsiq.models.context import Context, Need
from lsiq.models.result import BlockResult

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lsiq.formats.quant import QuantSettings
    from lsiq.linalg.rotation import Rotation
    from lsiq.models.block import Block
    from lsiq.models.loading import Model


class Traits:
    """What the rest of the package asks of a method; a class says only what differs from these answers.

    Attributes:
        training: how parameters are trained; None where nothing is.
        at_inference: what has to be done while the quantised model runs, such as rotations; None for nothing.
        rounds_only: whether the codes are chosen for the weights as they are handed over, and nothing else is changed.
        adds_branches: whether low-rank products run beside the quantised weights.
    """

    training: Any = None
    at_inference: str | None = None
    rounds_only: bool = False
    adds_branches: bool = False


@runtime_checkable
class Method(Protocol):
    """Settings that can quantise a block. They import without torch, so that wrong ones are refused at once.

    `Traits` says what the attributes mean and has answers that suit most methods.
    """

    @property
    def training(self) -> Any: ...

    @property
    def at_inference(self) -> str | None: ...

    @property
    def rounds_only(self) -> bool: ...

    @property
    def adds_branches(self) -> bool: ...

    @property
    def name(self) -> str:
        """What records and tables call the method."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """Which streams must be in the context."""
        ...

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        """Return codes for every linear of `block`; neither the block nor the context is changed."""
        ...


@runtime_checkable
class WholeMethod(Protocol):
    """Settings of a method that looks at all blocks before it answers for the first."""

    @property
    def training(self) -> Any: ...

    @property
    def at_inference(self) -> str | None: ...

    @property
    def adds_branches(self) -> bool: ...

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[Need]: ...

    def begin(self, quant: QuantSettings, context: Context) -> Method:
        """Return the method that answers block by block; `context` is that of the first block."""
        ...


@runtime_checkable
class ModelMethod(Protocol):
    """A method that also prepares the whole model, once, before its first block is quantised."""

    def prepare_model(self, model: Model, tokens: Tensor | None, batch: int, generator: torch.Generator) -> Model:
        """Return the model that is quantised in place of `model`, which stays as it is.

        Args:
            tokens: `(N, T)` calibration tokens, or None.
            batch: sequences that pass through a block at once.
            generator: seeded for this run.
        """
        ...


def chain(method: Method | WholeMethod) -> Iterator[Method | WholeMethod]:
    """The method and those it hands on to, from the outside in."""
    yield method
    if isinstance(then := getattr(method, "then", None), Method):
        yield from chain(then)


def quantize_prepared(
    method: Method,
    block: Block,
    folded: Mapping[str, Tensor],
    quant: QuantSettings,
    context: Context,
    clipped: Mapping[str, Tensor] | None = None,
    rotations: Mapping[str, Rotation] | None = None,
) -> BlockResult:
    """Let `method` quantise the block after some of its tensors were changed, and keep what is not a linear as floats.

    This is how methods compose: one that prepares weights (SmoothQuant, AWQ) or rotates inputs (DuQuant) hands the
    block to the one in its `then`.

    Args:
        folded: tensors by dotted name that together leave the block's float function as it was.
        clipped: linears' weights by dotted name that are to be rounded in place of the float ones; of rotated inputs.
        rotations: what rotates inputs, named as in `Block`, after the tensors were folded.
    """
    exact = replace(block, weights={**block.weights, **folded}).rotated(rotations or {})
    prepared = replace(exact, weights={**exact.weights, **(clipped or {})})
    result = method.quantize_block(prepared, quant, context)
    floats = {name: tensor for name, tensor in folded.items() if name not in block.linears}
    floats |= {n: exact.weights[n] for n in block.untouched if exact.weights[n] is not block.weights[n]}
    # What `method` folded itself, it folded into the clipped weights; none of those here clips and then folds.
    reference = {
        name: exact.weights[name] for name in block.linears if prepared.weights[name] is not block.weights[name]
    }
    return replace(
        result,
        floats=floats | dict(result.floats),
        reference=reference | dict(result.reference),
        rotations={**prepared.rotations, **dict(result.rotations)},
    )
