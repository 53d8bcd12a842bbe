"""What gets one format: a linear, a stage or a block, with its size in each of the formats to choose from."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsiq.errors import ConfigError

if TYPE_CHECKING:
    from lsiq.formats.base import WeightFormat
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.spec import ModelSpec

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Unit:
    """Linears of one block that get one format.

    Attributes:
        name: number of the block and first linear, `3.mlp.gate_proj`.
        block: number of the block.
        linears: their names inside the block.
    """

    name: str
    block: int
    linears: tuple[str, ...]

    def bits(self, fmt: WeightFormat, shapes: Shapes) -> int:
        """Return the bits that the unit takes in a format; `shapes (out, in)` by name of the linear."""
        return sum(fmt.stored_bits(*shapes[name]) for name in self.linears)

    def weights(self, shapes: Shapes) -> int:
        return sum(shapes[name][0] * shapes[name][1] for name in self.linears)


def units_of(spec: ModelSpec, depth: int, kind: str) -> list[Unit]:
    """Return the units of all blocks: `kind` is linear, stage or block."""
    parts = {
        "linear": [(name,) for name in spec.linears],
        "stage": list(spec.stages),
        "block": [spec.linears],
    }[kind]
    return [Unit(f"{index}.{linears[0]}", index, tuple(linears)) for index in range(depth) for linears in parts]


def without(units: Sequence[Unit], fixed: Mapping[str, WeightFormat]) -> Iterator[Unit]:
    """Yield the units less the linears whose format is decided already; those that lose all are left out."""
    for unit in units:
        linears = tuple(name for name in unit.linears if f"{unit.block}.{name}" not in fixed)
        if linears:
            yield Unit(unit.name, unit.block, linears)


def check_solver(quant: QuantSettings) -> None:
    """Raise ConfigError where bits are to be shared out and nothing is installed that finds the best way."""
    if quant.allocate.active and importlib.util.find_spec("scipy") is None:
        raise ConfigError(
            "quant.allocate: the choice of formats is found by scipy, which is not installed; pip install "
            "'lsiq[allocate]', or give a plan that is there as quant.plan=FILE"
        )


def budget_of(
    quant: QuantSettings, units: Sequence[Unit], fixed: Mapping[str, WeightFormat], shapes: Shapes
) -> tuple[int, int]:
    """Return the bits that the units may take together, and how many weights all linears have, the fixed ones too.

    Raises:
        ConfigError: even the smallest choice takes more.
    """
    allocation = quant.allocate
    fixed_shapes = {name: shapes[name.partition(".")[2]] for name in fixed}
    weights = sum(unit.weights(shapes) for unit in units) + sum(out * width for out, width in fixed_shapes.values())
    spent = sum(fmt.stored_bits(*fixed_shapes[name]) for name, fmt in fixed.items())
    budget = allocation.bytes * 8 if allocation.bits is None else int(allocation.bits * weights)  # type: ignore[operator]
    minimum = spent + sum(min(unit.bits(fmt, shapes) for fmt in allocation.formats) for unit in units)
    if minimum > budget:
        key, value = ("bits", allocation.bits) if allocation.bits is not None else ("bytes", allocation.bytes)
        enough = f"{minimum / weights:.4f}" if key == "bits" else str(-(-minimum // 8))
        raise ConfigError(
            f"quant.allocate.{key}={value}: the smallest of the choices takes {enough} {key}, scales counted; "
            f"give {enough} or more, or smaller choices"
        )
    return budget - spent, weights
