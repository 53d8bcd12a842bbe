"""Charts of what runs leave, as plotly takes them."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lsiq.report.page.content import Chart
from lsiq.track.panels import Histograms, Lines, cell_text

# Columns of codes up to this many stand beside each other; more are drawn as outlines.
_BARS = 16


def lines(panel: Lines, title: str, ylabel: str, logarithmic: bool = False) -> Chart:
    """A chart of a family of lines."""
    marks = "lines+markers" if len(panel.x) <= 40 else "lines"
    traces = [
        {"type": "scatter", "mode": marks, "name": name, "x": list(panel.x), "y": list(values)}
        for name, values in panel.lines.items()
    ]
    known = [value for values in panel.lines.values() for value in values if value is not None]
    logarithmic = logarithmic and bool(known) and min(known) > 0
    layout: dict[str, Any] = {"xaxis": {"title": {"text": panel.axis}}, "yaxis": {"title": {"text": ylabel}}}
    if logarithmic:
        layout["yaxis"] |= {"type": "log", "tickformat": "~g"}
    if all(float(x).is_integer() for x in panel.x) and len(panel.x) <= 12:
        layout["xaxis"] |= {"tickvals": list(panel.x)}
    span = f"{panel.x[0]:g} to {panel.x[-1]:g}" if len(panel.x) > 1 else f"{panel.x[0]:g} alone"
    alt = f"Over {panel.axis} {span}, {_ends(panel)}"
    more = f"; {len(traces)} lines in all" if len(traces) > 2 else ""
    return Chart(title, f"{alt}{more}.", traces, layout, 280 + 18 * -(-len(traces) // 2))


def _ends(panel: Lines) -> str:
    """Where the first and last line begin and end, in words."""
    alt = []
    for name in dict.fromkeys([next(iter(panel.lines)), list(panel.lines)[-1]]):
        values = [value for value in panel.lines[name] if value is not None]
        if values:
            first, last = (cell_text(float(value)) for value in (values[0], values[-1]))
            alt.append(f"{name} goes from {first} to {last}" if len(values) > 1 else f"{name} is {first}")
    return ", ".join(alt) or "no values"


def distribution(panel: Histograms, title: str, unit: str) -> Chart:
    """Counts before and after: columns where there are few, outlines where there are many."""
    middles = [(low + high) / 2 for low, high in itertools.pairwise(panel.edges)]
    columns = len(middles) <= _BARS
    traces: list[dict[str, Any]] = []
    for name, counts in (("before", panel.before), ("after", panel.after)):
        trace: dict[str, Any] = {"name": name, "x": middles, "y": [int(count) for count in counts]}
        if columns:
            trace |= {"type": "bar"}
        else:
            fill = {"fill": "tozeroy"} if name == "before" else {}
            trace |= {"type": "scatter", "mode": "lines", "line": {"shape": "hvh"}, **fill}
        traces.append(trace | {"hovertemplate": f"{unit} %{{x:.4g}}<br>%{{y}} weights"})
    layout: dict[str, Any] = {"xaxis": {"title": {"text": unit}}, "yaxis": {"title": {"text": "weights"}}}
    if columns:
        layout["xaxis"] |= {"tickvals": middles} if len(middles) <= 8 else {}
    used = [sum(1 for count in counts if count) for counts in (panel.before, panel.after)]
    alt = f"{used[0]} of {len(middles)} bins are filled before, {used[1]} after; {sum(panel.before):.0f} weights."
    return Chart(title, alt, traces, layout, 260)


def heat_map(title: str, values: Mapping[tuple[int, str], float | None], unit: str, reach: Sequence[float]) -> Chart:
    """A colour for each block and linear.

    Args:
        values: by block and linear.
        unit: what they are: `error` on a logarithmic scale, `share`, or `ratio` around 1 on a logarithmic scale.
        reach: all values that share the scale.
    """
    blocks, names = sorted({block for block, _ in values}), list(dict.fromkeys(name for _, name in values))
    raw = [[values.get((block, name)) for name in names] for block in blocks]
    logarithmic = unit in ("error", "ratio")
    z = [[_log(value) if logarithmic else value for value in row] for row in raw]
    ends = [_log(value) if logarithmic else value for value in reach]
    known = [value for value in ends if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if unit == "ratio":
        high = max(abs(low), abs(high), 0.05)
        low = -high
    elif unit == "share":
        low = 0.0
    number = "%{customdata:.2%}" if unit == "share" else "%{customdata:.4g}"
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": short_names(names),
        "y": blocks,
        "z": z,
        "customdata": raw,
        "zmin": low,
        "zmax": high if high > low else low + 1e-9,
        "xgap": 1,
        "ygap": 1,
        "colorscale": "diverging" if unit == "ratio" else "sequential",
        "colorbar": _bar(low, high, unit),
        "hovertemplate": f"block %{{y}}, %{{x}}<br>{number}<extra></extra>",
    }
    layout: dict[str, Any] = {
        "xaxis": {"tickangle": -45, "showgrid": False},
        "yaxis": {"title": {"text": "block"}, "autorange": "reversed", "showgrid": False},
    }
    if len(blocks) <= 12:
        layout["yaxis"] |= {"tickvals": blocks}
    return Chart(title, _range_text(values, unit), [trace], layout, min(900, 170 + 18 * max(len(blocks), 6)))


def _bar(low: float, high: float, unit: str) -> dict[str, Any]:
    """A colour bar whose ticks are the values themselves."""
    ticks = [low + (high - low) * place / 4 for place in range(5)]
    if unit == "share":
        return {"tickvals": ticks, "ticktext": [f"{tick:.1%}" for tick in ticks], "thickness": 12}
    return {"tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks], "thickness": 12}


def _range_text(values: Mapping[tuple[int, str], float | None], unit: str) -> str:
    known = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
    if not known:
        return "No values."
    least, most = min(known, key=lambda key: known[key]), max(known, key=lambda key: known[key])
    number = "{:.2%}" if unit == "share" else "{:.3g}"
    ends = [f"{number.format(known[key])} in block {key[0]}, {key[1]}" for key in (least, most)]
    return f"From {ends[0]}, to {ends[1]}."


def _log(value: float | None) -> float | None:
    return None if value is None or not value > 0 else math.log10(value)


def short_names(names: Sequence[str]) -> list[str]:
    """Names of linears without the module they lie in, where that leaves them different."""
    last = [name.rpartition(".")[2] for name in names]
    return last if len(set(last)) == len(last) else list(names)


def formats(title: str, layers: Mapping[tuple[int, str], str]) -> Chart:
    """A field for each block and linear with the name of its number format, a colour for each format.

    Args:
        layers: by block and linear, the name of a format, such as w3g128.
    """
    blocks, names = sorted({block for block, _ in layers}), list(dict.fromkeys(name for _, name in layers))
    kinds = sorted(set(layers.values()), key=lambda kind: [int(digits) for digits in re.findall(r"\d+", kind)])
    text = [[layers.get((block, name), "") for name in names] for block in blocks]
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": short_names(names),
        "y": blocks,
        "z": [[kinds.index(kind) if kind else None for kind in row] for row in text],
        "text": text,
        "texttemplate": "%{text}",
        "zmin": -0.5,
        "zmax": len(kinds) - 0.5,
        "xgap": 1,
        "ygap": 1,
        "showscale": False,
        "colorscale": "formats",
        "hovertemplate": "block %{y}, %{x}<br>%{text}<extra></extra>",
    }
    layout = {
        "xaxis": {"tickangle": -45, "showgrid": False},
        "yaxis": {"title": {"text": "block"}, "autorange": "reversed", "showgrid": False},
    }
    counts = Counter(layers.values())
    alt = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
    return Chart(title, f"Linears by format: {alt}.", [trace], layout, min(900, 170 + 22 * max(len(blocks), 6)))


def columns(title: str, values: Mapping[str, float], unit: str, sort: bool = False) -> Chart:
    """Horizontal columns, a name each; the largest first if sorted."""
    names = sorted(values, key=lambda name: -values[name]) if sort else list(values)
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": [values[name] for name in names],
        "text": [cell_text(float(values[name])) for name in names],
        "textposition": "auto",
        "hovertemplate": f"%{{y}}: %{{x:.4g}} {unit}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": unit}, "rangemode": "tozero"},
        "yaxis": rows_axis(len(names)),
        "showlegend": False,
    }
    most = max(values, key=lambda name: values[name])
    alt = f"Most in {most}: {cell_text(float(values[most]))} {unit}."
    return Chart(title, alt, [trace], layout, 110 + 30 * len(names))


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]], unit: str, zero: bool = True) -> Chart:
    """Points with intervals, one line of the chart each.

    Args:
        rows: name, value, low and high end.
        zero: whether the axis shows 0.
    """
    trace = {
        "type": "scatter",
        "mode": "markers",
        "marker": {"size": 9},
        "y": [name for name, *_ in rows],
        "x": [value for _, value, _, _ in rows],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [high - value for _, value, _, high in rows],
            "arrayminus": [value - low for _, value, low, _ in rows],
            "thickness": 2,
        },
        "customdata": [[low, high] for _, _, low, high in rows],
        "hovertemplate": "%{y}<br>%{x:.4f}, interval %{customdata[0]:.4f} … %{customdata[1]:.4f}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": unit}, "zeroline": True, **({"rangemode": "tozero"} if zero else {})},
        "yaxis": rows_axis(len(rows)),
        "showlegend": False,
    }
    alt = "; ".join(f"{name}: {value:.4f} ({low:.4f} to {high:.4f})" for name, value, low, high in rows[:6])
    return Chart(title, f"{alt}{'; …' if len(rows) > 6 else ''}.", [trace], layout, 120 + 30 * len(rows))


def rows_axis(count: int) -> dict[str, Any]:
    """A vertical axis of names, the first one on top."""
    return {"type": "category", "range": [count - 0.5, -0.5]}
