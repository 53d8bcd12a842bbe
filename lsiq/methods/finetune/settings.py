"""Fine-tuning a quantised model beyond its blocks: through the rest of the model, on a loss of its outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lsiq.learning.schedule import TrainingSchedule
from lsiq.methods.base import Method, Traits, WholeMethod, chain
from lsiq.methods.learned import Learned
from lsiq.models.context import Context, Need
from lsiq.parts.dense import Dense
from lsiq.parts.singular import Singular
from lsiq.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lsiq.formats.quant import QuantSettings
    from lsiq.models.loading import Model


def _keeps_latents(method: Method | WholeMethod) -> bool:
    return isinstance(method, Learned) and method.latents


@settings
class FineTune(Traits):
    """Take a quantised model and train what costs nothing at inference in its last `blocks` blocks.

    The model is a finished `run` of any method, or what the method `start` makes first. Trained are, as far as they
    have a learning rate: `part`, an increment of each decoded weight `Ŵ`, rounded on the grid that is there; `scales`,
    a factor of each of the grid's step sizes, at codes that stay as they are; `floats`, the norms and the biases. So
    the start is the quantised model, bit for bit. With `latents` the increments add to the weights as they stood before
    they were rounded, if the method that made them keeps these: then codes near an edge flip first, and in few steps.

    The loss is that of the model's outputs: with `loss=text` the mean next-token loss on the calibration text, with
    `loss=float` the mean divergence `KL(float ‖ quantised)` of the next-token distributions. The blocks are trained
    `together`, or one after the other, the later ones standing still.

    What is trained at once follows from the memory at hand; `trained` says it:

    - `all`: all of it, in all blocks.
    - `window`: step sizes, norms and biases in all blocks, as with `all`, and the increments in a window of consecutive
      blocks. Windows follow one another from the first block to the last, and each has `window_epochs` epochs; in
      each the increments start at 0 and their rates run their whole course, divided by the root of the share of the
      epochs that it has. At its end the weights are rounded for good. The other blocks are held as codes. Rates of step
      sizes, norms and biases run one course over all windows.
    - `grid`: step sizes, norms and biases alone, in all blocks.
    - `auto`: the first of the three that fits. A run chooses before its first block and keeps to it.

    A weight in training takes 16 bytes, of which 8 are the optimizer's moments. With `states=int8` these take 2, so
    that windows hold more blocks. Moments of step sizes, norms and biases stay in float32.

    Source: LSI (arXiv 2406.16299, fine-tuning of a quantised model): increments in the last two blocks.
    EfficientQAT (arXiv 2407.11062, section 3.3): step sizes end to end.
    Deviation: the LSI paper does not say which loss it trains; the language model's own is the one that a text speaks
    to. EfficientQAT trains its step sizes on text; the float model's distribution says more per token.
    """

    label: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9.+-]*$",
        description="the method's name in records and tables; null: e2e, after the name of the method it starts from",
    )
    run: str | None = Field(
        None, min_length=1, description="the run to start from: its id below paths.runs or a folder"
    )
    start: Method | None = Field(None, description="instead of a run, the method to start from")
    blocks: int | None = Field(None, ge=1, description="how many of the last blocks are trained, at least 1; null: all")
    together: bool = Field(True, description="true trains all blocks at once, false one after the other")
    part: Any = Field(None, description="increments of the weights: singular, expansion or dense; null: none")
    latents: bool = Field(
        False, description="true starts the increments where the weights stood before rounding, which the start keeps"
    )
    scales: float | None = Field(None, gt=0, description="learning rate of the step sizes' logarithms; null: fixed")
    floats: float | None = Field(None, gt=0, description="learning rate of norms and biases; null: fixed")
    loss: Literal["text", "float"] = Field(
        "float", description="text (next token) or float (divergence from the model)"
    )
    training: TrainingSchedule = Field(description="how they are trained")
    trained: Literal["auto", "all", "window", "grid"] = Field(
        "auto",
        description="what is trained at once: all, window (of blocks, one after another), grid (step sizes, norms and "
        "biases), or auto (the first of them that fits the memory)",
    )
    window: int | None = Field(None, ge=1, description="blocks of a window, at least 1; null: as many as fit")
    window_epochs: int | None = Field(
        None, ge=1, description="epochs of each window, at most training.epochs; null: as many"
    )
    states: Literal["float32", "int8"] = Field(
        "float32",
        description="how the optimizer keeps the moments of increments: float32, or int8 (in blocks of 256, with a "
        "scale each), which makes room for larger windows",
    )
    memory: float | None = Field(
        None, gt=0, description="GiB of the device by which a form is chosen; null: nine tenths of what is free"
    )

    def __post_init__(self) -> None:
        if (self.run is None) == (self.start is None):
            raise ValueError("run and start: give one of them, a finished run or a method to begin with")
        if self.start is not None and any(method.adds_branches for method in chain(self.start)):
            raise ValueError(f"start: the low-rank products of {self.start.name} are not trained; start from another")
        if self.part is not None and not isinstance(self.part, (Singular, Dense)):
            raise ValueError(
                f"part={type(self.part).__name__}: grids stay as they are here; use singular, expansion or dense"
            )
        if self.part is not None and self.part.hardening:
            raise ValueError(
                f"part.hardening={self.part.hardening}: weights are rounded from the first step on here; set it to 0, "
                "or harden the blocks"
            )
        if self.latents and self.part is None:
            raise ValueError("latents=true: there are no increments of weights that could start there; give a part")
        if self.latents and self.start is not None and not any(_keeps_latents(m) for m in chain(self.start)):
            raise ValueError(f"latents=true: {self.start.name} keeps none; set method.start.latents=true")
        if self.part is None and self.scales is None and self.floats is None:
            raise ValueError("part, scales and floats: all null leaves nothing to train; give one of them")
        if self.trained == "grid" and not self.trains_grid:
            raise ValueError("trained=grid: scales and floats are null, so nothing is left to train; give one of them")
        if self.states != "float32" and (self.part is None or self.trained == "grid"):
            why = "part=null" if self.part is None else "trained=grid"
            raise ValueError(f"states={self.states}: {why} trains no weights; use states=float32, or train weights")
        if self.window is not None and self.trained in ("all", "grid"):
            raise ValueError(f"window={self.window}: trained={self.trained} has no windows; use trained=window")
        if self.window_epochs is not None and self.trained in ("all", "grid"):
            raise ValueError(
                f"window_epochs={self.window_epochs}: trained={self.trained} has no windows; use trained=window"
            )
        if self.window_epochs is not None and self.window_epochs > self.training.epochs:
            raise ValueError(
                f"window_epochs={self.window_epochs}: is more than training.epochs={self.training.epochs}, the epochs "
                "without windows; use at most as many"
            )
        if self.trained in ("window", "grid") and not self.together:
            raise ValueError(f"trained={self.trained}: together=false trains blocks one by one; use together=true")

    @property
    def name(self) -> str:
        return self.label or ("e2e" if self.start is None else f"{self.start.name}+e2e")

    @property
    def needs(self) -> frozenset[Need]:
        reads: frozenset[Need] = frozenset({"inputs"})
        return reads if self.start is None else reads | self.start.needs

    @property
    def trains_grid(self) -> bool:
        """Whether step sizes, norms or biases are trained."""
        return self.scales is not None or self.floats is not None

    @property
    def weight_epochs(self) -> int:
        """Epochs in which a weight is trained: those of its window, where there are windows."""
        return (self.trained == "window" and self.window_epochs) or self.training.epochs

    @property
    def weight_share(self) -> float:
        """The same as a share of the epochs of the schedule."""
        return self.weight_epochs / self.training.epochs if self.training.epochs else 1.0

    def as_form(self, trained: Literal["all", "window", "grid"], window: int | None) -> FineTune:
        """Return the same settings with what is trained at once, and nothing that this form does not have."""
        epochs = self.window_epochs if trained == "window" else None
        states = "float32" if trained == "grid" else self.states
        return replace(self, trained=trained, window=window, window_epochs=epochs, states=states)

    def after(self, folder: str) -> FineTune:
        """Return the same settings starting from what lies in `folder`."""
        return replace(self, run=folder, start=None)

    def prepare_model(self, model: Model, tokens: Tensor | None, batch: int, generator: torch.Generator) -> Model:
        """Return the model as that run prepared it: rotated, or after its prefix."""
        from pathlib import Path

        from lsiq.results.store import BlockStore

        del tokens, batch, generator
        assert self.run is not None
        return BlockStore(Path(self.run) / "blocks").read_model(model)

    def begin(self, quant: QuantSettings, context: Context) -> Method:
        from lsiq.methods.finetune.tuner import tune

        return tune(self, quant, context)
