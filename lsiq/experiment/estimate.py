"""What a run would take of memory and time, from a probe of one block of the true size."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lsiq.data.corpora import KINDS, read_corpus
from lsiq.data.tokens import cut_windows, random_windows
from lsiq.errors import InputError
from lsiq.evals.windows import STATES_BYTES
from lsiq.experiment.calibrate import SAMPLES_TO_MEASURE, check_texts
from lsiq.experiment.checks import check_formats
from lsiq.experiment.probe import (
    EvaluationCost,
    ProbedBlock,
    architecture,
    probe_block,
    probe_evaluation,
    probe_model,
    shortened,
    widened,
)
from lsiq.experiment.probed_formats import allocation_costs, allocation_steps, with_probed_formats
from lsiq.experiment.quantize import prepare_model
from lsiq.experiment.sharing import ROOM
from lsiq.methods.base import Method, chain
from lsiq.models.folder import folder_at_hand
from lsiq.models.gguf_file import is_gguf
from lsiq.models.loading import Model
from lsiq.models.widths import check_groups
from lsiq.pipeline.block_loop import STREAMS
from lsiq.report.terminal import PlannedStage
from lsiq.results.record import Record
from lsiq.results.store import BlockStore
from lsiq.runtime.device import RESIDENT_SHARE
from lsiq.runtime.memory import highest
from lsiq.runtime.streams import stored_in

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig


# Bytes of a checkpoint that are read and checked in a second.
READING = 2e9
# Tokens of the evaluation splits that lie on the hub, as LLaMA's tokenizer cuts them.
HUB_TOKENS = {"wikitext2": 341_469, "c4": 570_000, "ptb": 106_000, "pile": 2_000_000}
# Seconds; a window that takes longer is tried once, not by batches.
LONG_WINDOW = 1.0


class Estimate:
    def __init__(self, config: RunConfig, device: torch.device, record: Record) -> None:
        self.device, self.record = device, record
        self.folder = folder_at_hand(config.model)
        if self.folder is None and config.model.architecture is None:
            raise InputError(
                f"dry_run=true: the shape of {config.model.name} is not known here; give model.path=DIR with its "
                "config.json, or model.architecture={…}"
            )
        shape = architecture(config, self.folder)
        check_groups(config.quant, shape, config.model.name)
        self.asked, self.config = config, with_probed_formats(config, shape)
        self.depth = int(shape["num_hidden_layers"])
        self.notes: list[str] = []

    def stages(self) -> tuple[list[PlannedStage], list[str]]:
        """Return the stages of the run, and what was assumed."""
        config = self.config
        blocks = min(self.depth, max(2, 1 + ahead_of(config.method)))
        start = time.perf_counter()
        self.model, self.checkpoint, drawing = probe_model(config, self.folder, blocks, self.device)
        loading = time.perf_counter() - start
        check_formats(self.model, config.quant)
        config.check_lengths(self.model.limit)
        self._check_texts()
        self._size()
        if config.model.weights != "random":  # what was drawn is read instead
            loading += self.outside * self.per_byte - drawing
        stages = [PlannedStage("load", loading, {})]
        with tempfile.TemporaryDirectory() as folder, stored_in(self._stream_folder()):
            store = BlockStore(Path(folder) / "blocks")
            store.clear()
            assert isinstance(config.method, Method)  # the settings see to it
            method = shortened(config.method)
            tokens = random_windows(self.model.config.vocab_size, config.calib.batch, config.calib.seqlen, config.seed)
            prepared = prepare_model(config, method, self.model, tokens, store, self.record)
            if self.asked.quant.allocate.active:
                stages.append(self._allocate(allocation_costs(config, self.model)))
            if config.quant.name != "fp16":
                stages.append(self._quantize(prepared, method, store))
            if config.eval.corpora:
                stages.append(self._evaluate(prepared, store))
        if config.eval.tasks:
            self.notes.append("tasks are not estimated: their items are not read")
        return stages, self.notes

    def _check_texts(self) -> None:
        """Raise InputError where a calibration text at hand is too short, as far as this tokenizer can tell."""
        if self.config.model.weights != "random" and self.folder is None and self.config.model.tokenizer is None:
            self.notes.append("texts are cut by the bundled tokenizer, for the model's is not at hand")
        check_texts(self.config, self.model)

    def _size(self) -> None:
        """Find out how many bytes the checkpoint has, and how long one takes to be read."""
        for index in range(self.model.depth):  # from here on all are held, and nothing that is timed draws any
            block = self.model.block(index, {})
        elements = sum(weight.numel() for weight in block.weights.values())
        blocks = self.model.spec.blocks
        self.outside = 2 * sum(p.numel() for n, p in self.model.skeleton.named_parameters() if not n.startswith(blocks))
        self.block_bytes, self.mapped = 2 * elements, 0
        if self.config.model.weights == "random":
            self.per_byte = self.checkpoint.seconds / self.checkpoint.bytes
            return
        self.per_byte = 1 / READING
        self.notes.append(f"weights are read at {READING / 1e9:.0f} GB/s")
        self.mapped = self.outside + self.depth * self.block_bytes
        if stored := stored_bytes(self.folder):
            scale = stored / self.mapped
            self.mapped, self.block_bytes = int(self.mapped * scale), int(self.block_bytes * scale)
        else:
            self.notes.append("the checkpoint holds two bytes per weight")

    def _allocate(self, costs: tuple[float, float]) -> PlannedStage:
        """The stage that shares bits out; `costs` are seconds of one sequence through a block and through the head."""
        blocks, heads, passes = allocation_steps(self.asked, self.model, self.depth)
        seconds = blocks * costs[0] + heads * costs[1] + passes * self.depth * self.block_bytes * self.per_byte
        self.notes.append(
            f"sensitivities take {heads:.0f} runs of a sequence to the head and {blocks:.0f} through a block, unless "
            "they are in the cache"
        )
        return PlannedStage(
            "allocate",
            seconds,
            {"host": min(ROOM, int(heads) * self._stream_bytes(self.model, self.config.calib.seqlen))},
        )

    def _samples(self) -> int:
        """How many sequences the run calibrates on."""
        calib = self.config.calib
        samples = calib.sequences
        if calib.written:
            self.notes.append("the calibration text that the model writes is there; writing it is not estimated")
        return samples if self.config.calibrates else min(samples, SAMPLES_TO_MEASURE)

    def _quantize(self, model: Model, method: Any, store: BlockStore) -> PlannedStage:
        samples = self._samples()
        batch = max(self.config.calib.batch, *(getattr(t, "batch", 1) for t in _trainings(self.config.method)), 1)
        few, more = min(3 * batch, samples), min(6 * batch, samples)
        on_device = self._on_device(model, samples)
        # Libraries load and kernels are compiled, once. Where few and more are one, no line says what fewer take.
        sizes = (batch if few < more else few, few, more)
        first, *costs = (probe_block(self.config, model, method, count or None, store, on_device) for count in sizes)
        once = first.seconds - _line(*((c.samples, c.seconds) for c in costs))(first.samples)
        epochs, tried = (max((t.epochs for t in _trainings(m)), default=0) for m in (self.config.method, method))
        overhead = _line(*((c.samples, c.seconds - tried * c.epoch_seconds) for c in costs))(samples)
        trained = epochs * _line(*((c.samples, c.epoch_seconds) for c in costs))(samples)
        if limits := [t.seconds for t in _trainings(self.config.method) if getattr(t, "seconds", None) is not None]:
            trained = min(trained, max(limits))
        seconds = self.depth * (overhead + trained + self.block_bytes * self.per_byte) + max(once, 0.0)
        peaks = [self._quantize_peaks(model, costs[1], samples)]
        if (widest := widened(method)) != method:
            self.notes.append("a block needs float64 where method.precision=auto decides")
            cost = probe_block(self.config, model, widest, few or None, store, on_device)
            peaks.append(self._quantize_peaks(model, cost, samples))
        return PlannedStage("quantize", seconds, highest(peaks))

    def _quantize_peaks(self, model: Model, cost: ProbedBlock, samples: int) -> dict[str, int]:
        sample_bytes = self._stream_bytes(model, self.config.calib.seqlen)
        ahead = ahead_of(self.config.method)
        later = self.depth > 1  # of the first block both streams are the same one
        # While a method works: both streams, targets and those of later blocks; afterwards one that is being written.
        learning = sample_bytes * ((2 + ahead + later) * samples - (2 + ahead) * cost.samples)
        running = sample_bytes * ((3 + later) * samples - 3 * cost.samples)
        peaks = {"host": self.mapped - self.checkpoint.bytes}
        if self._on_device(model, samples):
            peaks["host"] += (
                max(cost.learning["host"], cost.running["host"]) + 2 * sample_bytes * samples
            )  # copies to be stored
            peaks["device"] = max(cost.learning["device"] + learning, cost.running["device"] + running)
            return peaks
        in_memory = self.config.paths.streams == "memory"
        peaks["host"] += max(cost.learning["host"] + in_memory * learning, cost.running["host"] + in_memory * running)
        if not in_memory:
            self.notes.append(f"streams take {4 * sample_bytes * samples / 2**30:.2f} GiB of the disk")
        if "device" in cost.learning:
            fed = sample_bytes * (2 + ahead)  # what is trained on goes there whole if it can
            grown = fed * (samples - cost.samples) if _trainings(self.config.method) else 0
            resident = grown if fed * samples <= RESIDENT_SHARE * self._room() else 0
            peaks["device"] = max(cost.learning["device"] + resident, cost.running["device"])
        return peaks

    def _on_device(self, model: Model, samples: int) -> bool:
        """Whether the streams of so many sequences will lie on a GPU."""
        size = STREAMS * samples * self._stream_bytes(model, self.config.calib.seqlen)
        return self.device.type == "cuda" and size <= RESIDENT_SHARE * self._room()

    def _room(self) -> int:
        """Bytes of the GPU that are free, or held by what was tried out."""
        return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)

    def _evaluate(self, model: Model, store: BlockStore) -> PlannedStage:
        batch = self.config.eval.batch
        windows = self._windows()

        def probe(count: int) -> EvaluationCost:
            return probe_evaluation(self.config, self.model, model, min(count, windows), store)

        first, again = probe(1), probe(1)
        once = max(first.seconds - again.seconds, 0.0)
        # Where one window takes long, a batch of them gains little and one is enough, whose peak is the run's.
        costs = [again, probe(batch)] if again.seconds > LONG_WINDOW else [probe(batch), probe(3 * batch)]
        blocks = _line(*((c.windows, c.block_seconds) for c in costs))(windows)
        scoring = _line(*((c.windows, c.score_seconds) for c in costs))(windows)
        reading = self.block_bytes * self.per_byte  # beside the work on a GPU, before it on a CPU
        ahead = self.device.type == "cuda"
        window_seconds = costs[1].pass_seconds(blocks, model.depth, self.depth, reading, ahead)
        seconds = costs[1].passes * window_seconds + scoring + once
        return PlannedStage("evaluate", seconds, self._evaluate_peaks(model, costs[1], windows))

    def _evaluate_peaks(self, model: Model, cost: EvaluationCost, windows: int) -> dict[str, int]:
        window_bytes = self._stream_bytes(model, self.config.eval.seqlen)
        grown = cost.models * window_bytes * (windows - cost.windows)
        peaks = dict(cost.peaks)
        peaks["host"] += self.mapped - self.checkpoint.bytes
        states = window_bytes * windows
        if self.config.eval.divergence and states <= STATES_BYTES:
            peaks["host"] += states - window_bytes * cost.windows
        if (
            self.device.type == "cuda"
            and cost.models * window_bytes * windows <= 0.25 * torch.cuda.mem_get_info(self.device)[0]
        ):
            peaks["device"] += grown
        elif self.config.paths.streams == "memory":
            peaks["host"] += grown
        return peaks

    def _windows(self) -> int:
        """How many windows all corpora have."""
        config, count = self.config.eval, 0
        for corpus in config.corpora:
            path = config.path if corpus == "file" else config.local.get(corpus)
            if corpus == "random":
                available = config.windows or 16
            elif corpus in ("bundled", "file", *KINDS) or path is not None:
                text = read_corpus(corpus, "evaluation", path, config.fields)
                available = len(cut_windows(text, self.model.tokenizer, config.seqlen, path or corpus))
            else:
                available = HUB_TOKENS[corpus] // config.seqlen
                self.notes.append(f"{corpus} has {HUB_TOKENS[corpus]} tokens")
            count += min(available, config.windows or available)
        return count

    def _stream_bytes(self, model: Model, seqlen: int) -> int:
        """Of one sequence."""
        return seqlen * model.config.hidden_size * model.dtype.itemsize

    def _stream_folder(self) -> Path | None:
        return Path(self.config.paths.runs) if self.config.paths.streams == "disk" else None


def stored_bytes(folder: Path | None) -> int:
    """Return how many bytes the weights of a checkpoint have on disk; 0 where only its shape is known."""
    if folder is None:
        return 0
    files = [folder] if is_gguf(folder) else [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return sum(file.stat().st_size for file in files)


def _line(first: tuple[float, float], second: tuple[float, float]) -> Callable[[float], float]:
    """Return the line through two points, level where they are one or it would fall."""
    (x, y), (far, value) = first, second
    slope = max(0.0, (value - y) / (far - x)) if far > x else 0.0
    return lambda at: max(value + slope * (at - far), 0.0)


def _trainings(method: Any) -> list[Any]:
    return [link.training for link in chain(method) if link.training is not None]


def ahead_of(method: Any) -> int:
    return max((training.ahead.blocks for training in _trainings(method) if hasattr(training, "ahead")), default=0)
