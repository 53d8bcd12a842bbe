"""Which runs a page is about: those that are named, those of a study, or those of files of compact records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsiq.errors import InputError
from lsiq.report.compact import Run, compact, read_runs
from lsiq.results.find import find_run
from lsiq.results.record import Record, read_record


@dataclass(frozen=True)
class Source:
    """A run, and where all that it left lies.

    Attributes:
        run: what tables need of it.
        record, folder: None where only a compact record was kept.
    """

    run: Run
    record: Record | None = None
    folder: Path | None = None


def gather(runs: Path, named: Sequence[str]) -> list[Source]:
    """Return the runs that are meant, each once, in the order of the names.

    Args:
        runs: the folder that ids, parts of ids and studies are looked up in.
        named: ids, parts of an id that no other has, folders of a run or of runs, files or folders of compact records,
            or the names of studies (`tracker.group`); none at all are all runs in `runs`.

    Raises:
        InputError: a name means nothing, or several runs.
    """
    sources = [source for name in named for source in _meant(runs, name)] if named else _below(runs)
    if not sources:
        raise InputError(f"{runs}: no finished run there; --runs DIR names another folder")
    return list({(source.run.run_id or id(source), source.run.created): source for source in sources}.values())


def _meant(runs: Path, name: str) -> list[Source]:
    path = Path(name)
    if path.suffix == ".jsonl" and path.is_file():
        return [Source(run) for run in read_runs(path)]
    if path.is_dir() and not (path / "record.json").is_file():
        files = sorted(path.glob("*.jsonl"))
        sources = [Source(run) for file in files for run in read_runs(file)] or _below(path)
        if sources:
            return sources
        raise InputError(f"{name}: neither records nor files of compact records (.jsonl) lie there")
    if not (path / "record.json").is_file() and not (runs / name / "record.json").is_file():
        of_study = [source for source in _below(runs) if source.run.study == name]
        if of_study:
            return of_study
    record, folder = find_run(runs, name)
    return [_source(record, folder)]


def _below(runs: Path) -> list[Source]:
    """The runs in a folder that have measured something, oldest first."""
    records = [(record, file.parent) for file in runs.glob("*/record.json") if (record := read_record(file.parent))]
    measured = [_source(record, folder) for record, folder in records if record.metrics]
    return sorted(measured, key=lambda source: (source.run.created, str(source.run.run_id)))


def _source(record: Record, folder: Path) -> Source:
    return Source(compact(record), record, folder)
