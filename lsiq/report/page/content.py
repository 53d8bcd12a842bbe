"""What a page is made of: sections of charts, tables and remarks, before they are HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from lsiq.track.panels import Table


@dataclass(frozen=True)
class Chart:
    """A drawing of plotly.

    Attributes:
        alt: what it shows in a sentence or two, for whoever does not see it.
        traces, layout: plotly's; colours and fonts are added by the page, which knows whether it is light or dark.
        height: in CSS pixels.
    """

    title: str
    alt: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    height: int = 300
    kind: ClassVar[str] = "chart"

    @property
    def spec(self) -> dict[str, Any]:
        """Traces and layout as plain data; text is escaped, for plotly reads markup in it."""
        return {"data": _plain(self.traces), "layout": _plain(self.layout)}


@dataclass(frozen=True)
class Sheet:
    """A table whose rows a reader can sort.

    Attributes:
        filtered: whether words can be typed that leave only the rows with them.
        names: how many columns name a row, and stay in view where a wide screen's reader moves to the right.
    """

    table: Table
    caption: str
    filtered: bool = False
    names: int = 1
    kind: ClassVar[str] = "sheet"


@dataclass(frozen=True)
class Remark:
    """A line of text."""

    text: str
    kind: ClassVar[str] = "remark"


@dataclass(frozen=True)
class Heading:
    """A title inside a section."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Grid:
    """Charts beside each other where the page is wide enough."""

    charts: Sequence[Chart]
    kind: ClassVar[str] = "grid"

    @property
    def columns(self) -> int:
        """How many stand beside each other on a wide screen, so that rows are full."""
        return {1: 1, 2: 2, 4: 2}.get(len(self.charts), 3)


@dataclass(frozen=True)
class Folded:
    """What opens at a click."""

    title: str
    items: Sequence[Item]
    kind: ClassVar[str] = "folded"


@dataclass(frozen=True)
class Explorer:
    """Points of many runs, of which the page draws those of one model and one measure with their Pareto front.

    Attributes:
        measures: by name, the values of all runs.
        models, methods, labels, bits: of all runs.
    """

    models: Sequence[str]
    methods: Sequence[str]
    labels: Sequence[str]
    bits: Sequence[float | None]
    measures: Mapping[str, Sequence[float | None]]
    kind: ClassVar[str] = "explorer"

    @property
    def spec(self) -> dict[str, Any]:
        measures = {html.escape(name): values for name, values in self.measures.items()}
        columns = {"models": self.models, "methods": self.methods, "labels": self.labels, "bits": self.bits}
        return _plain({**columns, "measures": measures})

    @property
    def distinct(self) -> list[str]:
        """The methods by name."""
        return sorted(set(self.methods))

    @property
    def choices(self) -> list[str]:
        """The models, that with the most runs first."""
        return sorted(dict.fromkeys(self.models), key=lambda model: -list(self.models).count(model))


Item: TypeAlias = Chart | Sheet | Remark | Heading | Grid | Folded | Explorer


@dataclass(frozen=True)
class Section:
    """A part of the page with a title, which its table of contents names."""

    title: str
    items: Sequence[Item]


@dataclass(frozen=True)
class Figure:
    """A number that stands at the top of the page."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        lead: lines under the title.
        figures: the numbers to see first.
        omitted: what the page would show and why it cannot, a line each.
    """

    title: str
    lead: Sequence[str]
    figures: Sequence[Figure]
    sections: Sequence[Section]
    omitted: Sequence[str]


def short(value: float) -> float | None:
    """A number with five digits, which is what a chart or a cell can show; None for what is no number."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _plain(node: Any, key: str = "") -> Any:
    if isinstance(node, Mapping):
        return {name: _plain(value, name) for name, value in node.items()}
    if isinstance(node, str):
        return node if key == "hovertemplate" else html.escape(node, quote=False)
    if isinstance(node, Sequence):
        return [_plain(value, key) for value in node]
    if isinstance(node, float):
        return short(node)
    return node
