"""What a run fine-tunes at once: chosen before its first block, and kept to when it is stopped and goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from lsiq.methods.finetune import FineTune
from lsiq.methods.finetune.form import form_for
from lsiq.runtime.terminal import say

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig
    from lsiq.models.loading import Model
    from lsiq.results.record import Record


def with_form(config: RunConfig, model: Model, tokens: Tensor | None, record: Record) -> RunConfig:
    """Return the settings with the form that `method.trained=auto` stands for in this run, which `record` says then.

    A run that goes on keeps to the form it began with, unless another `method.memory` is asked for.

    Raises:
        ResourceError: no form fits.
    """
    method = config.method
    if not isinstance(method, FineTune) or config.quant.name == "fp16" or tokens is None:
        return config
    before = record.training_form
    if not before or before["memory"] != method.memory:
        form = form_for(method, model, config.quant, *tokens.shape)
        taken = form.of(method)
        epochs, states = taken.weight_epochs, taken.states
        record.training_form = {"trained": form.trained, "window": form.window, "epochs": epochs, "states": states}
        record.training_form |= {"why": form.reason, "memory": method.memory}
        if method.trained == "auto" and form.trained != "all":
            each = "" if form.window is None else f", {epochs} epochs each"
            say(f"{method.name} trains through the whole model by {form.words}{each}: {form.reason}")
    chosen = record.training_form
    return replace(config, method=method.as_form(chosen["trained"], chosen["window"]))
