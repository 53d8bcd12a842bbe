"""Runs side by side: settings, metrics with intervals, and the blocks and linears that got worse."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lsiq.errors import InputError
from lsiq.report.runs import SHOWN, notes, settings_of, value_text
from lsiq.report.significance import compare
from lsiq.results.record import Record
from lsiq.track.panels import Cell, Table

Run = tuple[Record, Path]
# Where and how a run was carried out is no difference of what it is.
_ELSEWHERE = ("paths.", "tracker.", "export.", "force", "trace")


def side_by_side(runs: Sequence[Run], level: float, whole: bool) -> Iterator[Table | str]:
    """Yield tables of two or more runs, and remarks where one cannot be made; intervals are against the first.

    Args:
        whole: all metrics, not only those that are usually looked at.
    """
    letters = string.ascii_uppercase[: len(runs)]
    yield Table(
        "runs", ["", "run", "status"], [[x, r.run_id, r.status] for x, (r, _) in zip(letters, runs, strict=True)]
    )
    yield from _settings([settings_of(record) for record, _ in runs], letters, whole)
    yield _metrics([record for record, _ in runs], letters, whole)
    yield from notes(record for record, _ in runs)
    for letter, (_, folder) in list(zip(letters, runs, strict=True))[1:]:
        try:
            yield _intervals(runs[0][1], folder, letter, level)
        except InputError as error:
            yield f"No interval of {letter} - A: {error}"


def _settings(settings: Sequence[dict[str, Any]], letters: Sequence[str], whole: bool) -> Iterator[Table | str]:
    keys = [
        key
        for key in dict.fromkeys(key for run_settings in settings for key in run_settings)
        if not key.startswith(_ELSEWHERE)
    ]
    differing = [
        key
        for key in keys
        if len({value_text(run_settings[key]) if key in run_settings else None for run_settings in settings}) > 1
    ]
    common = [key for key in differing if all(key in run_settings for run_settings in settings)]
    if not differing:
        yield "The settings are the same."
        return
    rows = [
        [key, *(value_text(run_settings[key]) if key in run_settings else None for run_settings in settings)]
        for key in (differing if whole else common)
    ]
    yield Table("settings that differ", ["setting", *letters], rows)
    if not whole and (hidden := len(differing) - len(common)):
        yield f"{hidden} more settings are not settings of all of them; --all shows them."


def _metrics(records: Sequence[Record], letters: Sequence[str], whole: bool) -> Table:
    keys = dict.fromkeys(key for record in records for key in record.metrics)
    selected = [key for key in keys if whole or any(f"/{key}".split("/")[-2] == name for name in SHOWN)]
    rows: list[list[Cell]] = [[key, *(record.metrics.get(key) for record in records)] for key in selected]
    rows.append(["average bits", *(record.average_bits for record in records)])
    rows.append(["seconds", *(record.seconds.get("total") for record in records)])
    for place in ("host", "device"):
        if any(place in record.peak_bytes for record in records):
            sizes = [record.peak_bytes.get(place) for record in records]
            rows.append([f"peak {place} memory, GiB", *(size and size / 2**30 for size in sizes)])
    return Table("metrics", ["metric", *letters], rows)


def _intervals(first: Path, second: Path, letter: str, level: float) -> Table:
    rows: list[list[Cell]] = []
    for difference in compare(first, second, level):
        interval = f"{difference.low:+.5f} … {difference.high:+.5f}"
        verdict = difference.verdict.replace("B is", f"{letter} is")
        rows.append([difference.key, f"{difference.mean:+.5f}", interval, difference.pairs, difference.blocks, verdict])
    return Table(
        f"{letter} - A", ["measure", "difference", f"{level:.0%} interval", "pairs", "in blocks", "verdict"], rows
    )


def what_got_worse(first: Run, second: Run, most: int) -> Iterator[Table | str]:
    """Yield the blocks and linears whose error is larger in the second run, the worst `most` of each."""
    a, b = ({(row["index"],): row["error"] for row in record.blocks} for record, _ in (first, second))
    yield from _worse("blocks", ["block"], a, b, most)
    a, b = (_linears(folder) for _, folder in (first, second))
    yield from _worse("linears", ["block", "linear"], a, b, most)


def _worse(
    name: str, columns: list[str], first: dict[Any, Any], second: dict[Any, Any], most: int
) -> Iterator[Table | str]:
    """Yield those keys of `second` whose error exceeds that of `first`, by their ratio."""
    common = [key for key in first if first[key] and second.get(key) is not None]
    if not common:
        yield f"No errors of {name} that both runs have measured."
        return
    worse = sorted((key for key in common if second[key] > first[key]), key=lambda key: -second[key] / first[key])
    title = f"{len(worse)} of {len(common)} {name} got worse" + (f", the worst {most}" if len(worse) > most else "")
    rows: list[list[Cell]] = [[*key, first[key], second[key], second[key] / first[key]] for key in worse[:most]]
    yield Table(title, [*columns, "error A", "error B", "B / A"], rows) if rows else f"{title}."


def _linears(folder: Path) -> dict[tuple[int, str], float]:
    """The output error of each linear, by block and name; empty where the run left no trajectory."""
    import pandas

    try:
        rows = pandas.read_parquet(folder / "trajectory.parquet", columns=["block", "linear", "epoch", "error_after"])
    except (OSError, ValueError):  # an earlier version's, or only the record was kept
        return {}
    last = rows[(rows["epoch"] < 0) & rows["error_after"].notna()]
    return {
        (int(b), str(name)): float(e)
        for b, name, e in zip(last["block"], last["linear"], last["error_after"], strict=True)
    }
