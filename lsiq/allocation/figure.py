"""A plan as a picture: a cell for each linear, blocks from left to right."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lsiq.allocation.plan import Plan
from lsiq.formats.names import as_format, short_name
from lsiq.runtime.files import replacing
from lsiq.runtime.terminal import say

if TYPE_CHECKING:
    from lsiq.formats.base import WeightFormat

FILE = "plan.svg"


def draw_plan(plan: Plan, depth: int, linears: Sequence[str], folder: Path) -> Path | None:
    """Write `folder/plan.svg`, bits of a code by linear and block; None where matplotlib is not installed.

    Formats are named where several have as many bits.
    """
    if importlib.util.find_spec("matplotlib") is None:
        say("the plan is not drawn: matplotlib is not installed (pip install 'lsiq[analysis]')")
        return None
    from matplotlib.figure import Figure

    formats = [[as_format(plan.layers[f"{index}.{name}"]) for index in range(depth)] for name in linears]
    bits = [[fmt.bits for fmt in row] for row in formats]
    labels = labels_of(fmt for row in formats for fmt in row)
    width = 0.15 + 0.1 * max(2, *map(len, labels.values()))
    figure = Figure(figsize=(1.8 + width * depth, 0.8 + 0.32 * len(linears)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(bits, aspect="auto", cmap="viridis", vmin=2, vmax=max(8, *map(max, bits)))
    for row, shown in enumerate(formats):
        for column, fmt in enumerate(shown):
            color = "white" if fmt.bits < 6 else "black"
            axes.text(column, row, labels[short_name(fmt)], ha="center", va="center", color=color)
    axes.set_yticks(range(len(linears)), [name.rpartition(".")[2] for name in linears])
    axes.set_xticks(range(0, depth, max(1, depth // 12)))
    axes.set_xlabel("block")
    title = "" if plan.average_bits is None else f"{plan.average_bits:.3f} bits per weight"
    axes.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=axes, label="bits of a code")
    with replacing(folder / FILE) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
    return folder / FILE


def labels_of(formats: Iterable[WeightFormat]) -> dict[str, str]:
    """Return what a cell says for each format, by its short name: its bits, or that name where bits do not tell."""
    bits = {short_name(fmt): str(fmt.bits) for fmt in formats}
    return bits if len(set(bits.values())) == len(bits) else {name: name for name in bits}
