"""One run, from a composed configuration to its record."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lsiq import distributed
from lsiq.composed import plain_config
from lsiq.config import RunConfig, parse
from lsiq.errors import ConfigError, InputError, LsiqError
from lsiq.export.finished import export_finished, exports_left
from lsiq.identity import identify_inputs, run_id
from lsiq.inputs import check_before_torch
from lsiq.lock import run_lock
from lsiq.methods.finetune import FineTune
from lsiq.models.folder import find_folder
from lsiq.models.gguf_file import weights_from
from lsiq.models.widths import check_groups
from lsiq.results import Record, command_line, read_record, source_state, versions, write_record
from lsiq.secrets import redacted
from lsiq.track.console import say, show_record


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> Record:
    """Carry out the run that `cfg` describes, or return its record where it has been carried out before.

    A run that stopped after its blocks were quantised goes on from there; `from=` exports one that was finished.

    Args:
        overrides: what the command line said, `key=value` each.

    Raises:
        LsiqError: one line that says what to change; a record keeps it, and what was done, if work had begun.
    """
    if cfg.get("from") is not None:
        if distributed.size() > 1:
            raise ConfigError(f"from={cfg['from']}: an export is the work of one process; run it without torchrun")
        record = export_finished(cfg, overrides)
        show_record(record)
        return record
    if cfg.get("dry_run"):
        return estimate(parse(cfg), plain_config(cfg))
    request = prepare(cfg)
    if not distributed.first():
        return follow(request)
    found = None if request.config.force else request.finished()
    if found is None:
        with run_lock(request.config.paths, request.folder.name) as waited:
            # Who had to wait takes what the other process made, with force=true as well.
            found = request.finished() if waited or not request.config.force else None
            if found is None:
                return work(request, overrides)
    distributed.from_first((found, False))
    say(f"found {request.folder / 'record.json'} (force=true runs it again)")
    show_record(found)
    return found


@dataclass(frozen=True)
class Request:
    """A run that is wanted: its checked settings, the same as plain data, what it reads, and the folder it fills."""

    config: RunConfig
    plain: dict[str, Any]
    checkpoint: Path | None
    inputs: dict[str, str]
    folder: Path

    def finished(self) -> Record | None:
        """Return the run's record if nothing of what is wanted is left to do."""
        found = read_record(self.folder)
        done = found is not None and found.status == "finished" and not exports_left(self.config, found)
        return found if done else None


def prepare(cfg: DictConfig) -> Request:
    """Check a composed configuration and name the run it describes; needs no torch.

    Raises:
        LsiqError: a setting or an input cannot be used.
    """
    config, plain = find_parent(parse(cfg)), redacted(plain_config(cfg))
    if config.model.path is None and config.model.bundled is None:
        check_groups(config.quant, config.model.architecture or {}, config.model.name)  # before anything is fetched
    checkpoint = find_folder(config.model)
    inputs = identify_inputs(config, checkpoint)
    return Request(config, plain, checkpoint, inputs, Path(config.paths.runs) / run_id(config, plain, inputs))


def work(request: Request, overrides: Sequence[str]) -> Record:
    """Do what is left of a run, and return its record, which is on disk then, whatever came of it."""
    folder = request.folder
    found = None if request.config.force else read_record(folder)
    begun = found is not None and (found.quantised or found.blocks)
    record = found if found is not None and begun else new_record(request, overrides)
    if record.status != "finished":
        record.status, record.error = "running", None
        write_record(record, folder)
    try:
        if distributed.size() == 1:  # several processes have imported torch already
            check_before_torch(request.config, request.checkpoint, calibrates=not record.quantised)
        from lsiq.experiment import carry_out  # torch and transformers: only now that there is work for them

        distributed.from_first((record, True))
        carry_out(request, record)
    except BaseException as raised:
        error = distributed.cause(raised)
        if record.status != "finished":  # then an export failed, and has noted it; the run stays what it was
            failed = "evaluation failed" if record.quantised else "failed"
            record.status = "interrupted" if isinstance(error, KeyboardInterrupt) else failed
            if isinstance(error, KeyboardInterrupt):
                error.args = (f"{len(record.blocks)} finished blocks are kept",)
            record.error = str(error) if isinstance(error, LsiqError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        path = write_record(record, folder)
    show_record(record)
    say(f"record: {path}")
    return record


def estimate(config: RunConfig, plain: dict[str, Any]) -> Record:
    """Return a record of what the run would take, which is shown and not written."""
    if distributed.size() > 1:
        raise ConfigError("dry_run=true: one process estimates what one process takes; give it without torchrun")
    from lsiq.dryrun import dry_run

    record = new_record(Request(config, plain, None, {}, Path()), ())
    record.status = "dry run"
    dry_run(config, record)
    return record


def follow(request: Request) -> Record:
    """Do this process's share of what the first one finds to do."""
    record, wanted = distributed.from_first((Record("", "", "", {}, 0, {}), False))
    if wanted:
        from lsiq.experiment import carry_out

        carry_out(request, record)
    return record


def new_record(request: Request, overrides: Sequence[str]) -> Record:
    """Return the record of a run that begins."""
    commit, clean = source_state()
    return Record(
        run_id=request.folder.name,
        status="running",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=request.plain,
        seed=request.config.seed,
        inputs=request.inputs,
        versions=versions(),
        command=command_line(overrides),
        commit=commit,
        clean=clean,
        weights_from=weights_from(request.checkpoint),
    )


def find_parent(config: RunConfig) -> RunConfig:
    """Return the settings with `method.run`, where the method starts from a finished run, as that run's folder."""
    if not isinstance(config.method, FineTune) or config.method.run is None:
        return config
    named = config.method.run
    for folder in (Path(config.paths.runs) / named, Path(named)):
        found = read_record(folder)
        if found is None:
            continue
        if found.status != "finished" or not (folder / "blocks").is_dir():
            raise InputError(
                f"method.run={named}: that run is {found.status} or left no blocks; run it to its end first"
            )
        return replace(config, method=config.method.after(str(folder)))
    raise InputError(
        f"method.run={named}: no record there; give a run id below paths.runs={config.paths.runs} or a folder"
    )
