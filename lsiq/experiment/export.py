"""One export: written, read back, described, and only then given its name."""

from __future__ import annotations

import datetime
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lsiq.allocation.plan import FILE as PLAN
from lsiq.allocation.plan import read_plan
from lsiq.errors import InputError, LsiqError, OutputError
from lsiq.experiment.config import RunConfig, with_formats
from lsiq.export.base import Exporter
from lsiq.export.card import Described, write_card
from lsiq.export.origin import write_origin
from lsiq.export.push import push
from lsiq.export.source import Source
from lsiq.export.verify import verify
from lsiq.formats.names import as_format
from lsiq.formats.placed import place
from lsiq.formats.quant import QuantSettings
from lsiq.models.folder import find_tokenizer
from lsiq.models.loading import Model, load
from lsiq.results.record import Record, command_line, write_record
from lsiq.results.store import BlockStore
from lsiq.runtime.terminal import say


def export_run(config: RunConfig, checkpoint: Path, folder: Path, record: Record) -> None:
    """Export the finished run in `folder` as `config.export` says."""
    model = load(config.model, checkpoint, torch.device("cpu"), config.seed)
    config = with_formats(config, _placed_again(config, model, folder))
    assert config.export is not None
    tokenizer = find_tokenizer(config.model, checkpoint)
    source = Source(model, BlockStore(folder / "blocks"), config.quant, checkpoint, tokenizer)
    config.export.check_model(source)
    export(config.export, source, config, record, folder)


def _placed_again(config: RunConfig, model: Model, folder: Path) -> QuantSettings:
    """Return the run's number formats with those of its linears as the plan beside its record has them."""
    if not config.quant.mixed:
        return config.quant
    if (plan := read_plan(folder)) is None:
        raise InputError(f"{folder}: has no {PLAN}, which says what format each linear has; run it again")
    layers = {name: as_format(value) for name, value in plan.layers.items()}
    return place(config.quant, model.depth, model.spec.linears, config.model.name, layers)


def export(exporter: Exporter, source: Source, config: RunConfig, record: Record, run: Path) -> None:
    """Export a finished run whose blocks are in `source`, and note in the record what came of it.

    A failure is noted under `exports` and leaves the rest of the record as it is: the run stays what it was, and the
    same command, or `from=<run id>`, tries the export again.

    Args:
        run: the run's folder.

    Raises:
        LsiqError: the format cannot hold the model, the folder cannot be written, or it reads back as another model.
    """
    target = Path(exporter.folder).expanduser() if exporter.folder else run / "export" / exporter.name
    entry: dict[str, Any] = {
        "status": "running",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "settings": asdict(exporter),  # type: ignore[call-overload]
        "folder": str(target),
    }
    earlier = record.exports.get(exporter.name, {}).get("folder")
    record.exports[exporter.name] = entry
    try:
        _carry_out(exporter, source, config, record, target, replaces=earlier == str(target))
        entry["status"] = "finished"
    except BaseException as error:
        entry["status"] = "failed"
        entry["error"] = str(error) if isinstance(error, LsiqError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        write_record(record, run)
    say(f"exported: {target}")


def _carry_out(
    exporter: Exporter, source: Source, config: RunConfig, record: Record, target: Path, replaces: bool
) -> None:
    entry = record.exports[exporter.name]
    if not source.store.complete(source.model.depth):
        raise InputError(
            f"{source.store.folder}: lacks blocks of the run or holds damaged ones; "
            "run it again with force=true, then export it"
        )
    source.check()
    partial = target.with_name(f"{target.name}.partial")
    try:
        # A folder inside the run's is ours; another one may hold what somebody wants to keep.
        if target.exists() and not replaces and exporter.folder and (not target.is_dir() or any(target.iterdir())):
            raise OutputError(f"export.folder={target}: is not an empty folder; give another one")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        exporter.write(source, partial)
        entry["weight_bytes"] = sum(
            file.stat().st_size for suffix in ("safetensors", "gguf") for file in partial.glob(f"*.{suffix}")
        )
        entry["checks"] = verify(exporter, source, config.model, config.seed, partial) if exporter.verify else []
        write_origin(record, config.quant, config.method.name, partial)
        described = Described(config.model, config.quant, config.method.name, config.calib.text)
        write_card(exporter, described, record, entry["checks"], partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(
            f"export: {error.filename or target} cannot be written ({error.strerror or error}); "
            "free space or set export.folder=DIR"
        ) from error
    if exporter.push:
        entry["pushed"] = push(target, exporter.push)
