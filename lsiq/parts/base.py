"""What a part is, and the draft that parts work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Protocol, runtime_checkable

from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block
    from lsiq.models.context import Context


Tensors = Mapping[str, "Tensor"]
# A signed step of size r changes the codes of the share r of all weights, for what rounding leaves is spread evenly
# over a step of the grid. Where the signs are noise, as those of a first batch largely are, that adds r² to the mean
# squared error of 1/12 which rounding makes: 5 % at 1/16, and three times that error at 1/2. Shorter trainings travel
# less.
FEWEST_STEPS = 16


Hardening = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="share of the steps in which rounding sets in, 0 to 1; above 0 there are no Triton kernels",
    ),
]


@dataclass(frozen=True)
class Draft:
    """A block's float tensors on their way to the grid.

    Attributes:
        weights: every tensor of the block by dotted name, as changed so far.
        clip: by name of a linear's weight, the factors `(low, high)`, each `(out, groups, 1)`, that shrink the range
            of its grid; a linear that is not named keeps its full range.
        extremes: by name of a linear's weight, the ends `(out, groups, 1)` that the factors shrink, where they are not
            the smallest and largest weights of each group.
        offsets: by name of a linear's weight, what is added to each weight before it is rounded, `(out, in)`, in steps
            of its grid there; the grid itself is fitted without it.
        softness: how much of the rounding is still left out, a scalar from 1 (all) to 0; None for 0. What is stored is
            rounded whatever it says.
        reach: how far from its rounded value a weight may stand while rounding is left out, in distances of the grid's
            points there; None for as far as it lies.
    """

    weights: Tensors
    clip: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    extremes: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    offsets: Tensors = field(default_factory=dict)
    softness: Tensor | None = None
    reach: float | None = None


@dataclass(frozen=True)
class PartState:
    """What a part holds for one block.

    Attributes:
        parameters: trained; start at values that leave the draft as it is, or at the part's own start.
        constants: fixed once made, such as singular vectors. One named `done`, a scalar that starts at 1, is kept at
            the share of the steps that are behind while a step is taken.
        bounds: by parameter, the interval that it is brought back to after every step; none for one not named.
        bulky: parameters as large as the weights; they are neither stored nor followed epoch by epoch.
        unit: what the part's learning rate counts in, in values of the parameters.
    """

    parameters: dict[str, Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    bulky: frozenset[str] = frozenset()
    unit: float = 1.0


class PartTraits:
    """What a learned method asks of a part; a class says only what differs from these answers.

    Attributes:
        keeps_function: whether the float block computes the same with the part as without.
        chooses_codes: whether the part decides which code a weight gets, and not only which weight is rounded.
        hardening: share of the steps in which rounding sets in; 0 where it is there from the first step on.
    """

    keeps_function: bool = False
    chooses_codes: bool = False
    hardening: float = 0.0


def left_out(state: PartState, hardening: float) -> Tensor:
    """Return how much of the rounding is left out while it sets in over the share `hardening` of the steps: 1 to 0."""
    return (1 - state.constants["done"] / hardening).clamp(min=0)


@runtime_checkable
class Part(Protocol):
    """Settings of one part; `apply` is pure, so what is trained is what is stored.

    `PartTraits` says what the attributes mean and has answers that suit most parts.
    """

    @property
    def keeps_function(self) -> bool: ...

    @property
    def chooses_codes(self) -> bool: ...

    @property
    def hardening(self) -> float: ...

    @property
    def name(self) -> str: ...

    @property
    def lr(self) -> float | None:
        """The learning rate; None for the one of `rate_of`."""
        ...

    def start(self, block: Block, quant: QuantSettings, context: Context) -> PartState:
        """Return the parameters and constants for a block as the parts before this one start it, on its device."""
        ...

    def apply(self, draft: Draft, state: PartState, block: Block) -> Draft:
        """Return the changed draft; differentiable in the parameters."""
        ...


def rate_of(part: Part, state: PartState, steps: int) -> float:
    """Return the learning rate of a part that is trained for so many steps: its `lr`, or its `travel` over them.

    Either counts in the units of `state`. A part without `travel` travels 1. Fewer than `FEWEST_STEPS` count as so
    many.
    """
    rate = part.lr if part.lr is not None else getattr(part, "travel", 1.0) / max(steps, FEWEST_STEPS)
    return rate * state.unit


def clipped_range(draft: Draft, name: str, quant: QuantSettings) -> tuple[Tensor, Tensor]:
    """Return both ends `(out, groups, 1)` of what a linear's grid spans under the draft's clipping."""
    lo, hi = draft.extremes.get(name) or quant.of(name).extremes(draft.weights[name])
    if name in draft.clip:
        low, high = draft.clip[name]
        lo, hi = low * lo, high * hi
    return lo, hi


def quantized_ranges(draft: Draft, name: str, quant: QuantSettings) -> tuple[Tensor, Tensor]:
    """Return scale and zero point `(out, groups, 1)` of a linear's grid under the draft's clipping."""
    return quant.of(name).fit(*clipped_range(draft, name, quant))


def rounded_target(draft: Draft, name: str, quant: QuantSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is rounded of a linear, `(out, in)`, offsets included, with scale and zero point of its grid."""
    scale, zero = quantized_ranges(draft, name, quant)
    weight = draft.weights[name]
    if (offset := draft.offsets.get(name)) is not None:
        fmt = quant.of(name)
        spacing = fmt.spacing(fmt.grouped(weight), scale)
        weight = weight + (fmt.grouped(offset) * spacing).reshape(weight.shape)
    return weight, scale, zero


def rounded(draft: Draft, linears: tuple[str, ...], quant: QuantSettings) -> dict[str, Tensor]:
    """Return every tensor of the draft, its linears on their grids; gradients pass straight through the rounding."""
    weights: dict[str, Tensor] = {}
    for name in linears:
        if (fmt := quant.of(name)).bits == 16:
            continue
        weight, scale, zero = rounded_target(draft, name, quant)
        weights[name] = fmt.fake(weight, scale, zero)
        if draft.softness is not None:
            left_out = weight - weights[name]
            if draft.reach is not None:
                bound = draft.reach * fmt.spacing(fmt.grouped(weight), scale)
                left_out = fmt.grouped(left_out).clamp(-bound, bound).reshape(weight.shape)
            weights[name] = weights[name] + draft.softness * left_out
    return {**draft.weights, **weights}
