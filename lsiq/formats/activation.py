"""The format of the activations that enter a linear."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lsiq.settings import settings


@settings
class Activation:
    """Dynamic integers of `bits` bits, their range taken from each token or from the whole tensor."""

    bits: int = Field(16, ge=4, le=16, description="4 to 8 bits per activation, or 16 to leave them in float")
    per: Literal["token", "tensor"] = Field("token", description="token or tensor")
    symmetric: bool = Field(False, description="true or false")

    def __post_init__(self) -> None:
        if 8 < self.bits < 16:
            raise ValueError(
                f"bits={self.bits}: nothing lies between 8 and 16; use 4 to 8, or 16 for float activations"
            )
