"""`from=<run>`: export what an earlier run left, without quantising anything again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lsiq.errors import ConfigError, InputError
from lsiq.experiment.composed import plain_config
from lsiq.experiment.config import RunConfig, parse
from lsiq.models.folder import find_folder, fingerprint
from lsiq.results.find import find_run
from lsiq.results.record import Record
from lsiq.runtime.garbage import uncollected_imports
from lsiq.runtime.locks import run_lock

# What may stand beside `from=`: everything else is the run's own.
_FREE = ("from", "export", "paths", "device", "tracker", "trace", "debug", "model.path")


def export_finished(cfg: DictConfig, overrides: Sequence[str]) -> Record:
    """Export the run that `cfg["from"]` names as `cfg.export` says; return its record.

    The settings are those in its record; its checkpoint must still be the one that was quantised.

    Args:
        overrides: the command line, `key=value` each.

    Raises:
        LsiqError: no such run, blocks or checkpoint missing or changed, or the format cannot hold the run.
    """
    run = cfg["from"]
    _check_overrides(run, overrides)
    settings = plain_config(cfg)
    if settings.get("export") is None:
        raise ConfigError(f"from={run}: nothing to do with it; give export=compressed-tensors, gguf, gptq or plain")
    runs = Path(settings["paths"]["runs"])
    record, _ = find_run(runs, run, "from", "quantised")
    plain: dict[str, Any] = {
        **record.config,
        **{key: settings[key] for key in ("export", "paths", "device", "tracker")},
    }
    if settings["model"]["path"] is not None:
        plain["model"] = {**plain["model"], "path": settings["model"]["path"], "bundled": None, "hub": None}
    config = parse(OmegaConf.create(plain))
    if (checkpoint := find_folder(config.model)) is None or config.model.weights == "random":
        raise InputError(f"from={run}: ran on random weights; only a real checkpoint can be exported")
    if fingerprint(checkpoint, config.model.allow_pickle) != record.inputs["model"]:
        raise InputError(
            f"from={run}: {checkpoint} is no longer the checkpoint that was quantised; "
            "give the folder that holds it with model.path=DIR"
        )

    with uncollected_imports():  # torch and transformers: only now that there is work for them
        from lsiq.experiment.export import export_run

    with run_lock(config.paths, record.run_id):
        record, folder = find_run(runs, run, "from", "quantised")  # as another process may have left it meanwhile
        export_run(config, checkpoint, folder, record)
    return record


def _check_overrides(run: str, overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if not any(key == free or key.startswith((f"{free}.", f"{free}@")) for free in _FREE):
            raise ConfigError(
                f"{override}: from={run} takes its settings from that run; "
                f"beside it only {', '.join(_FREE[1:])} can be given"
            )


def exports_left(config: RunConfig, record: Record) -> bool:
    """Whether the settings ask for an export that the record does not have."""
    if config.export is None:
        return False
    entry = record.exports.get(config.export.name, {})
    complete = entry.get("status") == "finished" and entry["settings"] == asdict(config.export)  # type: ignore[call-overload]
    return not (complete and Path(entry["folder"]).is_dir())
