"""Number formats of a model whose linears have formats of their own, and how rules and plans are carried out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field

from lsiq.errors import ConfigError, InputError
from lsiq.formats.base import WeightFormat
from lsiq.formats.fit import check_format
from lsiq.formats.mixed import OUTSIDE, Rule
from lsiq.formats.names import as_format
from lsiq.formats.quant import QuantSettings
from lsiq.settings import settings


@settings
class PlacedQuant(QuantSettings):
    """The settings with their rules and plan carried out on the linears of one model.

    Attributes:
        layers: formats by number of the block and name of the linear, `3.mlp.down_proj`, all of them; and by name those
            of tensors outside the blocks, where they have one.
        block: the block whose linears `of` answers for; None for the model as a whole.
    """

    layers: dict[str, WeightFormat] = Field(description="weight formats by linear")
    block: int | None = Field(None, description="number of a block")

    @property
    def in_blocks(self) -> list[WeightFormat]:
        return list(dict.fromkeys(fmt for name, fmt in self.layers.items() if name not in OUTSIDE))

    def of(self, name: str) -> WeightFormat:
        assert self.block is not None, "formats of linears are asked for in a block"
        return self.layers[f"{self.block}.{name.removesuffix('.weight')}"]

    def in_block(self, index: int) -> PlacedQuant:
        return PlacedQuant(**{**_values(self), "block": index})

    def outside(self) -> dict[str, WeightFormat]:
        return {name: fmt for name, fmt in self.layers.items() if name in OUTSIDE and fmt.bits < 16}


def place(
    quant: QuantSettings,
    depth: int,
    linears: Sequence[str],
    model: str,
    layers: Mapping[str, WeightFormat] | None = None,
) -> QuantSettings:
    """Return the settings with a format for each linear of a model; as they are where all have `quant.weight`.

    A format that a name stands for takes what names do not say, such as the width of scales, from `quant.weight`. Rules
    come after a plan and have the last word.

    Args:
        linears: their names inside a block.
        model: its name, for messages.
        layers: the formats that an allocation found; None for those of `quant.plan`, where that is given.

    Raises:
        ConfigError: a rule matches nothing, or a plan is of another model.
    """
    if isinstance(quant, PlacedQuant) or not quant.mixed:
        return quant
    if layers is None and quant.plan is not None:
        layers = read_plan(quant.plan)
    names = [f"{index}.{name}" for index in range(depth) for name in linears]
    formats = dict.fromkeys(names, quant.weight)
    if layers is not None:
        _check_plan(layers, names, quant, model)
        formats |= {name: fmt.like(quant.weight) for name, fmt in layers.items()}
    for number, rule in enumerate(quant.rules):
        matched = matches(rule, depth, linears)
        if not matched:
            raise ConfigError(_nothing(number, rule, depth, linears, model))
        formats |= dict.fromkeys(matched, rule.format.like(quant.weight))
    return PlacedQuant(**{**_values(quant), "layers": formats})


def place_or_try(quant: QuantSettings, depth: int, linears: Sequence[str], model: str) -> QuantSettings:
    """Return what `place` does; where formats are still to be chosen, try the rules and return the settings unchanged.

    Raises:
        ConfigError: as `place`.
    """
    if not quant.allocate.active:
        return place(quant, depth, linears, model)
    stand_in = {f"{index}.{name}": quant.weight for index in range(depth) for name in linears}
    place(quant, depth, linears, model, stand_in)
    return quant


def matches(rule: Rule, depth: int, linears: Sequence[str]) -> list[str]:
    """Return the linears that a rule matches, by number of the block and name."""
    if rule.match in OUTSIDE:
        return [rule.match] if rule.blocks is None else []
    names = [name for name in linears if fnmatchcase(name, rule.match)]
    return [f"{index}.{name}" for index in rule.block_numbers(depth) for name in names]


def fixed(quant: QuantSettings, depth: int, linears: Sequence[str]) -> dict[str, WeightFormat]:
    """Return the formats of the linears in blocks that rules decide, whatever is shared out among the others."""
    formats: dict[str, WeightFormat] = {}
    for rule in quant.rules:
        formats |= dict.fromkeys(matches(rule, depth, linears), rule.format.like(quant.weight))
    return {name: fmt for name, fmt in formats.items() if name not in OUTSIDE}


def check_widths(quant: QuantSettings, widths: Mapping[str, int]) -> None:
    """Raise ConfigError where a format does not fit a linear that has it, or that may get it.

    Args:
        widths: how many inputs each linear has, by name inside a block.
    """
    if isinstance(quant, PlacedQuant):
        pairs = [(fmt, place.partition(".")[2]) for place, fmt in quant.layers.items() if place not in OUTSIDE]
    else:
        pairs = [(fmt, name) for fmt in quant.in_blocks for name in widths]
    by_format: dict[WeightFormat, dict[str, int]] = {}
    for fmt, name in pairs:
        if name in widths:
            by_format.setdefault(fmt, {})[f"in_features={widths[name]} of {name}"] = widths[name]
    for fmt, places in by_format.items():
        check_format(fmt, places, quant)


def read_plan(path: str) -> dict[str, WeightFormat]:
    """Return the formats by linear that the file of a plan gives.

    Raises:
        InputError: it is not there, or no plan.
    """
    way_out = "give the plan.json of a run with quant.allocate, or a file with the same keys"
    try:
        plan = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        return {str(name): as_format(value) for name, value in plan["layers"].items()}
    except OSError as error:
        raise InputError(f"quant.plan={path}: cannot be read ({error.strerror}); {way_out}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"quant.plan={path}: is no plan ({type(error).__name__}: {error}); {way_out}") from error


def _check_plan(layers: Iterable[str], names: Sequence[str], quant: QuantSettings, model: str) -> None:
    plan_names, model_names = set(layers) - set(OUTSIDE), set(names)
    if plan_names == model_names:
        return
    differences = sorted(plan_names - model_names) or sorted(model_names - plan_names)
    verb = "names" if plan_names - model_names else "lacks"
    raise ConfigError(
        f"quant.plan={quant.plan}: {verb} {differences[0]}, and {model} has {len(model_names)} linears from "
        f"{names[0]} to {names[-1]}; give a plan that was made for this model"
    )


def _nothing(number: int, rule: Rule, depth: int, linears: Sequence[str], model: str) -> str:
    key = f"quant.rules[{number}]"
    if rule.match in OUTSIDE:
        return f"{key}.blocks={rule.blocks}: {rule.match} lies in no block; leave blocks out"
    if any(fnmatchcase(name, rule.match) for name in linears):
        return f"{key}.blocks={rule.blocks}: {model} has blocks 0 to {depth - 1}; name some of them, or null for all"
    return (
        f"{key}.match={rule.match}: matches no linear of {model}; there are {', '.join(linears)}, and {OUTSIDE[1]} and "
        f"{OUTSIDE[0]} outside the blocks"
    )


def _values(quant: QuantSettings) -> dict[str, Any]:
    return {field.name: getattr(quant, field.name) for field in fields(quant)}  # type: ignore[arg-type]
