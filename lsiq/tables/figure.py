"""Figures in one style, shown as SVG and PNG and written the same way each time."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette, told apart by most colour-blind readers; yellow is left out, too faint on white.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK = "#0072B2", "#D55E00", "#CC79A7"
# A method looks the same in every figure: colour by family, marker within it.
LOOKS: dict[str, tuple[str, str]] = {
    "rtn": (BLACK, "s"),
    "gptq": (ORANGE, "o"),
    "awq": (ORANGE, "^"),
    "smoothquant": (ORANGE, "v"),
    "rotate": (PINK, "o"),
    "duquant": (PINK, "^"),
    "lqer": (GREEN, "o"),
    "l2qer": (GREEN, "^"),
    "qera-approx": (GREEN, "v"),
    "qera-exact": (GREEN, "D"),
    "lwc": (SKY, "o"),
    "omniquant": (SKY, "^"),
    "lsi-only": (BLUE, "v"),
    "lsi-random": (BLUE, "s"),
    "lsi-diagonal": (BLUE, "^"),
    "lsi-corner": (BLUE, "o"),
    "lsi": (BLUE, "P"),
    "sde": (BLUE, "D"),
    "autoround": (RED, "o"),
    "dense": (RED, "^"),
    "best-blocks": (RED, "v"),
    "best": (RED, "*"),
}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "svg.hashsalt": "lsiq",  # ids in the file follow from its content
}
mpl.rcParams.update(STYLE)
WIDTH = 7.2  # inches: the width of a text column on a page


@dataclass(frozen=True)
class Figure:
    """A drawing with a name and a caption; shows itself in a notebook."""

    name: str
    caption: str
    canvas: Canvas

    def svg(self) -> str:
        """Return the drawing as SVG, equal for equal data."""
        buffer = io.StringIO()
        self.canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    def png(self) -> bytes:
        """Return the drawing as PNG, 150 dots per inch."""
        buffer = io.BytesIO()
        self.canvas.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        return buffer.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        png = base64.b64encode(self.png()).decode()
        return {"image/svg+xml": self.svg(), "image/png": png}, {"lsiq": {"name": self.name, "caption": self.caption}}


def panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Canvas, list[Axes]]:
    """Return a canvas with a grid of axes, row by row; `height` is that of a row in inches."""
    canvas = Canvas(figsize=(WIDTH, height * rows), layout="constrained")
    return canvas, list(canvas.subplots(rows, columns, squeeze=False, **options).flat)


def look(method: str) -> tuple[str, str]:
    """The colour and marker of a method; one with a `then` looks like the method itself."""
    return LOOKS.get(method.partition("+")[0], (BLACK, "x"))


def looks(method: str, hollow: bool = False) -> Any:
    """How a method's single points are drawn: not joined, `hollow` where it had more text than the others."""
    colour, marker = look(method)
    return {"color": colour, "marker": marker, "linestyle": "none"} | ({"markerfacecolor": "white"} if hollow else {})


def on_lower_edge(axis: Axes, x: float, **options: Any) -> None:
    """Draw a point that a logarithmic axis cannot hold, because it is not above zero, on the axis itself."""
    axis.plot(x, 0, transform=axis.get_xaxis_transform(), clip_on=False, zorder=3, **options)
    if not axis.texts:
        place: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "top"}
        axis.annotate("≤ 0", (0, 0), (-3, 0), **place)


def plain_numbers(axis: Axes, which: Literal["x", "y"] = "y") -> None:
    """Make an axis logarithmic, its ticks written as 0.05 and not as a power of ten; after all has been drawn."""
    getattr(axis, f"set_{which}scale")("log")
    ticks = getattr(axis, f"{which}axis")
    low, high = ticks.get_view_interval()
    ticks.set_major_locator(
        LogLocator(10, subs=(1.0, 2.0, 5.0) if high > 8 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0))
    )
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def legend_below(canvas: Canvas, axes: Sequence[Axes], order: Sequence[str] = (), columns: int | None = None) -> None:
    """Put one legend for all axes below them, each entry once; in a given order and so many columns, if any."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if order:
        entries = {label: entries[label] for label in order if label in entries}
    columns = columns or (len(entries) if len(entries) < 8 else 6)
    if entries:
        canvas.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns)


def empty(axis: Axes, command: str) -> None:
    """Say in place of curves that there is nothing to show, and what would measure it."""
    words = "\n".join(["not measured yet", *textwrap.wrap(command, 48)])
    axis.text(0.5, 0.5, words, ha="center", va="center", transform=axis.transAxes, fontsize=7)
    # Not by setting ticks: those are shared with the axes beside.
    axis.tick_params(which="both", left=False, labelleft=False, bottom=False, labelbottom=False)
    axis.grid(False)
