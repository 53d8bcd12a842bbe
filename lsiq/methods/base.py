"""What every method is: settings with one function, block in, result out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from lsiq.config import QuantSettings
    from lsiq.formats.branch import SideBranch
    from lsiq.formats.tensor import QuantizedTensor
    from lsiq.models.block import Block
    from lsiq.models.loading import Model
    from lsiq.rotation import Rotation

Need = Literal["inputs", "targets"]


@dataclass(frozen=True)
class Ahead:
    """The rest of the model.

    Attributes:
        depth: how many blocks the model has.
        block: gives a later block by its index, float.
        logits: turns what leaves the last block, `(batch, T, d)`, into `(batch, T, vocabulary)`; differentiable.
        stream: gives what leaves a later block of the float model, `(N, T, d)`, by its index.
    """

    depth: int
    block: Callable[[int], Block]
    logits: Callable[[Tensor], Tensor]
    stream: Callable[[int], Tensor]


@dataclass(frozen=True)
class Context:
    """What a method may look at besides the block and the formats.

    Attributes:
        inputs: `(N, T, d)`, what the quantised model feeds the block; None unless the method needs it. Of several
            processes each holds its share of the sequences.
        targets: `(N, T, d)`, what the float block makes of the float stream; None unless the method needs it.
        generator: seeded for this run and block; the only source of chance.
        batch: sequences that pass through the block at once.
        log: takes named numbers of one step or epoch, for the tracker.
        tokens: `(N, T)` calibration tokens of all processes; None for `calib=none`.
        ahead: what lies between this block and the model's logits.
        cache: a folder for what is worth keeping from run to run; None for no such folder.
    """

    inputs: Tensor | None
    targets: Tensor | None
    generator: torch.Generator
    batch: int
    log: Callable[[Mapping[str, float]], None]
    tokens: Tensor | None = None
    ahead: Ahead | None = None
    cache: Path | None = None

    @property
    def samples(self) -> int:
        """The number of sequences, those of all processes."""
        held = self.tokens if self.tokens is not None else self.inputs
        return 0 if held is None else len(held)


@dataclass(frozen=True)
class BlockResult:
    """What a method made of a block.

    Attributes:
        weights: by dotted name of the linear's weight, its codes.
        floats: by dotted name, norms and biases that were folded into; replaces the block's own.
        metrics: numbers worth a row in the record.
        state: learned parameters worth keeping, by part and name.
        trace: rows of what happened while learning, for the run's trajectory table.
        branches: by dotted name of the linear's weight, the low-rank product that runs beside its codes.
        reference: by dotted name of the linear's weight, the float weight that its codes stand for, where that is not
            the block's own: folded scales belong to it, clipping and learned increments do not. With `floats` it
            makes the same float function as the block. Not stored.
        rotations: what turns the inputs of the linears, or queries and keys, while the block runs; named as in `Block`.
        latents: by dotted name of the linear's weight, where in its cell each weight stood before it was rounded,
            `(out, in)`, in steps from the centre, within one half; empty where a method does not keep them.
        kernels: how the weights were made while they were learned: triton, compile or plain; empty where nothing was
            learned.
    """

    weights: Mapping[str, QuantizedTensor]
    floats: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    trace: Sequence[Mapping[str, Any]] = ()
    branches: Mapping[str, SideBranch] = field(default_factory=dict)
    reference: Mapping[str, Tensor] = field(default_factory=dict)
    rotations: Mapping[str, Rotation] = field(default_factory=dict)
    latents: Mapping[str, Tensor] = field(default_factory=dict)
    kernels: str = ""


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

    This is how methods compose: one that prepares weights (SmoothQuant, AWQ) or turns inputs (DuQuant) hands the block
    to the one in its `then`.

    Args:
        folded: tensors by dotted name that together leave the block's float function as it was.
        clipped: linears' weights by dotted name that are to be rounded in place of the float ones; of turned inputs.
        rotations: what turns inputs, named as in `Block`, after the tensors were folded.
    """
    exact = replace(block, weights={**block.weights, **folded}).turned(rotations or {})
    prepared = replace(exact, weights={**exact.weights, **(clipped or {})})
    result = method.quantize_block(prepared, quant, context)
    floats = {name: tensor for name, tensor in folded.items() if name not in block.linears}
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
