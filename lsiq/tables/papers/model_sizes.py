"""The sizes of model that tables have as columns, and how each was measured."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from lsiq.bundle.ladder import LADDER
from lsiq.report.compact import Run

TEXTS = {"file": "C4", "wikitext2": "WikiText-2"}


@dataclass(frozen=True)
class Size:
    """A size of model, and how it was measured: runs of another group or other windows stand elsewhere or nowhere.

    Attributes:
        name: heads its column.
        models: what its models are called in the records.
        tick: what a figure writes below it; empty where no figure has it.
        own: whether the ladder's recipe trained it.
        group: weights that share a step size, where they do so in groups.
        seqlen, windows: of the evaluation; None for the whole text.
        dtypes: in which the model may have been measured. TF32 moves the perplexities of SmolLM2 by less than 1 in
            10,000 (`analysis/records/float32.jsonl`).
        before: models of earlier trainings, which have the rows that `models` were not run with.
    """

    name: str
    models: tuple[str, ...]
    tick: str = ""
    group: int = 128
    seqlen: int = 512
    windows: int | None = 400
    dtypes: tuple[str, ...] = ("float32", "tf32")
    own: bool = True
    before: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Whatever its models are called."""
        return (*self.models, *self.before)

    def contradiction(self, run: Run) -> str | None:
        """Return what keeps a run out, the dotted name of a setting; None if it measured this size in this way."""
        stated = {"eval.seqlen": self.seqlen, "eval.windows": self.windows}
        if GROUPED.fullmatch(run.setting):
            stated["quant.weight.group"] = self.group
        if run.model not in self.names or run.get("model.outliers"):
            return "model"
        other = (key for key, value in stated.items() if run.get(key) != value)
        return next(other, None if run.dtype in self.dtypes else "model.dtype")

    def words(self, dtypes: Collection[str | None]) -> str:
        """How it was measured, products in which of its types."""
        windows = "the whole text in windows" if self.windows is None else f"{self.windows} windows"
        products = (
            f", products in {' or '.join(sorted(filter(None, dtypes))).replace('tf32', 'TF32')}"
            if "tf32" in dtypes
            else ""
        )
        return f"{windows} of {self.seqlen}{products}"


GROUPED = re.compile(r"(w\d)a16g(64|128)")


def width(setting: str) -> str:
    """Return the rows that a setting stands in: w2 for 2-bit weights in groups, others by their own names."""
    grouped = GROUPED.fullmatch(setting)
    return grouped[1] if grouped else setting


def training(run: Run) -> tuple[str, ...]:
    """Return what tells the run's model from another training of its name: that, and the float model's perplexities."""
    return run.model, *(f"{of:.4g}" for key, of in sorted(run.metrics.items()) if key.startswith("float/ppl/"))


def _rungs(*rungs: str) -> list[Size]:
    """The ladder's sizes; the bundled models are its rungs of 11 M."""
    bundled = {"llama-11m": ("tiny-llama",), "opt-11m": ("tiny-opt",)}
    before = {"llama-90m": ("l90",)}
    sizes = []
    for rung in rungs:
        count = rung.replace("m", " M")
        llama, opt = (f"{family}-{rung}" for family in ("llama", "opt"))
        sizes.append(Size(count, (llama, *bundled.get(llama, ())), count, before=before.get(llama, ())))
        sizes.append(Size(f"{count}, OPT", (opt, *bundled.get(opt, ()))))
    return sizes


SMOLLM2 = "smollm2-135m"
SIZES = (
    *_rungs(*LADDER),
    Size("SmolLM2", ("smol", SMOLLM2), "SmolLM2\n135 M", 64, 1024, 160, ("float32",), own=False),
    Size("SmolLM2, whole texts", (SMOLLM2,), "", 64, 2048, None, ("tf32",), own=False),
)
# The bundled LLaMA's shape, trained on the text and tokens of the other rungs, on fewer, and from another seed; and the
# rungs of 90 M and 300 M, trained once more by the same recipe, 300 M twice; and OPT of 30 M, in twice as many steps,
# twice.
AGAIN_90M, AGAIN_300M, THIRD_300M = "90 M, trained again", "300 M, trained again", "300 M, third training"
AGAIN_OPT, THIRD_OPT = "30 M, OPT, trained again", "30 M, OPT, third training"
TRAININGS = (
    Size("11 M, 40 M tokens", ("llama-11m-40M",)),
    Size("11 M, 100 M tokens", ("llama-11m-100M",)),
    Size("11 M, 100 M tokens, other seed", ("llama-11m-100M-s1",)),
    Size(AGAIN_90M, ("llama-90m-4",)),
    Size(AGAIN_300M, ("llama-300m-3",)),
    Size(THIRD_300M, ("llama-300m-4",)),
    Size(AGAIN_OPT, ("opt-30m-2",)),
    Size(THIRD_OPT, ("opt-30m-3",)),
)
BEFORE = frozenset(model for size in SIZES for model in size.before)
