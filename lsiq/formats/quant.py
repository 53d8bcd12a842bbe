"""The number formats of a block's linears, weights and activations, as checked settings."""

from __future__ import annotations

from pydantic import Field

from lsiq.formats.base import ActivationFormat, WeightFormat
from lsiq.settings import settings


@settings
class QuantSettings:
    """The number formats of the linears in every block."""

    weight: WeightFormat = Field(description="a weight format with its settings, such as lsiq.formats.integer.Integer")
    activation: ActivationFormat = Field(
        description="an activation format with its settings, such as lsiq.formats.activation.Activation"
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

        Formats other than integers say their own name; activations in another format than the weights add theirs. Where
        both are of a family that has its width in its name, that is all: mxfp4, or mxfp4a8 for other activations of it.
        """
        if self.weight.bits == 16 and self.activation.bits == 16:
            return "fp16"
        weight, activation = self.weight, self.activation
        if weight.family and weight.family == activation.family and activation.active:
            if activation.suffix == weight.suffix:
                return weight.suffix
            return f"{weight.suffix}a{activation.suffix.removeprefix(activation.family)}"
        name = f"w{weight.bits}a{activation.bits}{weight.separator}{weight.suffix}"
        if not activation.active or activation.suffix == (weight.suffix if weight.separator else ""):
            return name
        return f"{name}-a{activation.suffix or 'int'}"
