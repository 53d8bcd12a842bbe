"""DuQuant: block-diagonal rotations found by a greedy search, and a permutation that evens the blocks out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.methods.base import Method
from lsiq.methods.learned import refuse_rounded_ahead
from lsiq.methods.wrapper import Transform, Wrapper
from lsiq.models.context import Context, Need
from lsiq.settings import settings

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block


@settings
class DuQuant(Wrapper):
    """Rotate the inputs of linears online, block by block of channels, so that their largest entry becomes small.

    For each input `X (tokens, in)`, cut into blocks of `block` channels:

        1. greedy rotation of each block: the channel that holds the largest |entry| is swapped to the front and
           spread evenly over the block by a random rotation; of `steps` such steps the product of the first k is kept
           whose |X R| is smallest
        2. zigzag permutation: channels by falling max|x| are dealt to the blocks there and back, so that all blocks
           get alike outliers
        3. another greedy rotation; 2 and 3 are done `permutations` times

    It is done for the linears behind norms, the output projection and the last linear of the block. The weights take
    the inverse, so the float function stays the same; `then` rounds them. All of it is online: the
    share of the block's multiply-adds is the metric `online_share`, the matrices count as stored bits.

    Smoothing comes before, as in the paper: `method=smoothquant method@method.then=duquant`.

    Source: DuQuant (arXiv 2406.01721, section 3.2 and 3.3).
    Deviation: the search sees, of each channel, the token at which it is largest, not all tokens. A width that `block`
    does not divide takes the largest divisor below it. The random matrix of a step is shared by all blocks, and made
    of one for the whole search by shuffling its rows and their signs. The paper's code clips
    activations to 0.9 of their range and weights to 0.8 of theirs (`--lac 0.9 --swc 0.8`); here the format says the
    former (`quant.activation.clip=0.9`, 1 by default), and the latter is left out.
    """

    block: int = Field(128, ge=2, description="channels rotated together: the largest divisor of a width up to this")
    steps: int = Field(256, ge=1, description="steps of the greedy search, at least 1")
    permutations: int = Field(1, ge=0, le=8, description="times that a permutation and a rotation follow, 0 to 8")
    places: list[Literal["norm", "output", "down"]] = Field(
        ["norm", "output", "down"],
        min_length=1,
        description="a list of norm, output and down: whose inputs are rotated",
    )
    then: Method = Field(description="the method that quantises the rotated block")
    label, reads, at_inference = "duquant", frozenset[Need]({"inputs"}), "rotations"

    def __post_init__(self) -> None:
        refuse_rounded_ahead(self.then)

    def transform(self, block: Block, quant: QuantSettings, context: Context) -> Transform:
        from lsiq.calib.input_statistics import peak_inputs
        from lsiq.methods.duquant.search import find_rotation

        assert context.inputs is not None  # the method asks for them
        peaks = peak_inputs(block, context.inputs, context.batch, block.spec.inputs(self.places))
        rotations = {
            name: find_rotation(x, self.block, self.steps, self.permutations, context.generator)
            for name, x in peaks.items()
        }
        return Transform(rotations=rotations)
