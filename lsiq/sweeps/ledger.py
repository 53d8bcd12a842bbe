"""Which run a job of a sweep is: noted when it is done, so that it is known again without composing its configuration.

Composing takes a tenth of a second, which a sweep of a thousand finished runs would pay a thousand times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lsiq.errors import LsiqError
from lsiq.experiment.composed import plain_config
from lsiq.experiment.identity import hash_file, model_inputs
from lsiq.experiment.request import prepare
from lsiq.models.folder import find_folder
from lsiq.models.settings import ModelSettings
from lsiq.results.record import Record, read_record
from lsiq.runtime.sources import source_hash
from lsiq.settings import fill

if TYPE_CHECKING:
    from hydra.conf import HydraConf


# Jobs that ask for more than a finished record are composed and looked at every time.
_OF_MODEL = ("model", "model.tokenizer", "model.splitter")
_MORE = ("from", "force", "export")


class Ledger:
    """A folder of notes, each named by the hash of all that a job's configuration is composed from.

    A note says where the record is and which files the run read. The record decides: it must be finished, and the files
    must have the content that it names. Notes appear whole, and may be deleted at any time.
    """

    def __init__(self, hydra: HydraConf, cache: str | None, runs: str | None = None) -> None:
        """Open the ledger.

        Args:
            hydra: hydra's own settings, which name the folders of configuration files.
            cache: `paths.cache`; None notes and knows nothing.
            runs: `paths.runs`, where no job names its own; nothing is finished while it holds no record.
        """
        self._folder = None if cache is None else Path(cache).expanduser() / "jobs"
        self._sources = _hash_sources(hydra)
        self._hashes: dict[str, str | None] = {}
        self._models: dict[str, dict[str, str] | None] = {}
        self._new = runs is not None and next(Path(runs).expanduser().glob("*/record.json"), None) is None

    def recognise(self, job: Sequence[str], compose: Callable[[Sequence[str]], DictConfig]) -> Record | None:
        """Return the finished record of `job`, or None where there is work left.

        Args:
            compose: makes the configuration of a job; only called where the ledger does not know it. Its errors are
                raised, those of the configuration it makes are left to the job.
        """
        if (record := self.look_up(job)) is not None:
            return record
        if self._new and not any(word.lstrip("+").startswith("paths") for word in job):
            return None  # without composing it, which costs a tenth of a second or two
        cfg = compose(job)
        if any(cfg.get(key) for key in ("from", "force")):
            return None
        try:
            record = prepare(cfg).finished()
        except LsiqError:
            return None
        if record is not None:
            self.remember(job, cfg, record)
        return record

    def remember(self, job: Sequence[str], cfg: DictConfig, record: Record) -> None:
        """Note that the composed `cfg` of `job` is the finished run of `record`."""
        if self._folder is None or any(cfg.get(key) for key in _MORE):
            return
        plain = plain_config(cfg)
        note = {
            "folder": str(Path(plain["paths"]["runs"], record.run_id).absolute()),
            "model": plain["model"],
            "files": {key: str(Path(path).expanduser().absolute()) for key, path in _files(plain)},
        }
        file = self._file(job)
        partial = file.with_name(f".{uuid.uuid4().hex}.partial")
        with contextlib.suppress(OSError):  # a note that cannot be written costs time, nothing else
            self._folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(note), encoding="utf-8")
            os.replace(partial, file)

    def look_up(self, job: Sequence[str]) -> Record | None:
        """Return the finished record of a job that was noted, or None where it has to be composed to know."""
        if self._folder is None:
            return None
        try:
            note = json.loads(self._file(job).read_text(encoding="utf-8"))
            record = read_record(Path(note["folder"]))
            if record is None or record.status != "finished":
                return None
            if self._model(note["model"]) != {key: record.inputs[key] for key in _OF_MODEL if key in record.inputs}:
                return None
            for key, expected in record.inputs.items():
                if key == "method.run":
                    continue  # a run's id, which its record vouches for
                if key not in _OF_MODEL and self._hash(key, note["files"][key]) != expected:
                    return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record

    def _file(self, job: Sequence[str]) -> Path:
        assert self._folder is not None
        name = hashlib.blake2b(json.dumps([self._sources, list(job)]).encode(), digest_size=16).hexdigest()
        return self._folder / f"{name}.json"

    def _model(self, plain: dict[str, Any]) -> dict[str, str] | None:
        key = json.dumps(plain, sort_keys=True)
        if key not in self._models:
            try:
                settings = fill(ModelSettings, plain, "model")
                self._models[key] = model_inputs(settings, find_folder(settings))
            except LsiqError:
                self._models[key] = None
        return self._models[key]

    def _hash(self, key: str, path: str) -> str | None:
        if path not in self._hashes:
            try:
                self._hashes[path] = hash_file(key, Path(path))
            except LsiqError:
                self._hashes[path] = None
        return self._hashes[path]


def _files(plain: dict[str, Any]) -> Iterator[tuple[str, str]]:
    paths = {"calib.path": plain["calib"]["path"], "eval.path": plain["eval"]["path"]}
    paths |= {f"calib.paths.{name}": path for name, path in plain["calib"].get("paths", {}).items()}
    paths |= {
        f"eval.{group}.{name}": path
        for group in ("local", "tasks_local")
        for name, path in plain["eval"][group].items()
    }
    return ((key, path) for key, path in paths.items() if path is not None)


def _hash_sources(hydra: HydraConf) -> str:
    """A hash of what turns a job into a configuration: files and the variables they name, code, working directory."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([os.getcwd(), hydra.job.config_name]).encode())
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    names: set[str] = set()
    for file in sorted(file for folder in folders for file in _files_below(folder)):
        content = file.read_bytes()
        digest.update(file.name.encode() + content)
        names.update(name.decode() for name in re.findall(rb"oc\.env:(\w+)", content))
    digest.update(source_hash().encode())
    digest.update(json.dumps([(name, os.environ.get(name)) for name in sorted(names)]).encode())
    return digest.hexdigest()


def _files_below(folder: Path) -> Iterator[Path]:
    for place, _, files in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in files if name.endswith(".yaml"))
