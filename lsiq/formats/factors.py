"""What low-rank factors beside a weight can be stored in."""

from __future__ import annotations

from lsiq.formats.base import WeightFormat
from lsiq.formats.fp8 import FP8
from lsiq.formats.mxfp import MXFP
from lsiq.formats.mxint import MXInt

# By the name of it in settings; None for halves.
FACTORS: dict[str, WeightFormat | None] = {
    "float16": None,
    "mxint8": MXInt(bits=8, block=16, exponent=8),
    "mxfp8": MXFP(element="e4m3", block=32, rule="even"),
    "fp8": FP8(element="e4m3", per="channel"),
}
