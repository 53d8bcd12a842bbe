"""The number formats of a block's linears, weights and activations, as checked settings."""

from __future__ import annotations

from pydantic import Field

from lsiq.formats.base import ActivationFormat, WeightFormat
from lsiq.formats.mxint import MXActivation, MXInt
from lsiq.settings import settings


@settings
class QuantSettings:
    """The number formats of the linears in every block."""

    weight: WeightFormat = Field(description="a _target_ under lsiq.formats with its settings: Integer or MXInt")
    activation: ActivationFormat = Field(
        description="a _target_ under lsiq.formats with its settings: Activation or MXActivation"
    )

    def __post_init__(self) -> None:
        if self.weight.bits == 16 and self.activation.active:
            raise ValueError(
                f"weight.bits=16: float weights with activations of {self.activation.bits} bits are no setting here; "
                "use quant.weight.bits=8 or less, or quant=fp16"
            )

    @property
    def name(self) -> str:
        """The field's name of the setting, such as w4a16g128; made from the formats, so an override cannot belie it.

        Blocks say -mxint; activations in another format than the weights add theirs.
        """
        if self.weight.bits == 16 and self.activation.bits == 16:
            return "fp16"
        blocks = isinstance(self.weight, MXInt)
        name = f"w{self.weight.bits}a{self.activation.bits}{'-' if blocks else ''}{self.weight.suffix}"
        if not self.activation.active:
            return name
        if isinstance(self.activation, MXActivation):
            return name if self.activation.suffix == self.weight.suffix else f"{name}-a{self.activation.suffix}"
        return f"{name}-aint" if blocks else name
