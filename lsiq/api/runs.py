"""Whole runs from Python, and tables of finished ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lsiq.cli.compose import compose
from lsiq.experiment.run import run as carry_out
from lsiq.report.runs import about, read_runs
from lsiq.results.record import Record

if TYPE_CHECKING:
    import pandas


def run(*overrides: str) -> Record:
    """Carry out a run as the command line does, and return its record.

    Args:
        overrides: the words of the command line: `"model=tiny-llama", "method=lsi"`.

    Raises:
        LsiqError: with the same text as on the command line.
    """
    return carry_out(compose(*overrides), overrides)


def records(folder: str | Path = "runs", *where: str) -> pandas.DataFrame:
    """Return the records below a folder, oldest first, one row each: names, settings by key, metrics by key.

    Args:
        where: conditions `key=value`, as `lsiq report list --where` takes them.

    Raises:
        InputError: the folder is missing, or a condition names a key that no run has.
    """
    import pandas

    rows = [
        {"run": record.run_id, **about(record), "bits": record.average_bits, **record.metrics}
        for record in read_runs(Path(folder), where)
    ]
    return pandas.DataFrame(rows)
