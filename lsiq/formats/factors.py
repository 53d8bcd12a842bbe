"""What low-rank factors beside a weight can be stored in."""

from __future__ import annotations

from lsiq.formats.base import WeightFormat
from lsiq.formats.mxint import BLOCK, MXInt

# By the name of it in settings; None for halves.
FACTORS: dict[str, WeightFormat | None] = {
    "float16": None,
    "mxint8": MXInt(bits=8, block=BLOCK, exponent=8),
}
