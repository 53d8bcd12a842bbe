"""The number formats of a block's linears, weights and activations, as checked settings."""

from __future__ import annotations

from pydantic import Field

from lsiq.formats.base import ActivationFormat, WeightFormat
from lsiq.formats.key_value import KeyValue, Running
from lsiq.formats.mixed import OUTSIDE, Allocation, Rule
from lsiq.settings import fill, settings


@settings
class QuantSettings:
    """The number formats of the linears in every block, and of what is kept for later tokens.

    Linears have `weight`, unless `plan` or `allocate` gives them formats of their own, or `rules` do, which have the
    last word. Who rounds a linear asks `of` for its format; the settings that know a model's linears are `PlacedQuant`.
    """

    weight: WeightFormat = Field(description="a weight format with its settings, such as lsiq.formats.integer.Integer")
    activation: ActivationFormat = Field(
        description="an activation format with its settings, such as lsiq.formats.activation.Activation"
    )
    kv: KeyValue = Field(
        default_factory=lambda: fill(KeyValue, {}),
        description="the format of keys and values in the cache: bits, per, group, clip",
    )
    rules: list[Rule] = Field(
        [], description="a list of rules, {match: name of linears, blocks: numbers or null, format: name}"
    )
    plan: str | None = Field(None, description="a file with a format for each linear, or null")
    allocate: Allocation = Field(
        default_factory=lambda: fill(Allocation, {}),
        description="how bits are shared out among the linears: bits and choices",
    )

    def __post_init__(self) -> None:
        if self.weight.bits == 16 and self.activation.active and not self.mixed:
            raise ValueError(
                f"weight.bits=16: float weights with activations of {self.activation.bits} bits are no setting here; "
                "use quant.weight.bits=8 or less, or quant=fp16"
            )
        self.kv.beside(self.activation)
        if self.plan is not None and self.allocate.active:
            raise ValueError(f"plan={self.plan}: the formats are chosen already; leave plan or allocate out")

    @property
    def name(self) -> str:
        """The field's name of the setting, such as w4a16g128; made from the formats, so an override cannot belie it.

        Formats other than integers say their own name; activations in another format than the weights add theirs.
        Where both are of a family that has its width in its name, that is all: mxfp4, or mxfp4a8 for other activations
        of it. Where linears have formats of their own the name says how they came by them.
        """
        if self.plan is not None or self.allocate.active:
            bits = "" if self.allocate.bits is None else f"{self.allocate.bits:g}"
            name = f"mixed{bits}a{self.activation.bits}{self._activation_suffix()}"
        else:
            name = self._uniform_name()
        return f"{name}{'-rules' if self.rules else ''}{self.kv.suffix}"

    def _uniform_name(self) -> str:
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

    def _activation_suffix(self) -> str:
        return f"-a{self.activation.suffix}" if self.activation.active and self.activation.suffix else ""

    @property
    def running(self) -> ActivationFormat:
        """What is rounded while a block runs: activations, and what is kept of keys and values."""
        return Running(self.activation, self.kv.beside(self.activation)) if self.kv.active else self.activation

    @property
    def mixed(self) -> bool:
        """Whether linears have formats of their own."""
        return bool(self.rules) or self.plan is not None or self.allocate.active

    @property
    def formats(self) -> list[WeightFormat]:
        """The weight formats that linears may get, as far as is known before the model is."""
        return list(dict.fromkeys([*self.in_blocks, *self.outside().values()]))

    @property
    def in_blocks(self) -> list[WeightFormat]:
        """Those of linears inside the blocks."""
        formats: list[WeightFormat] = [r.format.like(self.weight) for r in self.rules if r.match not in OUTSIDE]
        if self.allocate.active:
            formats += [fmt.like(self.weight) for fmt in self.allocate.formats]
        elif self.plan is None:
            formats.insert(0, self.weight)
        return list(dict.fromkeys(formats))

    def of(self, name: str) -> WeightFormat:
        """Return the format of a linear of the block at hand, `mlp.down_proj` with or without `.weight`."""
        assert not self.mixed, f"{name}: the formats of linears are placed on a model first"
        return self.weight

    def in_block(self, index: int) -> QuantSettings:
        """Return the settings whose `of` answers for the linears of a block."""
        del index
        return self

    def outside(self) -> dict[str, WeightFormat]:
        """Return the formats of embeddings and head, by name, where they are rounded."""
        formats: dict[str, WeightFormat] = {
            rule.match: rule.format.like(self.weight) for rule in self.rules if rule.match in OUTSIDE
        }
        return {name: fmt for name, fmt in formats.items() if fmt.bits < 16}
