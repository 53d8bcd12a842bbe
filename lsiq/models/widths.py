"""Whether a format's groups fit a model, told from its configuration alone. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lsiq.formats.fit import check_format

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

    Where linears have formats of their own, they are checked one by one instead, once they are known. Embeddings and
    head are as wide as the model, or as OPT's projection to and from it.

    Args:
        shape: the transformers configuration as plain data.
        model: its name.
    """
    if not quant.mixed:
        places = {f"{key}={width} of {model}": width for key, width in input_widths(shape).items()}
        check_format(quant.weight, places, quant)
    key = "word_embed_proj_dim" if "word_embed_proj_dim" in shape else "hidden_size"
    if isinstance(width := shape.get(key), int):
        for name, fmt in quant.outside().items():
            check_format(fmt, {f"{key}={width} of {model} ({name})": width})
