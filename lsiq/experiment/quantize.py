"""The stage of a run that quantises: the model prepared, then its blocks, told to record, tracker and console."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lsiq.experiment.config import RunConfig
from lsiq.experiment.evaluate import SCORES
from lsiq.methods.base import Method, WholeMethod
from lsiq.methods.finetune import FineTune
from lsiq.models.loading import Model
from lsiq.pipeline.block_loop import BlockReport, quantize
from lsiq.pipeline.cost import float_cost, model_cost
from lsiq.pipeline.prepare import prepare
from lsiq.results.record import Record, write_record
from lsiq.results.store import BlockStore
from lsiq.runtime import processes
from lsiq.runtime.files import replacing
from lsiq.runtime.memory import peak_bytes
from lsiq.track.base import Tracker
from lsiq.track.block_table import block_table
from lsiq.track.run_panels import trajectory_panels


@dataclass(frozen=True)
class QuantizeStage:
    """What the stage works with.

    Attributes:
        tokens: `(N, T)` calibration tokens, or None for a method that needs none.
        record: gets a row for each block, and is written to `folder` after each.
    """

    config: RunConfig
    tokens: Tensor | None
    record: Record
    tracker: Tracker
    folder: Path

    def run(self, model: Model, store: BlockStore) -> Model:
        """Fill `store` with the quantised blocks that it lacks, and return the model that they belong to.

        If the method starts from another one, that one's blocks lie in `start/` then.
        """
        self.record.blocks.clear()
        shutil.rmtree(self.folder / SCORES, ignore_errors=True)  # of blocks that are not there any more
        method = self.config.method
        if isinstance(method, FineTune) and method.start is not None:
            start = self.folder / "start"
            self._fill(BlockStore(start / "blocks", store.stamp), method.start, model, "start")
            method = method.after(str(start))
        prepared = self._fill(store, method, model, "quantize")
        self.record.quantised = bool(self.record.blocks)
        write_record(self.record, self.folder)
        return prepared

    def _fill(self, store: BlockStore, method: Method | WholeMethod, model: Model, name: str) -> Model:
        """Fill a store by a method, and the record with a row for each block; return the model as it was prepared.

        Rows that are there already are those of the method it started from; their metrics are kept as `start/…`.
        """
        config, record = self.config, self.record
        model = prepare_model(config, method, model, self.tokens, store, record)
        if config.quant.name == "fp16":
            record.cost = model_cost(model, [float_cost(model)] * model.depth)
            return model  # the float model under the same protocol
        reports: list[BlockReport] = []
        before, record.blocks = record.blocks, []
        earlier, start = record.seconds.get(name, 0.0), time.perf_counter()
        cache = None if config.paths.cache is None else Path(config.paths.cache).expanduser()
        batch, seed, tracker = config.calib.batch, config.seed, self.tracker
        with block_table(model.depth, name) as table:

            def log(values: Mapping[str, float]) -> None:
                tracker.log(values)
                table.log(values)

            loop = quantize(model, method, config.quant, self.tokens, batch, seed, store, log, cache)
            with contextlib.closing(loop):  # a run that stops here leaves no block half way to the disk
                for report in loop:
                    reports.append(report)
                    record.blocks.append(block_row(report, before))
                    record.took(name, earlier + time.perf_counter() - start)
                    write_record(record, self.folder)
                    self._tell(record.blocks[-1])
                    table.add(record.blocks[-1])
        self._tell_trajectory([row for report in reports for row in report.trace], store)
        record.cost = model_cost(model, (report.cost for report in reports), config.quant.outside())
        record.average_bits = record.cost["average_bits"]
        return model

    def _tell(self, row: Mapping[str, Any]) -> None:
        values = {f"block/{key}": row[key] for key in ("index", "error", "seconds") if row[key] is not None}
        peaks = {f"block/peak_{place}_gib": size / 2**30 for place, size in peak_bytes().items()}
        self.tracker.log({**values, **peaks})

    def _tell_trajectory(self, rows: Sequence[Mapping[str, Any]], store: BlockStore) -> None:
        if not rows:
            return
        if processes.first():
            import pandas

            with replacing(store.folder.with_name("trajectory.parquet")) as partial:
                pandas.DataFrame(rows).to_parquet(partial, index=False)
        self.tracker.show(trajectory_panels(rows, self.config.tracker.panels))


def prepare_model(
    config: RunConfig,
    method: Method | WholeMethod,
    model: Model,
    tokens: Tensor | None,
    store: BlockStore,
    record: Record,
) -> Model:
    """Return the model that is quantised: rotated or after a prefix, where a method in the chain asks for it.

    It is kept in `store`, and taken from there where it was made before.

    Raises:
        ConfigError: prefix and window together are longer than the model's positions.
    """
    start = time.perf_counter()
    prepared = prepare(method, config.quant, model, tokens, config.calib.batch, config.seed, store)
    record.took("prepare", record.seconds.get("prepare", 0.0) + time.perf_counter() - start)
    record.prefix = [] if prepared.prefix is None else prepared.prefix.tokens.tolist()
    config.check_lengths(model.limit, len(record.prefix))
    return prepared


def block_row(report: BlockReport, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the record's row of a block; `before` are the rows of the method it started from, or none."""
    started = {}
    if before:
        row = before[report.index]
        started = {f"start/{key}": value for key, value in row["metrics"].items()}
        started |= {f"start/{key}": row[key] for key in ("error", "seconds") if row[key] is not None}
    return {
        "index": report.index,
        "seconds": report.seconds,
        "error": report.error,
        "average_bits": report.cost.stored_bits / report.cost.weights,
        "metrics": {**report.metrics, **started},
        **({"kernels": report.kernels} if report.kernels else {}),
    }
