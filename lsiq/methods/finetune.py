"""Fine-tuning a quantised model: singular value increments in its last blocks, on a text of choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from lsiq.methods.base import BlockResult, Context, Need
from lsiq.methods.learned import Course
from lsiq.parts.singular import Singular
from lsiq.settings import settings

if TYPE_CHECKING:
    from lsiq.config import QuantSettings
    from lsiq.models.block import Block


@settings
class FineTune:
    """Take a finished run of any method and train increments in its last `blocks` blocks on the calibration text.

    The earlier blocks stay as they are. In each later one the decoded weight `Ŵ` gets increments of its own singular
    values, `Ŵ + U diag(I) Vᵀ`, rounded on the grid that the run chose, so that the start is that run, bit for bit.
    The loss is the language model's: the mean next-token loss of what the remaining blocks, as the run quantised
    them, and the head make of the block's outputs. One block is trained after the other.

    Source: LSI (arXiv 2406.16299, fine-tuning of a quantised model): increments in the last two blocks.
    Deviation: the paper does not say which loss it trains; the language model's own is the one that a text speaks to.
    """

    run: str = Field(min_length=1, description="the run to start from: its id below paths.runs, or its folder")
    blocks: int = Field(2, ge=1, description="how many of the last blocks are trained, at least 1")
    part: Singular = Field(description="the increments")
    training: Course = Field(description="how they are trained")

    @property
    def name(self) -> str:
        return "lsi-finetune"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"})

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        from lsiq.finetune import tune

        return tune(self, block, quant, context)
