"""Which form of fine-tuning fits the memory at hand: what is trained at once, and what that takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from lsiq.errors import ResourceError
from lsiq.methods.finetune.eight_bit import CHUNK, COPIES, MOMENT_BYTES
from lsiq.methods.finetune.loss import LOGITS
from lsiq.models.shape import Shape
from lsiq.parts.dense import Dense
from lsiq.runtime import processes
from lsiq.runtime.device import RESIDENT_SHARE
from lsiq.runtime.memory import free_bytes, taken_bytes
from lsiq.runtime.micro_batch import AGAIN

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.methods.finetune.settings import FineTune
    from lsiq.models.loading import Model

# A step of Adam in float32 keeps, of each number that is trained: itself, its gradient and two moments.
ADAM_BYTES = 16
# The same with moments of 8 bits, by optimizer states.
STATES_BYTES = {"float32": ADAM_BYTES, "int8": 8 + MOMENT_BYTES}
# Of so many numbers and more the optimizer moves each where it lies; of fewer it makes one copy, which takes less time
# to launch, and gives what runs before there were forms gave.
FUSED = 2**30
# Singular vectors of both sides, which stand beside increments of singular values, in bytes for each weight.
VECTOR_BYTES = 12
# Copies in float32 of the weights of a block while they are made and rounded, and gradients go back through that.
WEIGHT_COPIES = 8
# Of the logits of a part of a batch: those of both models, their logarithms and gradients.
LOGIT_COPIES = 5
# What enters and leaves the blocks in both models, what enters the window, and the outputs to come close to.
STREAMS = 4
# Of the attention scores of a block, where heads share keys: torch keeps these in float32.
SCORE_COPIES = 3
# Of the free memory; the rest is lost between tensors.
USABLE = 0.9
# Of the free memory, what blocks may leave behind for the way back; they compute it again where it is more.
KEPT = 0.25
GIB = 2**30


@dataclass(frozen=True)
class Form:
    """What is trained at once.

    Attributes:
        window: blocks of a window; None where there are no windows.
        bytes: what training takes of the device by estimate, and how much there is room for.
        sequences: how many pass at once by that estimate.
    """

    trained: Literal["all", "window", "grid"]
    window: int | None
    bytes: int
    room: int
    sequences: int

    @property
    def fits(self) -> bool:
        return self.bytes <= self.room

    @property
    def words(self) -> str:
        """What it is called."""
        return self.trained if self.window is None else f"{self.trained} of {self.window} blocks"

    @property
    def reason(self) -> str:
        """Why this one, in words for the record."""
        return f"{self.bytes / GIB:.1f} of {self.room / GIB:.1f} GiB with {self.sequences} sequences at once"

    def of(self, settings: FineTune) -> FineTune:
        """Return the settings with this form instead of `auto`."""
        return settings.as_form(self.trained, self.window)


def form_for(settings: FineTune, model: Model, quant: QuantSettings, samples: int, seqlen: int) -> Form:
    """Return the form in which a model is fine-tuned on its device, the same one in all processes.

    Args:
        samples: calibration sequences, those of all processes.

    Raises:
        ResourceError: `auto`, and no form fits.
    """
    shape = Shape.of_config(model.spec.model_type, model.config)
    share = processes.share(samples, process=0)
    load = Load.of(settings, shape, model.depth, model.dtype, quant, share.stop - share.start, seqlen)
    if settings.memory is not None:
        room = max(0, int(settings.memory * GIB) - taken_bytes(model.device))
    else:
        room = min(processes.gather(int(USABLE * free_bytes(model.device))))
    form = choose(settings, load, room)
    if settings.trained == "auto" and settings.together and not form.fits:
        raise ResourceError(f"method.trained=auto: {refusal(settings, form)}")
    return form


def refusal(settings: FineTune, least: Form) -> str:
    """Say that not even the least form fits, and what to do."""
    return (
        f"no form of {settings.name} fits {least.room / GIB:.1f} GiB; the least, {least.words}, takes "
        f"{least.bytes / GIB:.1f} with {least.sequences} sequences at once: use a device with more memory, a shorter "
        f"calib.seqlen, or method.trained={least.trained} to try it nevertheless"
    )


@dataclass(frozen=True)
class Load:
    """What decides the memory that fine-tuning takes.

    Attributes:
        shape: of the model.
        samples, seqlen: of the calibration sequences that a process holds.
        group: weights that share a step size.
        itemsize: bytes of a number in a stream, and of one while the model is trained.
    """

    shape: Shape
    depth: int
    samples: int
    seqlen: int
    group: int
    itemsize: int
    precision: int

    @classmethod
    def of(
        cls,
        settings: FineTune,
        shape: Shape,
        depth: int,
        dtype: torch.dtype,
        quant: QuantSettings,
        samples: int,
        seqlen: int,
    ) -> Load:
        """Count what a model of this shape, whose streams are of `dtype`, takes in a format."""
        groups = [fmt.width or shape.width for fmt in quant.formats if fmt.bits < 16]
        name = settings.training.precision
        # What auto stands for is measured later; nothing is wider than float32.
        precision = dtype if name == "model" else getattr(torch, "float32" if name in ("auto", "tf32") else name)
        group = min(groups, default=shape.width)
        return cls(shape, depth, samples, seqlen, group, dtype.itemsize, precision.itemsize)

    def bytes(self, settings: FineTune, trained: str, window: int | None, sequences: int, room: int) -> int:
        """Return the bytes of the device that a form takes with so many sequences at once."""
        # Codes; step sizes and zero points in float32.
        resting = int(self.depth * self.shape.weights * (1 + 8 / self.group))
        tokens = sequences * self.seqlen
        block = _block_bytes(self.shape, tokens, self.precision)
        between = self.precision * self.depth * tokens * self.shape.width
        logits = 4 * LOGIT_COPIES * min(LOGITS, tokens * self.shape.vocabulary)
        streams = STREAMS * self.samples * self.seqlen * self.shape.width * self.itemsize
        resident = streams if streams <= RESIDENT_SHARE * room else 0
        trained_bytes = self.trained_bytes(settings, trained, window)
        # Copies are made once the rest of a step is done.
        copies = self._copies(settings, trained, window)
        return trained_bytes + resting + max(block + between + logits, copies) + resident

    def trained_bytes(self, settings: FineTune, trained: str, window: int | None) -> int:
        """Return the bytes that are kept of what is trained at once, Adam's moments included."""
        blocks = self._blocks(settings, trained, window)
        each = 0.0
        if settings.part is not None and trained != "grid":
            each = STATES_BYTES[settings.states] + (0 if isinstance(settings.part, Dense) else VECTOR_BYTES)
            each += 2 if settings.latents else 0
        each += ADAM_BYTES / self.group if settings.scales is not None else 0
        return int(each * blocks * self.shape.weights)

    def _copies(self, settings: FineTune, trained: str, window: int | None) -> int:
        """Bytes of what the optimizer copies while it moves."""
        if settings.states == "int8" and trained != "grid":
            return 4 * COPIES * CHUNK
        return 4 * min(FUSED, self.trained_bytes(settings, trained, window) // ADAM_BYTES)

    def _blocks(self, settings: FineTune, trained: str, window: int | None) -> int:
        """How many blocks are trained at once."""
        if not settings.together:
            return 1
        count = min(settings.blocks or self.depth, self.depth)
        return min(window or count, count) if trained == "window" else count

    def largest_window(self, settings: FineTune, sequences: int, room: int) -> int:
        """Return how many blocks at most a window may have; 0 where there is no room for one."""
        count = min(settings.blocks or self.depth, self.depth)
        fitting = (n for n in range(count, 0, -1) if self.bytes(settings, "window", n, sequences, room) <= room)
        return next(fitting, 0)


def choose(settings: FineTune, load: Load, room: int) -> Form:
    """Return the form that the settings ask for, or for `auto` the first that fits into `room` bytes, else the least.

    A form fits if it does with one sequence at a time. Of a window that is to be as large as fits, the size is told for
    the whole batch, or, where not even one block fits beside that, for half of it, and so on.
    """
    forms = list(_forms(settings, load, room))
    return next((form for form in forms if form.fits), min(forms, key=lambda form: form.bytes))


def _forms(settings: FineTune, load: Load, room: int) -> Iterator[Form]:
    """The forms in question, the best first, each with ever fewer sequences at once."""
    sequences = [settings.training.batch]
    while sequences[-1] > 1:
        sequences.append((sequences[-1] + 1) // 2)

    def form(trained: Literal["all", "window", "grid"], window: int | None, count: int) -> Form:
        return Form(trained, window, load.bytes(settings, trained, window, count, room), room, count)

    asked = settings.trained
    if asked in ("auto", "all"):
        yield from (form("all", None, count) for count in sequences)
    if not settings.together:
        return
    if asked in ("auto", "window"):
        for count in sequences:
            yield form("window", settings.window or max(1, load.largest_window(settings, count, room)), count)
    if asked == "grid" or (asked == "auto" and settings.part is not None and settings.trains_grid):
        yield from (form("grid", None, count) for count in sequences)


def kept_bytes(shape: Shape, depth: int, heads: int, sequences: int, seqlen: int, itemsize: int) -> int:
    """Return the bytes that so many blocks leave behind for the way back, if none of it is computed again.

    Args:
        heads: those of the queries.
        itemsize: bytes of a number while the model is trained.
    """
    tokens = sequences * seqlen
    scores = itemsize * SCORE_COPIES * heads * tokens * seqlen
    return depth * (_block_bytes(shape, tokens, itemsize) + scores)


def _block_bytes(shape: Shape, tokens: int, itemsize: int) -> int:
    """What a block makes of its weights and of so many tokens, in bytes; attention scores are left out."""
    return 4 * WEIGHT_COPIES * shape.weights + itemsize * shape.activations(tokens)


def smaller(settings: FineTune) -> str:
    """What to do where not even one sequence fits."""
    again = "method.memory=GIB chooses a smaller form by trained=auto and keeps the finished blocks"
    if not settings.together or settings.trained == "grid":
        return f"this is the least form; use a shorter calib.seqlen, or {AGAIN}"
    if settings.trained == "window" and settings.window != 1:
        fewer = "fewer" if settings.window is None else str(settings.window // 2)
        return f"use method.window={fewer}, or method.trained=grid; {again}; or {AGAIN}"
    form = "window" if settings.trained == "all" else "grid"
    return f"use method.trained={form}; {again}; or {AGAIN}"
