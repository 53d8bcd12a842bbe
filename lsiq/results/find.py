"""Finding the run that somebody means: one function and one set of errors for every command and setting."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lsiq.errors import InputError
from lsiq.results.record import Record, read_record

State = Literal["any", "quantised", "finished"]


def find_run(runs: Path, name: str, key: str = "", state: State = "any") -> tuple[Record, Path]:
    """Return the run that `name` means, and its folder.

    Args:
        runs: the folder that ids are looked up in.
        name: the run's id, a part of its id that no other has, its folder or its record file.
        key: the setting that named it, for messages; none for a word of a command.
        state: what must have been reached: `quantised` asks for its blocks, `finished` for its numbers.

    Raises:
        InputError: there is no such run, or there are several; its record cannot be read, or it did not get so far.
    """
    label = f"{key}={name}" if key else name
    folder = _folder(runs, name, label)
    record = read_record(folder)
    if record is None:
        raise InputError(f"{folder / 'record.json'}: not a record that this version can read; run it again")
    if state == "finished" and record.status != "finished":
        raise InputError(f"{label}: that run is {record.status}; run it to its end first")
    if state == "quantised" and not (record.quantised or record.status == "finished"):
        raise InputError(f"{label}: that run is {record.status} and left no blocks; run it to its end first")
    return record, folder


def _folder(runs: Path, name: str, label: str) -> Path:
    path = Path(name).expanduser()
    for folder in (runs / name, path, path.parent if path.name == "record.json" else path):
        if (folder / "record.json").is_file():
            return folder
    matches = [file.parent for file in sorted(runs.glob("*/record.json")) if name and name in file.parent.name]
    if len(matches) == 1:
        return matches[0]
    reason = f"{len(matches)} runs are called so, such as {matches[0].name}" if matches else "no such run"
    raise InputError(f"{label}: {reason}; lsiq report list --runs {runs} shows them, or give a run's folder")
