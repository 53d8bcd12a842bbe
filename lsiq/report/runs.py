"""Lists of runs, and what of their records is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lsiq.errors import InputError
from lsiq.results.record import Record, read_record
from lsiq.track.panels import Cell, Table

# Metrics that tables show without being asked; records hold more.
SHOWN = ("ppl", "excess", "kl", "top1", "acc", "acc_norm", "last_word_ppl")


def read_runs(runs: Path, where: Sequence[str] = ()) -> list[Record]:
    """Return the records below a folder, oldest first, that agree with every `key=value`.

    Raises:
        InputError: the folder is missing, or a condition is malformed or names a key that no run has.
    """
    if not runs.is_dir():
        raise InputError(f"--runs={runs}: no such folder; give the folder that paths.runs named")
    records = [record for file in runs.glob("*/record.json") if (record := read_record(file.parent)) is not None]
    names = {name for record in records for name in about(record)} if where else set()
    for condition in where:
        key, equal, value = condition.partition("=")
        if not equal or (names and key not in names):
            raise InputError(
                f"--where {condition}: key=value is expected, with model, setting, method, seed, status or a key of "
                "the configuration such as calib.samples"
            )
        records = [record for record in records if value_text(about(record).get(key)) == value]
    return sorted(records, key=lambda record: (record.created, record.run_id))


def about(record: Record) -> dict[str, Any]:
    """What a run can be chosen by: its names, and its settings by the keys of the command line."""
    names = {"model": record.model, "setting": record.setting, "method": record.method}
    facts = {"seed": record.seed, "status": record.status, "weights_from": record.weights_from}
    return {**settings_of(record), **names, **facts}


def notes(records: Iterable[Record]) -> list[str]:
    """What must be said beside numbers of these runs, once each."""
    return list(dict.fromkeys(note for record in records for note in record.notes))


def settings_of(record: Record) -> dict[str, Any]:
    """Return the settings of a run by dotted key; lists of groups count their members."""
    return dict(_flatten(record.config, ""))


def value_text(value: Any) -> str:
    """Return the value of a setting as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(value_text(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _flatten(node: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(node, list) and any(isinstance(value, Mapping) for value in node):
        node = {str(place): value for place, value in enumerate(node)}
    if not isinstance(node, Mapping):
        return [(key, node)]
    return [pair for name, value in node.items() for pair in _flatten(value, f"{key}.{name}" if key else str(name))]


def list_table(records: Sequence[Record], metrics: Sequence[str], sort: str | None) -> Table:
    """One row per run, with what it measured.

    Args:
        metrics: keys of the record; none given shows the perplexities and accuracies that the runs have.
        sort: one of the metrics, best first where it is lower; None leaves the order in time.
    """
    keys = list(dict.fromkeys(key for record in records for key in record.metrics))
    columns = list(metrics) or [key for key in keys if key.split("/")[0] in ("ppl", "excess", "acc")]
    for key in (*metrics, *([sort] if sort else [])):
        if records and key not in keys:
            raise InputError(f"{key}: no run has measured it; they have {', '.join(keys[:12])} …")
    if sort:
        records = sorted(records, key=lambda record: record.metrics.get(sort, float("inf")))
    rows: list[list[Cell]] = []
    for record in records:
        measured = [record.metrics.get(key) for key in columns]
        seconds = record.seconds.get("total")
        rows.append(
            [
                record.run_id,
                record.status,
                *measured,
                record.average_bits,
                None if seconds is None else round(seconds, 1),
                record.created[:16],
            ]
        )
    return Table(
        f"{len(rows)} run{'s' * (len(rows) != 1)}",
        ["run", "status", *columns, "bits", "seconds", "created (UTC)"],
        rows,
    )
