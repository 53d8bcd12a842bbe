"""A run that is wanted: its settings checked, its inputs identified, its folder named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lsiq.errors import InputError
from lsiq.experiment.composed import method_key, plain_config
from lsiq.experiment.config import RunConfig, parse
from lsiq.experiment.export_finished import exports_left
from lsiq.experiment.identity import identify_inputs, run_id
from lsiq.experiment.training_length import check_held
from lsiq.methods.finetune import FineTune
from lsiq.models.folder import find_folder
from lsiq.models.widths import check_groups
from lsiq.results.find import find_run
from lsiq.results.record import Record, read_record
from lsiq.runtime.redaction import redacted


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
        record = read_record(self.folder)
        complete = record is not None and record.status == "finished" and not exports_left(self.config, record)
        return record if complete else None


def prepare(cfg: DictConfig) -> Request:
    """Check a composed configuration and name the run it describes; needs no torch.

    Raises:
        LsiqError: a setting or an input cannot be used.
    """
    config, plain = find_parent(parse(cfg)), redacted(plain_config(cfg))
    check_held(config, method_key(cfg, plain["quant"]))
    if config.model.path is None and config.model.bundled is None:
        check_groups(config.quant, config.model.architecture or {}, config.model.name)  # before anything is fetched
    checkpoint = find_folder(config.model)
    inputs = identify_inputs(config, checkpoint)
    return Request(config, plain, checkpoint, inputs, Path(config.paths.runs) / run_id(config, plain, inputs))


def find_parent(config: RunConfig) -> RunConfig:
    """Return the settings with `method.run`, where the method starts from a finished run, as that run's folder."""
    if not isinstance(config.method, FineTune) or config.method.run is None:
        return config
    run = config.method.run
    _, folder = find_run(Path(config.paths.runs), run, "method.run", "finished")
    if not (folder / "blocks").is_dir():
        raise InputError(f"method.run={run}: {folder} holds no blocks any more; run it again with force=true")
    return replace(config, method=config.method.after(str(folder)))
