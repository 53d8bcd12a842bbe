"""Quantising a model without a run's folder, and what can be done with the result."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq.allocation.units import check_solver
from lsiq.api.models import FloatModel, load_model
from lsiq.api.recipes import Calibration, Recipe
from lsiq.cli.compose import compose
from lsiq.data.corpora import read_corpus
from lsiq.data.tokens import cut_windows, token_hash
from lsiq.errors import ConfigError
from lsiq.evals.block_pass import FunctionOf, run_blocks
from lsiq.evals.perplexity import Perplexity
from lsiq.evals.perplexity import perplexity as measure
from lsiq.experiment.calibrate import NOTHING_KEPT, calibration_tokens
from lsiq.experiment.checks import check_formats
from lsiq.experiment.composed import plain_config
from lsiq.experiment.config import RunConfig, parse
from lsiq.experiment.export import export
from lsiq.experiment.quantize import block_row
from lsiq.experiment.rounded_choices import check_rounding
from lsiq.experiment.sharing import Sharing
from lsiq.export.source import Source
from lsiq.formats.names import as_format
from lsiq.formats.placed import place
from lsiq.formats.quant import QuantSettings
from lsiq.methods.base import Method, WholeMethod
from lsiq.methods.finetune import FineTune
from lsiq.methods.finetune.form import form_for
from lsiq.models.folder import find_tokenizer
from lsiq.models.loading import Model
from lsiq.models.result import BlockResult
from lsiq.pipeline.block_loop import BlockReport
from lsiq.pipeline.block_loop import quantize as quantize_blocks
from lsiq.pipeline.cost import float_cost, model_cost
from lsiq.pipeline.prepare import prepare
from lsiq.results.memory_store import MemoryStore
from lsiq.results.record import Record, source_state, versions
from lsiq.results.store import BlockStore
from lsiq.settings import build, fill
from lsiq.track.block_table import block_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class QuantizedModel:
    """A quantised model: the float model it was made of, and the blocks that stand in for its own.

    Attributes:
        source: the float model.
        prepared: the same as the blocks want it: rotated or after a prefix where the method asked for that.
        store: the blocks.
        reports: one row per block: error, seconds, average bits, metrics of the method.
        cost: bits, bytes and multiply-accumulates; see `lsiq.pipeline.cost.model_cost`.
        calibration: samples, sequence length and hash of the calibration tokens; empty where there were none.
        seed: of everything random.
    """

    source: FloatModel
    prepared: Model
    quant: QuantSettings
    method: Method | WholeMethod
    store: MemoryStore | BlockStore
    reports: list[dict[str, Any]]
    cost: Mapping[str, Any]
    calibration: Mapping[str, Any]
    seed: int = 0

    def __repr__(self) -> str:
        # The fields hold whole models, which would fill pages of a notebook.
        settings = f"{self.quant.name}, {self.method.name}, seed {self.seed}"
        return f"QuantizedModel({self.source.name}, {settings}, {self.average_bits:.3f} bits per weight)"

    @property
    def average_bits(self) -> float:
        """Bits per original weight of the quantised linears, scales, zero points and all else counted."""
        return self.cost["average_bits"]

    @property
    def seqlen(self) -> int:
        """Tokens per window, unless somebody asks for others."""
        return self.source.seqlen

    def block(self, index: int) -> BlockResult:
        """Return the codes and floats of one block, on the CPU."""
        return self.store.read(index)

    @property
    def function_of(self) -> FunctionOf:
        """What turns a float block into the quantised one."""
        return lambda block: block.with_result(self.store.read(block.index), self.quant.running)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits `(batch, T, vocabulary)`, float32, for token ids `(batch, T)`."""
        outputs = run_blocks(self.prepared, {"": [ids]}, {"": self.function_of}, lambda: None)
        return self.prepared.logits(outputs[""][0])

    def export(self, name: str, folder: str | Path, *overrides: str) -> dict[str, Any]:
        """Write the model for other programs, and return what reading it back found.

        Args:
            name: of conf/export/: compressed-tensors, gptq, gguf, plain.
            folder: to write; empty or new.
            overrides: as on the command line: `"export.round_scales=true"`.

        Raises:
            LsiqError: the format cannot hold the model, or the folder cannot be written.
        """
        with tempfile.TemporaryDirectory() as scratch:
            origin = self.source.on_disk(Path(scratch) / "checkpoint")
            assert origin.folder is not None
            config = self._config(origin, f"export={name}", f"export.folder={folder}", *overrides)
            assert config.export is not None
            tokenizer = find_tokenizer(origin.settings, origin.folder)
            source = Source(origin.model, self.store, self.quant, origin.folder, tokenizer)
            config.export.check_model(source)
            record = self._record(config)
            export(config.export, source, config, record, Path(scratch))
        return record.exports[name]

    def _config(self, origin: FloatModel, *words: str) -> RunConfig:
        """Return a run's settings that stand for this model."""
        composed = compose("method=rtn", "tracker=none", f"seed={self.seed}", *words)
        exporter = build(plain_config(composed)["export"], "export")
        composed["export"] = None  # it is checked with the formats of this model, not with those of the configuration
        plain = parse(composed)
        values = {field.name: getattr(plain, field.name) for field in fields(plain)}
        parts = {"model": origin.settings, "quant": self.quant, "method": self.method, "export": exporter}
        return fill(RunConfig, values | parts)

    def _record(self, config: RunConfig) -> Record:
        commit, clean = source_state()
        return Record(
            run_id="",
            status="finished",
            created="",
            config={},
            seed=self.seed,
            inputs={},
            calibration=dict(self.calibration),
            average_bits=self.average_bits,
            cost=dict(self.cost),
            blocks=self.reports,
            versions=versions(),
            commit=commit,
            clean=clean,
            command=f"lsiq.quantize({config.model.name}, {self.method.name}, {self.quant.name}, seed={self.seed})",
        )


def quantize(
    model: FloatModel | PreTrainedModel,
    method: Recipe | Method | WholeMethod,
    quant: QuantSettings,
    calibration: Calibration | Tensor | None = None,
    *,
    seed: int = 0,
    batch: int = 8,
    folder: str | Path | None = None,
) -> QuantizedModel:
    """Return `model` quantised block by block; the model itself stays as it is.

    Args:
        model: what `load_model` returned, or a model of transformers in memory.
        method: what `recipe` returned, or settings such as `lsiq.methods.gptq.GPTQ(…)`.
        quant: what `format` returned.
        calibration: what `tokens` returned, or token ids `(N, T)`; None for a method that needs none.
        seed: of everything random in the method.
        batch: sequences that pass through a block at once; what `tokens` returned has its own.
        folder: where blocks are kept, so that a later call with the same arguments goes on with them; None keeps them
            in memory. (A method that trains whole models uses a temporary one.)

    Raises:
        LsiqError: settings that do not fit the model or each other.
    """
    source = model if isinstance(model, FloatModel) else load_model(model)
    if isinstance(method, Recipe):
        method.method(quant, (0, 0))  # so that it is checked before texts are read
    check_formats(source.model, quant)
    tokens, batch = _calibration_tokens(source, calibration, batch)
    if isinstance(method, Recipe):
        method = method.method(quant, (0, 0) if tokens is None else (len(tokens), tokens.shape[1]))
    quant = _placed(quant, source, method, tokens, batch, seed)
    check_formats(source.model, quant)
    if tokens is None and method.needs and quant.name != "fp16":
        raise ConfigError(
            f"calibration=None: method {method.name} needs calibration tokens; give lsiq.tokens(…) or ids (N, T)"
        )
    if tokens is None and quant.kv.calibrated:
        raise ConfigError(
            "calibration=None: quant.kv.scale=calibrated needs calibration tokens; give lsiq.tokens(…) or ids (N, T)"
        )
    if isinstance(method, FineTune) and tokens is not None and quant.name != "fp16":
        method = form_for(method, source.model, quant, *tokens.shape).of(method)
    store: MemoryStore | BlockStore = MemoryStore() if folder is None else BlockStore(Path(folder) / "blocks")
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(method, FineTune) and method.start is not None:
            start = Path(folder or scratch) / "start"
            _fill(BlockStore(start / "blocks"), method.start, source.model, quant, tokens, batch, seed)
            method = method.after(str(start))
        prepared, reports = _fill(store, method, source.model, quant, tokens, batch, seed)
    costs = (report.cost for report in reports)
    cost = model_cost(prepared, costs if reports else [float_cost(prepared)] * prepared.depth, quant.outside())
    rows = [block_row(report, ()) for report in reports]
    facts = {}
    if tokens is not None:
        facts = {"samples": len(tokens), "seqlen": tokens.shape[1], "tokens": token_hash(tokens)}
    return QuantizedModel(source, prepared, quant, method, store, rows, cost, facts, seed)


def _placed(
    quant: QuantSettings,
    source: FloatModel,
    method: Method | WholeMethod,
    tokens: Tensor | None,
    batch: int,
    seed: int,
) -> QuantSettings:
    """Return the formats with those of each linear; where bits are to be shared out, they are."""
    model, layers = source.model, None
    if quant.allocate.active:
        check_solver(quant)
        try:
            check_rounding(quant, method)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if tokens is None:
            raise ConfigError(
                "calibration=None: quant.allocate measures sensitivities on calibration tokens; give lsiq.tokens(…) or "
                "ids (N, T)"
            )
        samples = tokens[: quant.allocate.samples]
        plan = Sharing(quant, model, source.name, method, samples, tokens, batch, seed, NOTHING_KEPT).plan()
        layers = {name: as_format(value) for name, value in plan.layers.items()}
    return place(quant, model.depth, model.spec.linears, source.name, layers)


def _fill(
    store: MemoryStore | BlockStore,
    method: Method | WholeMethod,
    model: Model,
    quant: QuantSettings,
    tokens: Tensor | None,
    batch: int,
    seed: int,
) -> tuple[Model, list[BlockReport]]:
    """Fill a store with quantised blocks, and show each as it is done; return the model as it was prepared."""
    prepared = prepare(method, quant, model, tokens, batch, seed, store)
    reports: list[BlockReport] = []
    if quant.name == "fp16":
        return prepared, reports
    with block_table(model.depth) as table:
        loop = quantize_blocks(prepared, method, quant, tokens, batch, seed, store, table.log)
        with contextlib.closing(loop):
            for report in loop:
                reports.append(report)
                table.add(block_row(report, ()))
    return prepared, reports


def _calibration_tokens(
    source: FloatModel, calibration: Calibration | Tensor | None, batch: int
) -> tuple[Tensor | None, int]:
    """Return the calibration tokens `(N, T)` and how many sequences pass through a block at once."""
    if calibration is None or isinstance(calibration, Tensor):
        if calibration is not None and (calibration.dim() != 2 or calibration.is_floating_point()):
            raise ConfigError(
                f"calibration: token ids (N, T) are expected, not a tensor {tuple(calibration.shape)} of "
                f"{calibration.dtype}"
            )
        return calibration, batch
    settings = calibration.settings(source.seqlen)
    if any(share.corpus != "random" for share in settings.shares()):
        _tokenizer(source)
    return calibration_tokens(settings, source.model, calibration.seed), settings.batch


def _tokenizer(source: FloatModel) -> Any:
    if source.tokenizer is None:
        raise ConfigError(f"{source.name}: has no tokenizer for texts; give load_model one, or give token ids (N, T)")
    return source.tokenizer


def perplexity(
    model: FloatModel | QuantizedModel | PreTrainedModel,
    text: str | Tensor = "bundled",
    *,
    seqlen: int | None = None,
    windows: int | None = None,
    batch: int = 8,
    path: str | None = None,
) -> Perplexity:
    """Return the perplexity of a model by the published protocol: windows without overlap, each read on its own.

    Args:
        text: a corpus by name (`file` reads `path`), of which the evaluation split is read; or token ids `(N, T)`.
        seqlen: tokens per window; None for the model's own.
        windows: only so many of the first; None for all.
        batch: windows that pass through a block at once.
        path: of the text for `file`, or a local copy of a hub corpus.

    Raises:
        InputError: the text cannot be read or is too short.
        NumericalError: the loss is not finite.
    """
    if not isinstance(model, FloatModel | QuantizedModel):
        model = load_model(model)
    source = model.source if isinstance(model, QuantizedModel) else model
    if isinstance(text, str):
        corpus = read_corpus(text, "evaluation", path)
        text = cut_windows(corpus, _tokenizer(source), seqlen or source.seqlen, path or text)
    if isinstance(model, QuantizedModel) and model.reports:
        return measure(model.prepared, text[:windows], batch, model.function_of, lambda: None)
    return measure(source.model, text[:windows], batch, lambda block: block.with_weights({}), lambda: None)
