"""What one block costs: a method and the evaluation carried out on random weights of a model's true shape."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lsiq.calib.cache_range import measure_scales
from lsiq.data.tokens import random_windows
from lsiq.evals.windows import Variant, by_model, measure_windows
from lsiq.experiment.evaluate import variants_to_measure
from lsiq.methods.base import Method
from lsiq.methods.rotate import Rotate
from lsiq.models.block import FloatStream, run_stream
from lsiq.models.checkpoint import MemoryCheckpoint, RandomCheckpoint
from lsiq.models.context import Ahead, Context
from lsiq.models.folder import find_tokenizer, read_config, tokenizer_files
from lsiq.models.gguf_file import is_gguf
from lsiq.models.loading import Model, load, load_tokenizer
from lsiq.models.result import BlockResult
from lsiq.pipeline.layer_report import first_tokens, layer_rows
from lsiq.results.store import BlockStore
from lsiq.runtime import streams
from lsiq.runtime.cache import ContentCache
from lsiq.runtime.memory import peak_bytes, reset_peak

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig


# Epochs that a probe trains; the median of three is none that sets up or is disturbed.
EPOCHS = 3


@dataclass(frozen=True)
class ProbedBlock:
    """What a method did to the first block with some sequences.

    Attributes:
        seconds: in all, streams and storing included.
        epoch_seconds: what an epoch of training took; 0 for methods that train nothing.
        learning, running: peak bytes while the method worked, and while the stream ran through what it made.
    """

    samples: int
    seconds: float
    epoch_seconds: float
    learning: Mapping[str, int]
    running: Mapping[str, int]


@dataclass(frozen=True)
class EvaluationCost:
    """What measuring some windows of a model of few blocks cost.

    Attributes:
        models: how many were measured, in `passes` over the weights.
        preparing: seconds in which the functions of one block are made, for all models, its weights at hand.
        block_seconds, score_seconds: of all blocks, and of what follows them.
        peaks: bytes, by place.
    """

    windows: int
    models: int
    passes: int
    preparing: float
    block_seconds: float
    score_seconds: float
    peaks: Mapping[str, int]

    @property
    def seconds(self) -> float:
        return self.block_seconds + self.score_seconds

    def pass_seconds(self, block_seconds: float, tried: int, depth: int, reading: float, ahead: bool) -> float:
        """Return the seconds of one pass over `depth` blocks, where all passes over the `tried` ones took some.

        Args:
            reading: seconds in which the weights of one block are read, which they were not.
            ahead: whether a block is read and prepared while the one before it runs.
        """
        took, preparing = block_seconds / self.passes, self.preparing / self.passes
        if not ahead:
            return depth * (took / tried + reading)
        # preparing + (tried - 1) · max(preparing, running) + running, solved for running
        quick = took <= (tried + 1) * preparing
        running = max(took - tried * preparing, 0.0) if quick else (took - preparing) / tried
        before = reading + preparing
        return before + (depth - 1) * max(before, running) + running


def architecture(config: RunConfig, folder: Path | None, depth: int | None = None) -> dict[str, Any]:
    """Return the transformers configuration of the model, cut to `depth` blocks; None leaves all."""
    shape = dict(config.model.architecture or {}) if folder is None else read_config(folder)
    if depth is not None:
        shape["num_hidden_layers"] = depth
        if shape.get("layer_types"):
            shape["layer_types"] = shape["layer_types"][:depth]
    return shape


def probe_model(
    config: RunConfig, folder: Path | None, depth: int, device: torch.device
) -> tuple[Model, MemoryCheckpoint, float]:
    """Return the model with few blocks and random weights, what holds these, and the seconds that others took."""
    return probe_architecture(config, folder, architecture(config, folder, depth), device)


def probe_architecture(
    config: RunConfig, folder: Path | None, shape: dict[str, Any], device: torch.device
) -> tuple[Model, MemoryCheckpoint, float]:
    """Return the model of a shape, as `probe_model` does, with the tokenizer of `folder` where it has one."""
    settings = replace(config.model, weights="random", architecture=shape, path=None, bundled=None)
    outside, checkpoint = (MemoryCheckpoint(RandomCheckpoint(config.seed)) for _ in range(2))
    own = find_tokenizer(config.model, folder)
    known = own is not None and (is_gguf(own) or tokenizer_files(own))
    model = load(settings, None, device, config.seed, outside, load_tokenizer(own if known else None))
    return replace(model, checkpoint=checkpoint), checkpoint, outside.seconds


def shortened(method: Any, most: int = EPOCHS) -> Any:
    """Return the method with at most so many epochs and no trained rotation, and so what it hands on to."""
    changes: dict[str, Any] = {"steps": 0} if isinstance(method, Rotate) and method.steps else {}
    if (training := method.training) is not None:
        epochs = min(training.epochs, most)
        late = {"wait": min(training.wait, most - 1)} if hasattr(training, "wait") else {}
        # Of the few sequences that are tried none may be left to hold back.
        last = {"keep": "last", "held": None} if getattr(training, "keep", None) == "held" else {}
        changes["training"] = replace(training, epochs=epochs, **late, **last)
    if isinstance(then := getattr(method, "then", None), Method):
        changes["then"] = shortened(then, most)
    return replace(method, **changes) if changes else method


def widened(method: Any) -> Any:
    """Return the method in the widest precision that a block may need, where blocks decide, and so what it hands on to.

    Which of them need it depends on what enters them, and is not seen by trying out the first.
    """
    changes: dict[str, Any] = {"precision": "float64"} if getattr(method, "precision", None) == "auto" else {}
    if isinstance(then := getattr(method, "then", None), Method):
        changes["then"] = widened(then)
    return replace(method, **changes) if changes else method


def probe_block(
    config: RunConfig, model: Model, method: Method, samples: int | None, store: BlockStore, on_device: bool
) -> ProbedBlock:
    """Let the method quantise the first block, with random tokens; None for no tokens at all.

    The others are stored as copies of it, so that there is a model to evaluate.

    Args:
        on_device: whether the streams lie on the model's device.
    """
    batch, device = config.calib.batch, model.device
    windows = random_windows(model.config.vocab_size, samples or 1, config.calib.seqlen if samples else 1, config.seed)
    hidden, kwargs = model.embed(windows, batch)
    if on_device:
        hidden = hidden.to(device)
    reset_peak()
    start = time.perf_counter()
    block = model.block(0, kwargs)
    floats = FloatStream(lambda later: model.block(later, kwargs), hidden, batch)
    targets = floats.after(0) if samples else None
    context = Context(
        inputs=hidden if samples else None,
        targets=targets if "targets" in method.needs else None,
        generator=torch.Generator().manual_seed(config.seed),
        batch=batch,
        log=lambda values: None,
        tokens=windows if samples else None,
        ahead=Ahead(
            model.depth, lambda later: model.block(later, kwargs).under(config.quant), model.logits, floats.after
        ),
    )
    quant = config.quant.in_block(0)
    block = block.under(quant)
    result = method.quantize_block(block, quant, context)
    layer_rows(block, result, quant, first_tokens(context.inputs))
    if config.quant.kv.calibrated and samples:  # of the float model, for which its stream runs alone, and of the result
        run_stream(block.with_weights({}), hidden, batch, device)
        for made in (BlockResult({}), result):
            scales = measure_scales(block, made, hidden, batch, quant.activation, quant.kv)
        result = replace(result, cache_scales=scales)
    learning = peak_bytes()
    reset_peak()
    store.write(0, result)
    if targets is not None:
        quantised = run_stream(block.with_result(result, config.quant.running), hidden, batch, device)
        for output, target in zip(quantised, targets, strict=True):
            ((output.float() - target.float()).square().mean() / target.float().square().mean()).item()
        streams.release(quantised, targets)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    for index in range(1, model.depth):
        store.write(index, result)
    store.wait()
    epoch = float(result.metrics.get("epoch_seconds", 0.0))
    return ProbedBlock(samples or 0, seconds, epoch, learning, peak_bytes())


def probe_evaluation(
    config: RunConfig, model: Model, prepared: Model, windows: int, store: BlockStore
) -> EvaluationCost:
    """Measure random windows on the float model, on round-to-nearest and on the stored blocks, as the run would."""
    tokens = random_windows(model.config.vocab_size, windows, config.eval.seqlen, config.seed)
    variants = variants_to_measure(config, model, prepared, store)
    times: list[float] = []
    reset_peak()
    start = time.perf_counter()
    measure_windows(
        model,
        {"random": tokens},
        variants,
        config.eval.batch,
        config.eval.divergence,
        ContentCache(None, {}, {}),
        lambda: times.append(time.perf_counter()),
    )
    scoring, peaks = time.perf_counter() - times[-1], peak_bytes()
    groups = by_model(model, variants)
    preparing = _seconds_to_prepare(groups)
    return EvaluationCost(windows, len(variants), len(groups), preparing, times[-1] - start, scoring, peaks)


@torch.no_grad()
def _seconds_to_prepare(groups: Sequence[tuple[Model, Mapping[str, Variant]]]) -> float:
    """Measure how long it takes to make the functions of the first block, of all models."""
    start = time.perf_counter()
    for prepared, group in groups:
        block = prepared.block(0, {})
        for variant in group.values():
            variant.function_of(block)
        if prepared.device.type == "cuda":
            torch.cuda.synchronize(prepared.device)
    return time.perf_counter() - start
