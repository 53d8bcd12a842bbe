"""The sections that tell of one run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lsiq.report.page.charts import columns, distribution, formats, heat_map, lines, short_names
from lsiq.report.page.content import Chart, Figure, Folded, Grid, Item, Remark, Section, Sheet
from lsiq.report.page.quality import quality
from lsiq.report.runs import settings_of, value_text
from lsiq.results.record import Record
from lsiq.track.panels import Histograms, Lines, Table, cell_text, spread
from lsiq.track.run_panels import LINES, panel_layers, record_panels, trajectory_panels

Row = Mapping[str, Any]
# Linears with charts of their own, evenly spread over the network.
OWN = 6
_ERRORS = ("error_before", "error_after")


def story(record: Record, folder: Path, level: float) -> tuple[list[Section], list[str]]:
    """Return the sections of one run, and what is left out of them and why."""
    rows = trajectory(folder)
    last = [row for row in rows if row["epoch"] < 0]
    epochs = [row for row in rows if row["epoch"] >= 0]
    panels = list(trajectory_panels(rows, OWN)) if rows else []
    omitted: list[str] = []
    sections = [
        Section("Quality", quality(record, folder, level) or [Remark("Nothing was measured.")]),
        Section("Formats by linear", _plan(folder)),
        Section("Errors and flipped codes", _layers(record, last, omitted)),
        Section("Weights and codes", _distributions(panels)),
        Section("Learning", _learning(panels)),
        Section("Singular values", _singular(epochs, last)),
        Section("Time and memory", _costs(record, omitted)),
        Section("Settings and origin", _settings(record)),
    ]
    if not sections[1].items:
        omitted.append("Formats by linear: the run has no plan of them; all have one format.")
    if not rows:
        omitted.append(
            "Errors by linear, weights and learning: the run's folder holds no trajectory.parquet that can be read."
        )
    elif not epochs:
        omitted.append(f"Learning and singular values: {record.method} trains nothing.")
    elif not any("increments" in row and row["increments"] is not None for row in epochs):
        omitted.append(f"Singular values: {record.method} has no increments of them.")
    return [section for section in sections if section.items], omitted


def figures(record: Record) -> list[Figure]:
    """Return the numbers that a reader looks for first."""
    numbers = []
    for key in (key for key in record.metrics if key.startswith("excess/")):
        rtn = record.metrics.get(f"rtn/{key}")
        beside = "" if rtn is None else f"rounding to nearest: {rtn:.4f}"
        numbers.append(Figure(f"excess loss, {key.partition('/')[2]}", f"{record.metrics[key]:.4f}", beside))
    for key in (key for key in record.metrics if key.startswith("ppl/")):
        plain = record.metrics.get(f"float/{key}")
        beside = "" if plain is None else f"float: {plain:.2f}"
        numbers.append(Figure(f"perplexity, {key.partition('/')[2]}", f"{record.metrics[key]:.2f}", beside))
    if record.average_bits is not None:
        numbers.append(Figure("bits per weight", f"{record.average_bits:.3f}", "scales and all that repairs included"))
    if "total" in record.seconds:
        numbers.append(Figure("time", _duration(record.seconds["total"])))
    if record.peak_bytes:
        places = ", ".join(record.peak_bytes)
        numbers.append(Figure("peak memory", f"{max(record.peak_bytes.values()) / 2**30:.2f} GiB", places))
    return numbers


def trajectory(folder: Path) -> list[Row]:
    """Return the rows of a run's trajectory; none where it left none that can be read."""
    import pandas

    try:
        frame = pandas.read_parquet(folder / "trajectory.parquet")
    except (OSError, ValueError):  # an earlier version's, or only the record was kept
        return []
    rows: list[Row] = frame.to_dict("records")  # type: ignore[assignment]
    return [{key: _cell(value) for key, value in row.items()} for row in rows]


def _cell(value: Any) -> Any:
    """None for what a row has no value of; a column of lists holds None there already."""
    return None if isinstance(value, float) and value != value else value


def _layers(record: Record, last: Sequence[Row], omitted: list[str]) -> list[Item]:
    items: list[Item] = []
    errors = {name: _by_layer(last, name) for name in _ERRORS}
    reach = [value for name in _ERRORS for value in errors[name].values() if value]
    titles = {
        "error_before": "Output error, rounded to nearest",
        "error_after": f"Output error, {record.method}",
    }
    maps = [heat_map(titles[name], errors[name], "error", reach) for name in _ERRORS if any(errors[name].values())]
    flips = _by_layer(last, "flip_rate")
    if any(value is not None for value in flips.values()):
        rates = [value for value in flips.values() if value is not None]
        maps.append(heat_map("Flipped codes", flips, "share", rates))
    if maps:
        items.append(Grid(maps))
        items.append(
            Remark(
                "Output error: mean square of what rounding adds to a linear's output over the mean square of the "
                "output. A flipped code differs from rounding to nearest."
            )
        )
    if last and not any(value for value in errors["error_before"].values()):
        omitted.append("Errors by linear: the run had no calibration data to measure them on.")
    blocks = [row for row in record.blocks if row["error"] is not None]
    if blocks:
        panel = Lines("", "block", [row["index"] for row in blocks], {"error": [row["error"] for row in blocks]})
        items.append(lines(panel, "Error of each block's output", "relative squared error", logarithmic=True))
    if last:
        names = ["block", "linear", *_ERRORS, "flip_rate"]
        cells = [[row["block"], row["linear"], *(row[name] for name in names[2:])] for row in last]
        table = Table("layers", ["block", "linear", "error, rounded to nearest", "error", "flipped codes"], cells)
        items.append(Folded(f"All {len(last)} linears", [Sheet(table, "Errors and flips by linear", filtered=True)]))
    for table in record_panels(record):
        if table.name == "tables/blocks":
            items.append(Folded(f"All {len(table.rows)} blocks", [Sheet(table, "What each block came to")]))
    return items


def _plan(folder: Path) -> list[Item]:
    """The format of each linear and what it was chosen by, where the run has a plan beside its record."""
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    layers: dict[tuple[int, str], str] = {}
    for key, value in plan["layers"].items():
        block, _, name = key.partition(".")
        if block.isdigit():  # others lie outside the blocks, such as the head
            layers[int(block), name] = value if isinstance(value, str) else json.dumps(value)
    bits = plan.get("average_bits")
    items: list[Item] = [formats("Format of each linear" + (f", {bits:.4g} bits on average" if bits else ""), layers)]
    sensitivities = plan.get("sensitivities") or {}
    if sensitivities:
        choices = list(dict.fromkeys(choice for row in sensitivities.values() for choice in row))
        cells = [[unit, *(row.get(choice) for choice in choices)] for unit, row in sensitivities.items()]
        table = Table("sensitivities", ["linears", *choices], cells)
        caption = "What each choice costs: divergence at the model's end, nats per token"
        items.append(Folded("Sensitivities", [Sheet(table, caption, filtered=True)]))
    return items


def _by_layer(last: Sequence[Row], column: str) -> dict[tuple[int, str], float | None]:
    return {(int(row["block"]), row["linear"]): row[column] for row in last}


def _distributions(panels: Sequence[Any]) -> list[Item]:
    items: list[Item] = []
    for section, unit, text in (
        ("weights", "weight", "Weights before and after"),
        ("codes", "code", "Codes, rounded to nearest and in the end"),
    ):
        histograms = [
            panel for panel in panels if isinstance(panel, Histograms) and panel.name.startswith(f"{section}/")
        ]
        charts = [distribution(panel, panel.name.partition("/")[2], unit) for panel in histograms]
        if charts:
            items += [Remark(f"{text}, of {len(charts)} linears spread over the network."), Grid(charts)]
    return items


def _learning(panels: Sequence[Any]) -> list[Item]:
    labels = {"loss": "loss", "gradient norm": "norm"}
    charts = [
        lines(panel, title[0].upper() + title[1:], labels[title], logarithmic=True)
        for panel in panels
        if isinstance(panel, Lines) and panel.name.startswith("learning/")
        for title in [panel.name.partition("/")[2]]
    ]
    return [Grid(charts)] if charts else []


def _singular(epochs: Sequence[Row], last: Sequence[Row]) -> list[Item]:
    """What was added to singular values, for the linears that have charts of their own."""
    charts: list[Chart] = []
    for layer in panel_layers(last, OWN):
        rows = [row for row in epochs if (row["block"], row["linear"]) == (layer["block"], layer["linear"])]
        rows = [row for row in rows if row.get("increments") is not None]
        if not rows:
            continue
        places = spread(len(rows[0]["increments"]), LINES)
        x = [row["epoch"] for row in rows]
        values = rows[0]["values"]
        names = {place: f"{place + 1} of {len(values)}: {values[place]:.3g}" for place in places}
        series = {name: [row["increments"][place] for row in rows] for place, name in names.items()}
        panel = Lines("", "epoch", x, series)
        name = f"block {layer['block']} {short_names([layer['linear']])[0]}"
        charts.append(lines(panel, name, "increment"))
    if not charts:
        return []
    text = (
        "What was added to some singular values, sampled from the largest to the smallest, whose values stand beside."
    )
    return [Remark(text), Grid(charts)]


def _costs(record: Record, omitted: list[str]) -> list[Item]:
    stages = {name: value for name, value in record.seconds.items() if value > 0.005 and name != "total"}
    charts = [columns("Time by stage", stages, "seconds")] if stages else []
    peaks = [(stage, place, size) for stage, sizes in record.stage_peaks.items() for place, size in sizes.items()]
    for place, group in itertools.groupby(sorted(peaks, key=lambda row: row[1]), lambda row: row[1]):
        sizes = {stage: size / 2**30 for stage, _, size in group}
        charts.append(columns(f"Peak {place} memory until the end of each stage", sizes, "GiB"))
    if not peaks:
        omitted.append("Memory by stage: the run was made by a version that noted only the peak of all.")
    if record.blocks:
        panel = Lines(
            "", "block", [r["index"] for r in record.blocks], {"seconds": [r["seconds"] for r in record.blocks]}
        )
        charts.append(lines(panel, "Time of each block", "seconds"))
    items: list[Item] = [Grid(charts)] if charts else []
    table = next(panel for panel in record_panels(record) if panel.name == "tables/time and memory")
    rows = [*table.rows, *_flat(record.cost, "")]
    return [
        *items,
        Folded("All costs", [Sheet(Table("costs", ["what", "value"], rows), "Time, memory, bits, products")]),
    ]


def _flat(node: Any, key: str) -> list[list[Any]]:
    if isinstance(node, Mapping):
        return [row for name, value in node.items() for row in _flat(value, f"{key} {name}".strip().replace("_", " "))]
    return [] if node is None or key == "average bits" else [[key, node]]


def _settings(record: Record) -> list[Item]:
    settings = [[key, value_text(value)] for key, value in settings_of(record).items()]
    versions = ", ".join(f"{name} {value}" for name, value in record.versions.items())
    machine = ", ".join(f"{name} {value}" for name, value in record.machine.items())
    clean = {True: "", False: " with changes", None: ""}[record.clean]
    origin = [
        ["run", record.run_id],
        ["status", record.status],
        ["started (UTC)", record.created],
        ["command", record.command],
        ["commit", f"{record.commit or 'unknown'}{clean}"],
        ["machine", machine],
        ["versions", versions],
        ["calibration", ", ".join(f"{name} {value}" for name, value in record.calibration.items())],
        ["training precision", ", ".join(record.training_precision.values())],
        *([name, value] for name, value in record.inputs.items()),
    ]
    return [
        Sheet(Table("origin", ["what", "value"], [row for row in origin if row[1]]), "Where the run comes from"),
        Folded(
            f"All {len(settings)} settings",
            [Sheet(Table("settings", ["setting", "value"], settings), "Settings by key", filtered=True)],
        ),
    ]


def _duration(seconds: float) -> str:
    minutes, remainder = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {remainder} s" if minutes else f"{cell_text(round(seconds, 1))} s"
