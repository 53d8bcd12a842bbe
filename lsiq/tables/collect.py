"""Gather the records of finished runs into one small file that can be committed.

    python -m lsiq.tables.collect runs -o analysis/records/study.jsonl
    python -m lsiq.tables.collect runs/<run id> -o analysis/records/study.jsonl --traces analysis/traces

Runs that the file has already are replaced, others are kept. The lines are sorted: doing it twice changes nothing. Runs
that stand neither in the study's tables nor in those by size, as ablations, are counted by the setting that keeps them
out.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lsiq.errors import InputError, LsiqError
from lsiq.report.compact import Run, compact, read_runs, write_runs
from lsiq.results.record import Record, read_record
from lsiq.tables.papers.layout import BUNDLED
from lsiq.tables.papers.size_runs import contradiction_by_size, reports
from lsiq.tables.protocol import AUGMENTED, PAPERS, STUDY
from lsiq.tables.traces import trace, write_trace


def finished(folders: Sequence[Path], dirty: bool = False) -> tuple[list[tuple[Path, Record]], int]:
    """Return the finished runs in the folders or right below them, and how many were left out.

    Left out are runs that did not finish and, unless `dirty`, those of a changed checkout: nobody could repeat them.

    Raises:
        InputError: a folder holds no records.
    """
    records, skipped = [], 0
    for folder in folders:
        places = (
            [folder] if (folder / "record.json").is_file() else sorted(p.parent for p in folder.glob("*/record.json"))
        )
        if not places:
            raise InputError(f"{folder}: no records there; give a folder of runs, or the folder of one")
        for place in places:
            record = read_record(place)
            if record is None or record.status != "finished" or (record.clean is False and not dirty):
                skipped += 1
            else:
                records.append((place, record))
    return records, skipped


def collect(folders: Sequence[Path], output: Path, traces: Path | None = None, dirty: bool = False) -> tuple[int, int]:
    """Add the finished runs to `output`, and what figures need of the learned ones to the folder `traces`.

    Returns:
        How many runs were added or replaced, and how many were left out.
    """
    records, skipped = finished(folders, dirty)
    runs = [compact(record, folder) for folder, record in records]
    new = {run.run_id for run in runs}
    earlier: list[Run] = [run for run in (read_runs(output) if output.exists() else []) if run.run_id not in new]
    write_runs([*earlier, *runs], output)
    if traces is not None:
        for folder, record in records:
            if any("loss_last" in row["metrics"] for row in record.blocks):
                write_trace(trace(record, folder), traces)
    return len(runs), skipped


def strangers(runs: Sequence[Run]) -> Counter[str]:
    """Count the runs that are not of their tables' protocol, by the first setting that differs.

    Runs that measured the texts of the tables by size belong there, others to the study's, hub models to the papers'.
    """
    counts: Counter[str] = Counter()
    for run in runs:
        protocols = (STUDY, AUGMENTED) if run.model in BUNDLED else (PAPERS,)
        why = [protocol.contradiction(run) for protocol in protocols]
        if reports(run):
            why = [contradiction_by_size(run)]
        if None not in why:
            counts[str(why[0])] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lsiq.tables.collect", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUNS", help="a folder of runs, or the folder of one")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file of compact records")
    parser.add_argument("--traces", type=Path, help="a folder for trajectories and histograms of the learned runs")
    parser.add_argument("--dirty", action="store_true", help="take runs of a changed checkout as well")
    args = parser.parse_args()
    try:
        run_count, skipped = collect(args.folders, args.output, args.traces, args.dirty)
    except LsiqError as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: {run_count} runs; left out: {skipped} unfinished or of a changed checkout")
    for setting, count in sorted(strangers(read_runs(args.output)).items()):
        print(f"{count} of its runs stand in no table of their protocol: another {setting}")


if __name__ == "__main__":
    main()
