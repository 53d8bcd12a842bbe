"""The dry run of what cannot be tried out in its true size: a narrow model is tried, and its costs are scaled up.

The narrow model is about 512 channels wide and is given few short sequences. Of each thing that is timed, two lengths
of sequence tell what goes to the tokens from what goes to the weights. What goes to the tokens is scaled by
floating-point operations, what goes to the weights by their number. That leaves out that factorisations are cubic in
the width; scaled as cubic, a block of gptq came out two and a half times too long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lsiq.data.tokens import random_windows
from lsiq.experiment.probe import EPOCHS, ProbedBlock, probe_block, probe_evaluation, shortened
from lsiq.experiment.quantize import prepare_model
from lsiq.methods.base import Method, chain
from lsiq.methods.finetune import FineTune
from lsiq.methods.finetune.tuner import tune
from lsiq.methods.finetune.windows import groups
from lsiq.models.context import Ahead, Context
from lsiq.models.loading import Model
from lsiq.models.shape import Shape
from lsiq.pipeline.block_loop import STREAMS
from lsiq.results.store import BlockStore
from lsiq.runtime.memory import peak_bytes

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig
    from lsiq.formats.quant import QuantSettings
    from lsiq.results.record import Record


# Tokens of the short and of the long sequences that are tried.
SHORT, LONG = 64, 256
# Channels of the narrow model, about; a multiple of the group and of a head.
WIDTH = 512
# Epochs of fine-tuning that are tried.
TUNED = 2


def narrowed(architecture: Mapping[str, Any], quant: QuantSettings, depth: int) -> dict[str, Any]:
    """Return the configuration of a narrow model of the same family: heads of the same size, fewer of them."""
    shape = dict(architecture)
    opt = shape["model_type"] == "opt"
    width, heads = int(shape["hidden_size"]), int(shape["num_attention_heads"])
    head = int(shape.get("head_dim") or width // heads)
    group = math.lcm(*(fmt.width or 1 for fmt in quant.formats if fmt.bits < 16))
    fewer = min(heads, max(2, WIDTH // head))
    while fewer < heads and fewer * head % group:
        fewer += 1
    share = fewer / heads
    inner_key = "ffn_dim" if opt else "intermediate_size"
    multiple = max(group, 128)
    inner = max(multiple, round(int(shape[inner_key]) * share / multiple) * multiple)
    if fewer == heads:
        inner = int(shape[inner_key])
    key_values = int(shape.get("num_key_value_heads") or heads)
    kv_heads = max(number for number in range(1, max(1, round(key_values * share)) + 1) if fewer % number == 0)
    shape |= {"num_attention_heads": fewer, "num_hidden_layers": depth, inner_key: inner}
    shape |= {"hidden_size": width if fewer == heads else fewer * head}
    if opt:
        shape["word_embed_proj_dim"] = shape["hidden_size"]
    else:
        shape["num_key_value_heads"] = kv_heads
    if shape.get("layer_types"):
        shape["layer_types"] = shape["layer_types"][:depth]
    if int(shape.get("max_position_embeddings", LONG)) < LONG:
        shape["max_position_embeddings"] = LONG
    return shape


def one_at_a_time(method: Any) -> Any:
    """Return the method, and what it hands on to, with steps of one sequence and few epochs."""
    changes: dict[str, Any] = {}
    if (training := method.training) is not None:
        changes["training"] = replace(training, batch=1)
    if isinstance(then := getattr(method, "then", None), Method):
        changes["then"] = one_at_a_time(then)
    return shortened(replace(method, **changes) if changes else method)


class Narrow:
    """The narrow model, and what was found by trying it.

    Args:
        architecture: of the true model.
    """

    def __init__(
        self, config: RunConfig, architecture: Mapping[str, Any], model: Model, store: BlockStore, record: Record
    ) -> None:
        self.config, self.model, self.store, self.record = config, model, store, record
        self.true, self.tried = Shape.of(architecture), Shape.of_config(model.spec.model_type, model.config)
        self.depth = int(architecture["num_hidden_layers"])
        self.grown = self.true.weights / self.tried.weights
        self.resident = peak_bytes()["host"]

    def _cut(self, tokens: int) -> RunConfig:
        calib = replace(self.config.calib, seqlen=tokens, batch=1)
        return replace(self.config, calib=calib, eval=replace(self.config.eval, seqlen=tokens, batch=1))

    def quantize(self, method: Method, samples: int) -> tuple[float, dict[str, int]]:
        """Return the seconds in which all blocks are quantised, and the peak, but for streams and checkpoint."""
        quick = one_at_a_time(method)
        tokens = random_windows(self.model.config.vocab_size, 1, SHORT, self.config.seed)
        self.prepared = prepare_model(self._cut(SHORT), quick, self.model, tokens, self.store, self.record)
        if not samples:
            cost = self._probe(quick, 0, SHORT)
            return self.depth * cost.seconds * self.grown, {"host": self._peak(cost, None, 1)}
        self._probe(shortened(quick, 1), 1, SHORT)  # libraries load
        low, high = (self._probe(quick, 2, tokens) for tokens in (SHORT, LONG))
        trainings = [link.training for link in chain(method) if link.training is not None]
        tried = max((min(t.epochs, EPOCHS) for t in trainings), default=0)
        step = self._line(low.epoch_seconds / 2, high.epoch_seconds / 2)
        trained = 0.0
        for training in trainings:
            steps = training.epochs * training.batches(samples)
            learning = steps * (step[0] * self.grown + step[1] * self._operations() * min(training.batch, samples))
            trained += learning if training.seconds is None else min(learning, training.seconds)
        rests = [cost.seconds - tried * cost.epoch_seconds for cost in (low, high)]
        per_operation = max(0.0, rests[1] - rests[0]) / (2 * (self._tried(LONG) - self._tried(SHORT)))
        fixed = max(0.0, rests[0] - 2 * per_operation * self._tried(SHORT))
        seconds = fixed * self.grown + samples * per_operation * self._operations() + trained
        batch = max(self.config.calib.batch, *(t.batch for t in trainings), 1)
        return self.depth * seconds, {"host": self._peak(low, high, batch)}

    def _probe(self, method: Method, samples: int, tokens: int) -> ProbedBlock:
        return probe_block(self._cut(tokens), self.prepared, method, samples or None, self.store, False)

    def _tried(self, tokens: int) -> float:
        return self.tried.operations(tokens)

    def _operations(self) -> float:
        return self.true.operations(self.config.calib.seqlen)

    def _line(self, short: float, long: float) -> tuple[float, float]:
        """Split seconds of one sequence into those of the weights and those of one operation."""
        slope = max(0.0, long - short) / (self._tried(LONG) - self._tried(SHORT))
        return max(0.0, short - slope * self._tried(SHORT)), slope

    def _peak(self, low: ProbedBlock, high: ProbedBlock | None, batch: int) -> int:
        peaks = [max(cost.learning["host"], cost.running["host"]) - self.resident for cost in (low, high or low)]
        span = self.tried.activations(LONG) - self.tried.activations(SHORT)
        slope = max(0.0, peaks[1] - peaks[0]) / span
        fixed = max(0.0, peaks[0] - slope * self.tried.activations(SHORT))
        return int(self.resident + fixed * self.grown + slope * batch * self.true.activations(self.config.calib.seqlen))

    def evaluate(self, windows: int) -> tuple[float, int]:
        """Return the seconds in which so many windows are measured on all models, and how many models there are."""
        probe_evaluation(self._cut(SHORT), self.model, self.prepared, 1, self.store)  # libraries load
        cost = probe_evaluation(self._cut(LONG), self.model, self.prepared, 2, self.store)
        seqlen = self.config.eval.seqlen
        running = max(0.0, cost.block_seconds - self.model.depth * cost.preparing) / (2 * self.model.depth)
        window_seconds = running * self.true.operations(seqlen) / self._tried(LONG)
        score = cost.score_seconds / 2 * self.true.head_operations(seqlen) / self.tried.head_operations(LONG)
        return self.depth * (cost.preparing * self.grown + windows * window_seconds) + windows * score, cost.models

    def tune(self, method: FineTune, samples: int) -> float:
        """Return the seconds of fine-tuning."""
        quick = replace(
            method.as_form("all", None),
            training=replace(method.training, batch=1, epochs=TUNED),
            blocks=None,
            together=True,
        )
        finetune = quick.after(str(self.store.folder.parent))
        took = []
        for tokens in (SHORT, LONG):
            ids = random_windows(self.model.config.vocab_size, 2, tokens, self.config.seed)
            hidden, kwargs = self.prepared.embed(ids, 1)
            block = partial(self.prepared.block, kwargs=kwargs)
            ahead = Ahead(self.prepared.depth, block, self.prepared.logits, lambda index, hidden=hidden: hidden)
            generator = torch.Generator().manual_seed(self.config.seed)
            context = Context(hidden, None, generator, 1, lambda values: None, ids, ahead)
            start = time.perf_counter()
            tune(finetune, self.config.quant, context)
            took.append((time.perf_counter() - start) / (2 * TUNED))
        tried = [self.prepared.depth * self._tried(t) + self.tried.head_operations(t) for t in (SHORT, LONG)]
        per_operation = max(0.0, took[1] - took[0]) / (tried[1] - tried[0])
        per_weight = max(0.0, took[0] - per_operation * tried[0]) / (self.prepared.depth * self.tried.weights)
        seqlen, seconds = self.config.calib.seqlen, 0.0
        for group in groups(method, self.depth, samples):
            # Tokens pass the blocks from the group on; weights are made anew in those that are trained.
            operations = (self.depth - group.blocks[0]) * self._operations() + self.true.head_operations(seqlen)
            weights = per_weight * len(group.blocks) * self.true.weights
            seconds += group.steps * (weights + per_operation * operations * method.training.batch)
        return seconds

    def streams(self, samples: int, seqlen: int, count: int = STREAMS) -> int:
        return count * samples * seqlen * self.true.width * self.model.dtype.itemsize
