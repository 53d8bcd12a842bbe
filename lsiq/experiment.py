"""The story of one run: load, draw tokens, quantise block by block, evaluate."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas
import torch
from torch import Tensor

from lsiq import distributed
from lsiq.calib.kept import TokenRequest, kept_tokens, token_cache
from lsiq.calib.tokens import random_windows, token_hash
from lsiq.calib.written import write_sequences
from lsiq.config import RunConfig
from lsiq.cost import float_cost, model_cost
from lsiq.durable import remove_partial, replacing
from lsiq.errors import ConfigError, ResourceError
from lsiq.evals.cache import EvaluationCache, source_hash
from lsiq.evals.evaluation import SCORES, evaluate, evaluation_windows, open_cache
from lsiq.evals.tasks import load_tasks
from lsiq.export.source import Source
from lsiq.export.stage import export
from lsiq.memory import peak_bytes, reset_peak
from lsiq.methods.base import Method, ModelMethod, WholeMethod, chain
from lsiq.methods.finetune import FineTune
from lsiq.models.loading import Model, load
from lsiq.quantize import BlockReport, check_formats, quantize
from lsiq.results import Record, write_record
from lsiq.resume import check_inputs, stamp
from lsiq.store import DAMAGED, BlockStore
from lsiq.streams import kept_in
from lsiq.track.base import Tracker, make_tracker
from lsiq.track.console import say, warn
from lsiq.track.live import block_table
from lsiq.track.story import trajectory_panels

T = TypeVar("T")
# Sequences that suffice to report block errors where a method needs none.
SAMPLES_TO_MEASURE = 8


def carry_out(
    config: RunConfig, plain: Mapping[str, Any], checkpoint: Path | None, folder: Path, record: Record
) -> None:
    """Do what is left to do of the run, and write what it finds into `record`."""
    start = time.perf_counter()
    device = find_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs are recorded and memory is counted on the current one
    torch.manual_seed(config.seed)
    model = timed(record, "load", lambda: load(config.model, checkpoint, device, config.seed))
    store = BlockStore(folder / "blocks")
    remove_partial(folder)
    if config.force:
        store.clear()
        BlockStore(folder / "start" / "blocks").clear()
    exporter, source = config.export, None
    if exporter is not None:
        assert checkpoint is not None  # random weights are not exported
        source = Source(model, store, config.quant, checkpoint)
        exporter.check_model(source)
    if record.status != "finished":
        try:
            measure(config, plain, checkpoint, model, store, record, folder, start)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(".")[0]
            raise ResourceError(
                f"{reason}; finished blocks are kept: the same command goes on with them on a device with more memory"
            ) from error
        if distributed.first():
            shutil.rmtree(folder / SCORES, ignore_errors=True)
    if exporter is not None and source is not None and distributed.first():
        timed(record, "export", lambda: export(exporter, source, config, record, folder))


def measure(
    config: RunConfig,
    plain: Mapping[str, Any],
    checkpoint: Path | None,
    model: Model,
    store: BlockStore,
    record: Record,
    folder: Path,
    start: float,
) -> None:
    """Quantise the blocks that `store` does not hold already, and evaluate the model; the clock ran from `start`."""
    reset_peak()
    record.machine = describe(model.device)
    check_formats(model, config.quant)
    check_lengths(model, config)
    tokens = token_cache(config.paths.cache, record)
    references = open_cache(config, model, record)
    windows = timed(record, "tokens", lambda: evaluation_windows(config, model, tokens))
    tasks = timed(record, "tasks", lambda: load_tasks(config.eval))
    store.stamp = stamp(record)
    record.quantised = record.quantised and store.complete(model.depth)
    calibration = (
        None
        if record.quantised
        else timed(record, "tokens", lambda: calibration_tokens(config, model, tokens, references))
    )
    calibration = distributed.from_first(calibration)  # what the model writes may differ from one GPU to another
    if calibration is not None:
        samples, seqlen = calibration.shape
        check_processes(config, samples)
        record.calibration = {"samples": samples, "seqlen": seqlen, "tokens": token_hash(calibration)}
    check_inputs(config, checkpoint, record.inputs)
    store.stamp = stamp(record)

    kept = folder if config.paths.streams == "disk" else None
    with kept_in(kept), make_tracker(config, plain, record, folder) as tracker:
        try:
            if record.quantised:
                say(f"{store.folder} holds the quantised blocks; the run goes on with its evaluation")
                prepared = store.read_model(model)
            else:
                record.blocks.clear()
                shutil.rmtree(folder / SCORES, ignore_errors=True)  # of blocks that are not there any more
                method = make_start(config, model, calibration, store, record, tracker)
                prepared = prepare_model(config, method, model, calibration, store, record)
                quantize_model(config, method, prepared, calibration, store, record, tracker, folder)
                record.quantised = bool(record.blocks)
                write_record(record, folder)
            timed(record, "evaluate", lambda: evaluate(config, model, prepared, windows, tasks, store, record))
        finally:
            before = record.seconds.pop("total", 0.0)
            # A process that was killed left the seconds of its stages, but no total.
            record.seconds["total"] = max(before + time.perf_counter() - start, sum(record.seconds.values()))
            record.peak_bytes = peak_bytes()
        record.status = "finished"
        write_record(record, folder)
        tracker.finish(record)


def make_start(
    config: RunConfig, model: Model, tokens: Tensor | None, store: BlockStore, record: Record, tracker: Tracker
) -> Method | WholeMethod:
    """Return the method to carry out; if it starts from another one, that one's blocks lie in `start/` then."""
    method = config.method
    if not isinstance(method, FineTune) or method.start is None:
        return method
    folder = store.folder.with_name("start")
    started = BlockStore(folder / "blocks", store.stamp)
    prepared = prepare_model(config, method.start, model, tokens, started, record)
    quantize_model(config, method.start, prepared, tokens, started, record, tracker, folder.parent, "start")
    return method.after(str(folder))


def prepare_model(
    config: RunConfig,
    method: Method | WholeMethod,
    model: Model,
    tokens: Tensor | None,
    store: BlockStore,
    record: Record,
) -> Model:
    """Return the model that is quantised: turned or after a prefix, where a method in the chain asks for it.

    It is kept in `store`, and taken from there where it was made before.

    Raises:
        ConfigError: prefix and window together are longer than the model's positions.
    """
    if config.quant.name == "fp16":
        return model  # nothing is quantised
    if distributed.first():
        store.open()
    if distributed.from_first(store.model_digest() not in ("", DAMAGED)):
        prepared = store.read_model(model)
    else:
        prepared = timed(record, "prepare", lambda: _prepare(config, method, model, tokens))
        if distributed.first():
            store.write_model(prepared)
        distributed.wait()
    record.prefix = [] if prepared.prefix is None else prepared.prefix.tokens.tolist()
    check_lengths(model, config, len(record.prefix))
    return prepared


def _prepare(config: RunConfig, method: Method | WholeMethod, model: Model, tokens: Tensor | None) -> Model:
    for position, link in enumerate(chain(method)):
        if isinstance(link, ModelMethod):
            generator = torch.Generator().manual_seed(config.seed * 100_003 + 50_021 + position)
            model = link.prepare_model(model, tokens, config.calib.batch, generator)
    return model


def quantize_model(
    config: RunConfig,
    method: Method | WholeMethod,
    model: Model,
    tokens: Tensor | None,
    store: BlockStore,
    record: Record,
    tracker: Tracker,
    folder: Path,
    stage_name: str = "quantize",
) -> None:
    """Fill `store` with the quantised blocks that it lacks, and the record with a row for each of them all.

    Rows that are there already are those of the method it started from; their metrics are kept as `start/…`.
    """
    if config.quant.name == "fp16":
        record.cost = model_cost(model, [float_cost(model)] * model.depth)
        return  # the float model under the same protocol
    reports: list[BlockReport] = []
    before, record.blocks = record.blocks, []
    earlier, start = record.seconds.get(stage_name, 0.0), time.perf_counter()
    cache = None if config.paths.cache is None else Path(config.paths.cache).expanduser()
    with block_table(model.depth) as table:

        def log(values: Mapping[str, float]) -> None:
            tracker.log(values)
            table.log(values)

        for report in quantize(model, method, config.quant, tokens, config.calib.batch, config.seed, store, log, cache):
            reports.append(report)
            row = block_row(report, before)
            record.blocks.append(row)
            record.seconds[stage_name] = earlier + time.perf_counter() - start
            write_record(record, folder)
            told = {f"block/{key}": row[key] for key in ("index", "error", "seconds") if row[key] is not None}
            tracker.log({**told, **{f"block/peak_{place}_gib": size / 2**30 for place, size in peak_bytes().items()}})
            table.done(row)
    if rows := [row for report in reports for row in report.trace]:
        if distributed.first():
            with replacing(store.folder.with_name("trajectory.parquet")) as partial:
                pandas.DataFrame(rows).to_parquet(partial, index=False)
        tracker.show(trajectory_panels(rows, config.tracker.panels))
    record.cost = model_cost(model, (report.cost for report in reports))
    record.average_bits = record.cost["average_bits"]


def block_row(report: BlockReport, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def calibration_tokens(
    config: RunConfig, model: Model, tokens: EvaluationCache, references: EvaluationCache
) -> Tensor | None:
    """Draw the calibration windows `(samples + written, seqlen)`, those that the model writes last; None for no data.

    What was drawn or written before is taken from the caches, of tokens and of what this model did.

    A method that needs no data gets few: they only measure the error of each block.
    """
    parts = []
    if config.calib.corpus is not None:
        parts.append(drawn_tokens(config, model, tokens, limit=None if config.method.needs else SAMPLES_TO_MEASURE))
    if config.calib.written and (config.method.needs or not parts):
        count = config.calib.written if config.method.needs else min(config.calib.written, SAMPLES_TO_MEASURE)
        wanted = {"count": count, "seqlen": config.calib.seqlen, "seed": config.seed}
        key = references.key(kind="written", **wanted, source=source_hash(("calib/written.py",)))
        written = references.once(
            key, "sequences that the model writes", lambda: {"tokens": write_sequences(model, **wanted)}
        )
        parts.append(written["tokens"])
    return torch.cat(parts) if parts else None


def drawn_tokens(config: RunConfig, model: Model, cache: EvaluationCache, limit: int | None) -> Tensor:
    """Draw `(samples, seqlen)` token ids from the calibration corpus, at most `limit` sequences."""
    calib = config.calib
    samples = calib.samples if limit is None else min(calib.samples, limit)
    if calib.corpus == "random":
        return random_windows(model.config.vocab_size, samples, calib.seqlen, config.seed)
    assert calib.corpus is not None
    fields = tuple(calib.fields)
    request = TokenRequest(calib.corpus, "calibration", calib.path, fields, calib.seqlen, samples, config.seed)
    return kept_tokens(request, model.tokenizer, cache)


def check_lengths(model: Model, config: RunConfig, prefix: int = 0) -> None:
    """Raise ConfigError where a window, after `prefix` tokens, is longer than the positions the model knows."""
    limit = getattr(model.config, "max_position_embeddings", None)
    calibrates = config.calib.corpus is not None or config.calib.written
    lengths = {"calib.seqlen": config.calib.seqlen} if calibrates else {}
    lengths |= {"eval.seqlen": config.eval.seqlen} if config.eval.corpora else {}
    for key, seqlen in lengths.items():
        if limit is not None and prefix + seqlen > limit:
            after = f" and the prefix takes {prefix}" if prefix else ""
            raise ConfigError(f"{key}={seqlen}: the model has {limit} positions{after}; use at most {limit - prefix}")


def check_processes(config: RunConfig, samples: int) -> None:
    """Raise ConfigError where a process would have no sequence; say where one would have none of a step's."""
    size = distributed.size()
    if samples < size:
        raise ConfigError(
            f"calib.samples={config.calib.samples}: {samples} sequences cannot be shared by {size} processes; "
            "give more or start fewer"
        )
    for link in chain(config.method):
        training = getattr(link, "training", None)
        if training is not None and training.batch < size:
            warn(
                f"method.training.batch={training.batch} is smaller than the {size} processes: each step is taken by "
                f"{training.batch} of them; a batch of {size} or more keeps all busy"
            )


def find_device(name: str) -> torch.device:
    """Return the device that `name` stands for; ConfigError where this machine has none such."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device(
            "cuda", torch.cuda.current_device() if distributed.size() == 1 else distributed.local_rank()
        )
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} GPUs; use device=cpu or auto")
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """What the numbers were computed on."""
    described: dict[str, Any] = {
        "device": device.type,
        "processes": distributed.size(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def timed(record: Record, stage_name: str, action: Callable[[], T]) -> T:
    """Run `action` and add its wall time to the record."""
    start = time.perf_counter()
    try:
        return action()
    finally:
        record.seconds[stage_name] = record.seconds.get(stage_name, 0.0) + time.perf_counter() - start
