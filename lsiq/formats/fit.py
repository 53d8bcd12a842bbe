"""Whether groups divide the widths that they are laid on, and which group does where they do not. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lsiq.errors import ConfigError
from lsiq.formats.names import is_format_name, quant_file, short_name

NARROW = 16  # scales of narrower groups cost about as much as the weights

if TYPE_CHECKING:
    from lsiq.formats.base import WeightFormat
    from lsiq.formats.quant import QuantSettings


def check_format(fmt: WeightFormat, places: Mapping[str, int], quant: QuantSettings | None = None) -> None:
    """Raise ConfigError, with the group to use instead, where the groups of a weight format do not divide all widths.

    Args:
        places: the widths by what a message calls them, such as `in_features=576 of self_attn.q_proj`.
        quant: the settings that ask for the format, as their `weight`, by a rule or by other ways; None where a rule is
            known to.
    """
    if fmt.bits == 16:
        return
    key = f"quant.weight.{fmt.width_key}"
    named = quant is None or fmt != quant.weight or quant.plan is not None or quant.allocate.active

    def instead(width: int) -> str:
        narrower = replace(fmt, **{fmt.width_key: width})  # type: ignore[type-var]
        if quant is None or named:
            name = short_name(narrower)
            return name if is_format_name(name) else f"a format with {fmt.width_key}={width}"
        name = replace(quant, weight=narrower).name
        return f"{key}={width}" if quant_file(name) is None else f"{key}={width} (quant={name})"

    asked = f"{key}={fmt.width}"
    if named:
        asked = f"{'quant.rules' if quant is None else f'quant={quant.name}'}: the {fmt.width_key} of {short_name(fmt)}"
    check_divides(asked, fmt.width, places, instead, None if named or fmt.width_key != "group" else f"{key}=null")


def check_divides(
    asked: str,
    width: int | None,
    places: Mapping[str, int],
    instead: Callable[[int], str],
    undivided: str | None = None,
) -> None:
    """Raise ConfigError where groups of `width` do not divide all widths, with the largest power of two that does.

    Args:
        asked: what a message calls the groups.
        width: None for groups as wide as what they are laid on.
        places: the widths by what a message calls them.
        instead: says how groups of another width are asked for.
        undivided: the same of groups as wide as what they are laid on; None where there are none.
    """
    for place, inputs in places.items():
        if width is not None and inputs % width:
            fits = largest_group(places.values(), width)
            way_out = f"use {instead(fits)}, the largest power of two up to {width} that divides all widths"
            if fits < NARROW and undivided is not None:
                way_out += f", or {undivided} for one group in all"
            raise ConfigError(f"{asked} does not divide {place}; {way_out}")


def largest_group(widths: Iterable[int], most: int) -> int:
    """Return the largest power of two up to `most` that divides all widths."""
    common = math.gcd(*widths)
    fits = common & -common  # the power of two in it
    while fits > most:
        fits //= 2
    return fits
