"""The tables that a run and a dry run end with on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsiq.runtime.terminal import OUT, gib, is_brief, new_table, number

if TYPE_CHECKING:
    from lsiq.results.record import Record


@dataclass(frozen=True)
class PlannedStage:
    """What one stage of the run takes.

    Attributes:
        peaks: bytes, by place: host, device.
    """

    name: str
    seconds: float
    peaks: Mapping[str, int]


def show_record(record: Record) -> None:
    """Print the tables a run ends with: perplexities with bits, seconds and peak memory, and accuracies.

    One line of it after `be_brief`.
    """
    model, method = record.model, record.method
    title = f"{model}  {record.setting}  {method}  seed {record.seed}"
    if is_brief():
        excess = "".join(
            f"  {key} {number(record.metrics[key])}" for key in record.metrics if key.startswith("excess/")
        )
        OUT.print(f"{title}{excess}  {record.seconds['total']:.0f} s", soft_wrap=True)
        return
    prefixes = {"float/": "float", "rtn/": "rtn", "": method}
    if not any(key.startswith("rtn/") for key in record.metrics):
        del prefixes["rtn/"]
    keys = [key.removeprefix("ppl/") for key in record.metrics if key.startswith("ppl/")]
    table = new_table(title, "corpus", *prefixes.values(), "excess", "kl", "avg bits", "seconds", "peak memory")
    bits = "—" if record.average_bits is None else f"{record.average_bits:.3f}"
    cost = (bits, f"{record.seconds['total']:.1f}", gib(max(record.peak_bytes.values())))
    for key in keys or ["(no text)"]:
        measured = [f"{prefix}ppl/{key}" for prefix in prefixes] + [f"excess/{key}", f"kl/{key}"]
        table.add_row(key, *(number(record.metrics.get(name)) for name in measured), *cost)
        cost = ("", "", "")
    OUT.print(table)
    _show_tasks(record, prefixes)
    for note in record.notes:
        OUT.print(note, soft_wrap=True)
    for key, value in record.config["model"].get("published", {}).items():
        if key in keys:
            OUT.print(f"published float perplexity of {model}, {key}: {value}")


def show_plan(title: str, stages: Sequence[PlannedStage], record: Record, notes: Sequence[str]) -> None:
    """Print what a run would take by stage, and what that rests on."""
    places = list(record.peak_bytes)
    table = new_table(f"{title}  (estimated)", "stage", "seconds", *(f"{place} peak" for place in places))
    for stage in stages:
        peaks = (gib(stage.peaks[place]) if place in stage.peaks else "—" for place in places)
        table.add_row(stage.name, f"{stage.seconds:.1f}", *peaks)
    table.add_row("all", f"{record.seconds['total']:.1f}", *(gib(peak) for peak in record.peak_bytes.values()))
    OUT.print(table)
    for note in notes:
        OUT.print(f"assumed: {note}", soft_wrap=True)


def _show_tasks(record: Record, prefixes: dict[str, str]) -> None:
    keys = [key for key, facts in record.protocol.items() if "task_version" in facts]
    if not keys:
        return
    table = new_table("", "task", *prefixes.values())
    for key in keys:
        metric, _, task = key.partition("/")
        cells = []
        for prefix in prefixes:
            error = record.metrics.get(f"{prefix}{metric}_stderr/{task}")
            cells.append(number(record.metrics.get(f"{prefix}{key}")) + ("" if error is None else f" ± {error:.4f}"))
        table.add_row(key, *cells)
    OUT.print(table)
