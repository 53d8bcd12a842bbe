"""The stages of a dry run of a large model or of a method that trains whole models, from a narrow model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from lsiq.evals.windows import STATES_BYTES
from lsiq.experiment.estimate import READING, Estimate, ahead_of, stored_bytes
from lsiq.experiment.narrow_model import Narrow, narrowed
from lsiq.experiment.probe import architecture, probe_architecture
from lsiq.experiment.probed_formats import allocation_costs
from lsiq.formats.placed import check_widths
from lsiq.methods.base import Method
from lsiq.methods.finetune import FineTune
from lsiq.methods.finetune.form import GIB, USABLE, Form, Load, choose, refusal
from lsiq.methods.finetune.windows import groups
from lsiq.methods.rtn import RTN
from lsiq.models.families import find_spec
from lsiq.models.shape import Shape
from lsiq.report.terminal import PlannedStage
from lsiq.results.store import BlockStore
from lsiq.runtime.memory import host_bytes, reset_peak
from lsiq.runtime.streams import stored_in

# Weights of a block that are tried out in their true size on a CPU.
LARGEST = 20_000_000


class NarrowEstimate(Estimate):
    """An estimate from a narrow model, scaled up."""

    def stages(self) -> tuple[list[PlannedStage], list[str]]:
        config = self.config
        shape = architecture(config, self.folder)
        self.true = Shape.of(shape)
        self._check_widths(shape)
        depth = max(2, 1 + (ahead_of(config.method) if isinstance(config.method, Method) else 0))
        narrow = narrowed(shape, config.quant, min(self.depth, depth))
        start = time.perf_counter()
        self.model, self.checkpoint, drawing = probe_architecture(config, self.folder, narrow, self.device)
        config.check_lengths(self.model.limit)
        self.outside, self.block_bytes = 2 * self.true.outside, 2 * self.true.weights
        self.per_byte = drawing / (2 * Shape.of(narrow).outside) if config.model.weights == "random" else 1 / READING
        self.mapped = self._mapped()
        loading = time.perf_counter() - start - drawing + self.outside * self.per_byte
        self._check_texts()
        self.notes.append(
            f"costs are those of a model {narrow['hidden_size']} wide, scaled up to {self.true.width} by operations"
        )
        stages = [PlannedStage("load", loading, {})]
        with tempfile.TemporaryDirectory() as place, stored_in(self._stream_folder()):
            store = BlockStore(Path(place) / "blocks")
            store.clear()
            reset_peak()
            self.narrow = Narrow(config, shape, self.model, store, self.record)
            if self.asked.quant.allocate.active:
                block, head = allocation_costs(config, self.model)
                tokens, tried = config.calib.seqlen, self.narrow.tried
                block *= self.true.operations(tokens) / tried.operations(tokens)
                head *= self.true.head_operations(tokens) / tried.head_operations(tokens)
                stages.append(self._allocate((block, head)))
            if config.quant.name != "fp16":
                stages += self._quantize_stages()
            if config.eval.corpora:
                stages.append(self._evaluation())
        if config.eval.tasks:
            self.notes.append("tasks are not estimated: their items are not read")
        self._say_what_does_not_fit(stages)
        return stages, self.notes

    def _check_widths(self, shape: dict) -> None:
        """Raise ConfigError where the format does not fit the true linears."""
        spec = find_spec(shape["model_type"], self.config.model.name)
        last = spec.writers[1]
        widths = {name: self.true.inner if name == last else self.true.width for name in spec.linears}
        check_widths(self.config.quant, widths)

    def _mapped(self) -> int:
        if self.config.model.weights == "random":
            return 0
        self.notes.append(f"weights are read at {READING / 1e9:.0f} GB/s")
        if stored := stored_bytes(self.folder):
            return stored
        self.notes.append("the checkpoint holds two bytes per weight")
        return self.outside + self.depth * self.block_bytes

    def _quantize_stages(self) -> Iterable[PlannedStage]:
        method, samples = self.config.method, self._samples()
        first = method if isinstance(method, Method) else getattr(method, "start", None)
        seconds, peaks = self.narrow.quantize(first or RTN(), samples)
        seconds += self.depth * self.block_bytes * self.per_byte
        in_memory = self.config.paths.streams == "memory" and samples
        streams = self.narrow.streams(samples, self.config.calib.seqlen)
        if not in_memory and samples:
            self.notes.append(f"streams take {streams / 2**30:.2f} GiB of the disk")
        peaks = {"host": peaks["host"] + self.mapped + (streams if in_memory else 0)}
        if isinstance(method, Method):
            yield PlannedStage("quantize", seconds, peaks)
            return
        assert isinstance(method, FineTune)
        if method.start is not None:
            yield PlannedStage("start", seconds, peaks)
        yield self._tuning(method, samples)

    def _tuning(self, method: FineTune, samples: int) -> PlannedStage:
        form, load = self._form(method, samples)
        method = form.of(method)
        seconds = self.narrow.tune(method, samples) + self.depth * self.block_bytes * self.per_byte
        adam = load.trained_bytes(method, form.trained, form.window)
        self.notes.append(
            f"{method.name} trains through the whole model by {form.words}{self._each(method)}, {form.sequences} "
            f"sequences at once: {adam / GIB:.1f} GiB for what is trained at once (number and gradient in float32, two "
            f"moments in {method.states}) and {(form.bytes - adam) / GIB:.1f} besides, and there are "
            f"{form.room / GIB:.1f}"
        )
        base = self.narrow.resident + self.mapped
        # What enters the blocks, and what the float model makes of it.
        streams = self.narrow.streams(samples, self.config.calib.seqlen, 2)
        if self.device.type == "cuda":
            return PlannedStage("quantize", seconds, {"host": base + streams, "device": form.bytes + self.outside})
        return PlannedStage("quantize", seconds, {"host": base + form.bytes})

    def _each(self, method: FineTune) -> str:
        """How many windows there are, and how long each is trained."""
        if method.trained != "window":
            return ""
        (group,) = groups(method, self.depth, 1)
        return f" ({len(group.windows)} with {method.weight_epochs} epochs each)"

    def _form(self, method: FineTune, samples: int) -> tuple[Form, Load]:
        """The form of fine-tuning that the run would take on this machine, or within `method.memory`."""
        seqlen, dtype = self.config.calib.seqlen, self.model.dtype
        load = Load.of(method, self.true, self.depth, dtype, self.config.quant, samples, seqlen)
        outside = dtype.itemsize * self.true.outside
        if method.memory is not None:
            room = int(method.memory * GIB)
            outside = outside if self.device.type == "cuda" else 0  # a run does not count what it holds on a CPU
        else:
            whole = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 0
            room = int(USABLE * (whole or host_bytes()))
        form = choose(method, load, max(0, room - outside))
        if not form.fits:
            self.notes.append(refusal(method, form))
        return form, load

    def _evaluation(self) -> PlannedStage:
        windows, config = self._windows(), self.config.eval
        if not hasattr(self.narrow, "prepared"):
            self.narrow.prepared = self.model
        seconds, models = self.narrow.evaluate(windows)
        seconds += self.depth * self.block_bytes * self.per_byte
        window_bytes = self.narrow.streams(windows, config.seqlen, 1)
        host = (
            self.narrow.resident
            + self.mapped
            + (window_bytes if config.divergence and window_bytes <= STATES_BYTES else 0)
        )
        host += models * window_bytes if self.config.paths.streams == "memory" else 0
        # The float block and one of each other model, and the logits of a batch.
        work = 4 * (1 + models) * self.true.weights + 4 * 3 * config.batch * config.seqlen * self.true.vocabulary
        if self.device.type == "cuda":
            return PlannedStage("evaluate", seconds, {"host": host, "device": work})
        return PlannedStage("evaluate", seconds, {"host": host + work})

    def _say_what_does_not_fit(self, stages: Iterable[PlannedStage]) -> None:
        memory = {"host": host_bytes()}
        if self.device.type == "cuda":
            memory["device"] = torch.cuda.get_device_properties(self.device).total_memory
        for stage in stages:
            for place, peak in stage.peaks.items():
                if peak > memory[place]:
                    self.notes.append(
                        f"{stage.name} does not fit: it needs {peak / 2**30:.1f} GiB of {place} memory, and there are "
                        f"{memory[place] / 2**30:.1f} GiB"
                    )
