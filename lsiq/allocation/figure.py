"""A plan as a picture: a cell for each linear, blocks from left to right."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from lsiq.allocation.plan import Plan
from lsiq.formats.names import as_format
from lsiq.runtime.files import replacing
from lsiq.runtime.terminal import say

FILE = "plan.svg"


def draw_plan(plan: Plan, depth: int, linears: Sequence[str], folder: Path) -> Path | None:
    """Write `folder/plan.svg`, bits per weight by linear and block; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        say("the plan is not drawn: matplotlib is not installed (pip install 'lsiq[analysis]')")
        return None
    from matplotlib.figure import Figure

    bits = [[as_format(plan.layers[f"{index}.{name}"]).bits for index in range(depth)] for name in linears]
    figure = Figure(figsize=(1.8 + 0.35 * depth, 0.8 + 0.32 * len(linears)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(bits, aspect="auto", cmap="viridis", vmin=2, vmax=max(8, *map(max, bits)))
    for row, numbers in enumerate(bits):
        for column, number in enumerate(numbers):
            axes.text(column, row, str(number), ha="center", va="center", color="white" if number < 6 else "black")
    axes.set_yticks(range(len(linears)), [name.rpartition(".")[2] for name in linears])
    axes.set_xticks(range(0, depth, max(1, depth // 12)))
    axes.set_xlabel("block")
    title = "" if plan.average_bits is None else f"{plan.average_bits:.3f} bits per weight"
    axes.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=axes, label="bits of a code")
    with replacing(folder / FILE) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
    return folder / FILE
