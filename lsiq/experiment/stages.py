"""The story of one run: load, draw tokens, quantise block by block, evaluate."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsiq.data.token_cache import token_cache
from lsiq.data.tokens import token_hash
from lsiq.errors import ResourceError
from lsiq.evals.harness import check_tasks
from lsiq.evals.tasks import Tasks, load_tasks
from lsiq.experiment.allocate import placed_formats
from lsiq.experiment.calibrate import calibration_tokens, sample_limit
from lsiq.experiment.checks import check_formats, check_processes, check_products
from lsiq.experiment.config import with_formats
from lsiq.experiment.evaluate import SCORES, evaluate, evaluation_windows, open_cache
from lsiq.experiment.export import export
from lsiq.experiment.precision import precision_of
from lsiq.experiment.quantize import QuantizeStage
from lsiq.experiment.stamp import check_inputs, stamp
from lsiq.experiment.training_form import with_form
from lsiq.export.source import Source
from lsiq.models.folder import find_tokenizer
from lsiq.models.loading import Model, load
from lsiq.pipeline.prepare import restored
from lsiq.results.record import Record, write_record
from lsiq.results.store import BlockStore
from lsiq.runtime import processes
from lsiq.runtime.device import describe, find_device
from lsiq.runtime.files import remove_partial
from lsiq.runtime.memory import reset_peak
from lsiq.runtime.precision import tf32
from lsiq.runtime.streams import stored_in
from lsiq.runtime.terminal import say
from lsiq.track.choose import make_tracker

if TYPE_CHECKING:
    from lsiq.experiment.request import Request


def carry_out(request: Request, record: Record) -> None:
    """Do what is left to do of the run, and write what it finds into `record`."""
    start = time.perf_counter()
    config, folder = request.config, request.folder
    device = find_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs are recorded and memory is counted on the current one
    torch.manual_seed(config.seed)
    reset_peak()
    model = record.timed("load", lambda: load(config.model, request.checkpoint, device, config.seed))
    store = BlockStore(folder / "blocks")
    remove_partial(folder)
    if config.force:
        store.clear()
        BlockStore(folder / "start" / "blocks").clear()
    check_products(config.eval, model)
    exporter, source = config.export, None
    if exporter is not None:
        assert request.checkpoint is not None  # random weights are not exported
        tokenizer = find_tokenizer(config.model, request.checkpoint)
        source = Source(model, store, config.quant, request.checkpoint, tokenizer)
        exporter.check_model(source)  # to share bits out takes long
    config = with_formats(config, placed_formats(config, model, folder, record))
    request = replace(request, config=config)
    if source is not None and exporter is not None:
        source = replace(source, quant=config.quant)  # with a format for each linear
        exporter.check_model(source)
    if record.status != "finished":
        try:
            measure(request, model, store, record, start)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(".")[0]
            raise ResourceError(
                f"{reason}; finished blocks are kept: the same command goes on with them on a device with more memory"
            ) from error
        if processes.first():
            shutil.rmtree(folder / SCORES, ignore_errors=True)
    if exporter is not None and source is not None and processes.first():
        record.timed("export", lambda: export(exporter, source, config, record, folder))


def measure(request: Request, model: Model, store: BlockStore, record: Record, start: float) -> None:
    """Quantise the blocks that `store` does not hold already, and evaluate the model; the clock ran from `start`."""
    config, folder = request.config, request.folder
    record.machine = describe(model.device)
    record.training_precision = {}
    if config.quant.name != "fp16":
        cache = None if config.paths.cache is None else Path(config.paths.cache).expanduser()
        if (choice := precision_of(config.method, model.device, model.dtype, cache)) is not None:
            record.training_precision = asdict(choice)
    check_formats(model, config.quant)
    config.check_lengths(model.limit)
    texts = read_texts(request, model, store, record)
    check_tasks(model, texts.tasks, config.eval.items)
    stream_folder = folder if config.paths.streams == "disk" else None
    with (
        stored_in(stream_folder),
        make_tracker(config.tracker, request.plain, record, folder, anew=config.force) as tracker,
    ):
        try:
            if record.quantised:
                say(f"{store.folder} holds the quantised blocks; the run goes on with its evaluation")
                prepared = restored(model, config.quant, store)
            else:
                config = with_form(config, model, texts.calibration, record)
                prepared = QuantizeStage(config, texts.calibration, record, tracker, folder).run(model, store)
            with tf32(config.eval.tf32):
                record.timed(
                    "evaluate", lambda: evaluate(config, model, prepared, texts.windows, texts.tasks, store, record)
                )
        finally:
            before = record.seconds.pop("total", 0.0)
            # A process that was killed left the seconds of its stages, but no total.
            record.seconds["total"] = max(before + time.perf_counter() - start, sum(record.seconds.values()))
            record.note_peaks()
        record.status = "finished"
        write_record(record, folder)
        tracker.finish(record)


@dataclass(frozen=True)
class Texts:
    """What a run calibrates on and what it is measured on.

    Attributes:
        calibration: `(N, T)` tokens; None where the method needs none, or the blocks are there already.
        windows: `(N, T)` tokens by corpus.
    """

    calibration: Tensor | None
    windows: dict[str, Tensor]
    tasks: Tasks


def read_texts(request: Request, model: Model, store: BlockStore, record: Record) -> Texts:
    """Read all that the run needs of texts, and stamp `store` with all that decides its blocks.

    Raises:
        LsiqError: a text cannot be read or is too short, or what the run reads is not what gave it its name.
    """
    config = request.config
    tokens = token_cache(config.paths.cache, record.versions, {"run": record.run_id, "created": record.created})
    references = open_cache(config, model, record)
    windows = record.timed("tokens", lambda: evaluation_windows(config, model, tokens))
    tasks = record.timed("tasks", lambda: load_tasks(config.eval))
    store.stamp = stamp(record)
    record.quantised = record.quantised and store.complete(model.depth)
    calibration = None
    if not record.quantised:
        few = sample_limit(config)
        calibration = record.timed(
            "tokens", lambda: calibration_tokens(config.calib, model, config.seed, few, tokens, references)
        )
    calibration = processes.from_first(calibration)  # what the model writes may differ from one GPU to another
    if calibration is not None:
        samples, seqlen = calibration.shape
        check_processes(config, samples)
        record.calibration = {"samples": samples, "seqlen": seqlen, "tokens": token_hash(calibration)}
    check_inputs(config, request.checkpoint, record.inputs)
    store.stamp = stamp(record)
    return Texts(calibration, windows, tasks)
