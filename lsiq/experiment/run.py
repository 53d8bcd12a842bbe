"""One run, from a composed configuration to its record."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lsiq.errors import ConfigError, LsiqError
from lsiq.experiment.composed import method_key, plain_config
from lsiq.experiment.config import RunConfig, parse
from lsiq.experiment.export_finished import export_finished
from lsiq.experiment.input_checks import check_before_torch
from lsiq.experiment.request import Request, prepare
from lsiq.experiment.training_length import check_held
from lsiq.models.gguf_file import weights_from
from lsiq.report.terminal import show_record
from lsiq.results.record import Record, command_line, read_record, source_state, versions, write_record
from lsiq.runtime import processes
from lsiq.runtime.bytecode import missing_bytecode
from lsiq.runtime.garbage import uncollected_imports
from lsiq.runtime.locks import run_lock
from lsiq.runtime.terminal import say, warn


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> Record:
    """Carry out the run that `cfg` describes, or return its record where it has been carried out before.

    A run that stopped after its blocks were quantised goes on from there; `from=` exports one that was finished.

    Args:
        overrides: what the command line said, `key=value` each.

    Raises:
        LsiqError: one line that says what to change; a record keeps it, and what was done, if work had begun.
    """
    if cfg.get("from") is not None:
        if processes.size() > 1:
            raise ConfigError(f"from={cfg['from']}: an export is the work of one process; run it without torchrun")
        record = export_finished(cfg, overrides)
        show_record(record)
        return record
    if cfg.get("dry_run"):
        config, plain = parse(cfg), plain_config(cfg)
        check_held(config, method_key(cfg, plain["quant"]))
        return estimate(config, plain)
    request = prepare(cfg)
    if not processes.first():
        return follow(request)
    finished = None if request.config.force else request.finished()
    if finished is None:
        with run_lock(request.config.paths, request.folder.name) as waited:
            # Who had to wait takes what the other process made, with force=true as well.
            finished = request.finished() if waited or not request.config.force else None
            if finished is None:
                return work(request, overrides)
    processes.from_first((finished, False))
    say(f"found {request.folder / 'record.json'} (force=true runs it again)")
    show_record(finished)
    return finished


def work(request: Request, overrides: Sequence[str]) -> Record:
    """Do what is left of a run, and return its record, which is on disk then, whatever came of it."""
    folder = request.folder
    stored = None if request.config.force else read_record(folder)
    continues = stored is not None and (stored.quantised or stored.blocks)
    record = stored if stored is not None and continues else new_record(request, overrides)
    if record.status != "finished":
        record.status, record.error = "running", None
        write_record(record, folder)
    try:
        if processes.size() == 1:  # several processes have imported torch already
            check_before_torch(request.config, request.checkpoint, calibrates=not record.quantised)
        carry_out = stages()
        processes.from_first((record, True))
        carry_out(request, record)
    except BaseException as raised:
        error = processes.cause(raised)
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
    if processes.size() > 1:
        raise ConfigError("dry_run=true: one process estimates what one process takes; give it without torchrun")
    with uncollected_imports():
        from lsiq.experiment.dry_run import dry_run

    record = new_record(Request(config, plain, None, {}, Path()), ())
    record.status = "dry run"
    dry_run(config, record)
    return record


def follow(request: Request) -> Record:
    """Do this process's share of what the first one finds to do."""
    record, again = processes.from_first((Record("", "", "", {}, 0, {}), False))
    if again:
        stages()(request, record)
    return record


def stages() -> Callable[[Request, Record], None]:
    """Import torch and transformers, only now that there is work for them, and return what does the work."""
    if processes.first() and (advice := missing_bytecode("torch", "transformers")) is not None:
        warn(advice)
    with uncollected_imports(beside_torch=processes.size() > 1):  # who met the others has imported torch for it
        from lsiq.experiment.stages import carry_out
    return carry_out


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
