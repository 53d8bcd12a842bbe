"""One run, from a composed configuration to its record."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lsiq import distributed
from lsiq.config import RunConfig, parse, plain_config, run_id
from lsiq.errors import ConfigError, InputError, LsiqError
from lsiq.export.finished import export_finished, exports_left
from lsiq.methods.finetune import FineTune
from lsiq.models.folder import find_folder, fingerprint
from lsiq.results import Record, command_line, read_record, source_state, versions, write_record
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
    config, plain = parse(cfg), plain_config(cfg)
    if config.dry_run:
        return estimate(config, plain)
    config = find_parent(config)
    checkpoint = find_folder(config.model)
    inputs = identify_inputs(config, checkpoint)
    identity = run_id(config, plain, inputs)
    folder = Path(config.paths.runs) / identity
    if not distributed.first():
        return follow(config, plain, checkpoint, folder)
    found = None if config.force else read_record(folder)
    if found is not None and found.status == "finished" and not exports_left(config, found):
        distributed.from_first((found, False))
        say(f"found {folder / 'record.json'} (force=true runs it again)")
        show_record(found)
        return found

    record = found if found is not None and found.quantised else new_record(config, plain, inputs, identity)
    if record.status != "finished":
        record.status, record.error = "running", None
        write_record(record, folder)
    try:
        from lsiq.experiment import carry_out  # torch and transformers: only now that there is work for them

        distributed.from_first((record, True))
        carry_out(config, plain, checkpoint, folder, record)
    except BaseException as raised:
        error = distributed.cause(raised)
        if record.status != "finished":  # then an export failed, and has noted it; the run stays what it was
            failed = "evaluation failed" if record.quantised else "failed"
            record.status = "interrupted" if isinstance(error, KeyboardInterrupt) else failed
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

    record = new_record(config, plain, {}, "")
    record.status = "dry run"
    dry_run(config, record)
    return record


def follow(config: RunConfig, plain: dict[str, Any], checkpoint: Path | None, folder: Path) -> Record:
    """Do this process's share of what the first one finds to do."""
    record, work = distributed.from_first((Record("", "", "", {}, 0, {}), False))
    if work:
        from lsiq.experiment import carry_out

        carry_out(config, plain, checkpoint, folder, record)
    return record


def new_record(config: RunConfig, plain: dict[str, Any], inputs: dict[str, str], identity: str) -> Record:
    """Return the record of a run that begins."""
    commit, clean = source_state()
    return Record(
        run_id=identity,
        status="running",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=plain,
        seed=config.seed,
        inputs=inputs,
        versions=versions(),
        command=command_line(),
        commit=commit,
        clean=clean,
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


def identify_inputs(config: RunConfig, checkpoint: Path | None) -> dict[str, str]:
    """Return content hashes of everything a run reads from files, by the key that names the file."""
    inputs = {}
    if checkpoint is not None and config.model.weights == "checkpoint":
        inputs["model"] = fingerprint(checkpoint, config.model.allow_pickle)
    paths = {"calib.path": config.calib.path, "eval.path": config.eval.path}
    paths |= {f"eval.local.{name}": path for name, path in config.eval.local.items()}
    paths |= {f"eval.tasks_local.{name}": path for name, path in config.eval.tasks_local.items()}
    if isinstance(config.method, FineTune) and config.method.run is not None:
        inputs["method.run"] = Path(config.method.run).name  # a run's id already stands for all that made it
    for key, path in paths.items():
        if path is not None:
            inputs[key] = _hash_file(key, Path(path).expanduser())
    return inputs


def _hash_file(key: str, path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{key}={path}: no such file; give the path of a file, relative to where you run")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=10)).hexdigest()
    except OSError as error:
        raise InputError(f"{key}={path}: cannot be read ({error.strerror}); check its permissions") from error
