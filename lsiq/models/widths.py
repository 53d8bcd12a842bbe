"""Whether a format's groups fit a model, told from its configuration alone. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lsiq.errors import ConfigError

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings


def input_widths(shape: Mapping[str, Any]) -> dict[str, int]:
    """Return the widths that linears of a block read, by what the transformers configuration calls them.

    What the configuration does not say is left out.
    """
    widths = {key: shape[key] for key in ("hidden_size", "intermediate_size", "ffn_dim") if key in shape}
    if shape.get("head_dim") and shape.get("num_attention_heads"):
        widths["num_attention_heads · head_dim"] = shape["num_attention_heads"] * shape["head_dim"]
    return {key: width for key, width in widths.items() if isinstance(width, int) and width > 0}


def check_groups(quant: QuantSettings, shape: Mapping[str, Any], model: str) -> None:
    """Raise ConfigError where groups of weights do not divide every width of the model, with a group that does.

    Where linears have formats of their own, they are checked one by one instead, once they are known.

    Args:
        shape: the transformers configuration as plain data.
        model: its name.
    """
    group = quant.weight.width
    if group is None or quant.weight.bits == 16 or quant.mixed:
        return
    widths = input_widths(shape)
    for key, width in widths.items():
        if width % group:
            field = quant.weight.width_key
            fits = largest_group(list(widths.values()), group)
            raise ConfigError(
                f"quant.weight.{field}={group} does not divide {key}={width} of {model}; use quant.weight.{field}="
                f"{fits}, the largest power of two up to {group} that divides all its linears"
            )


def largest_group(widths: list[int], most: int) -> int:
    """The largest power of two up to `most` that divides all widths."""
    common = math.gcd(*widths)
    fits = common & -common  # the power of two in it
    while fits > most:
        fits //= 2
    return fits
