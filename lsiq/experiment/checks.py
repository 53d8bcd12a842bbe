"""What is refused once the model is there: formats and processes that do not fit it."""

from __future__ import annotations

import torch

from lsiq.errors import ConfigError
from lsiq.evals.settings import EvalSettings
from lsiq.experiment.config import RunConfig
from lsiq.formats.placed import check_widths
from lsiq.formats.quant import QuantSettings
from lsiq.methods.base import chain
from lsiq.models.loading import Model
from lsiq.models.outside import outside_modules
from lsiq.runtime import processes
from lsiq.runtime.precision import name_of
from lsiq.runtime.terminal import warn


def check_formats(model: Model, quant: QuantSettings) -> None:
    """Raise ConfigError before anything long starts if a format does not fit the shape of a linear, or of the head."""
    block = model.skeleton.get_submodule(f"{model.spec.blocks}.0")
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    quant.kv.check(head_dim)
    check_widths(quant, {name: block.get_submodule(name).in_features for name in model.spec.linears})  # type: ignore[misc]
    outside_modules(model, quant.outside())


def check_products(settings: EvalSettings, model: Model) -> None:
    """Raise ConfigError where TF32 is asked for and nothing would be multiplied in it."""
    if settings.tf32 and (model.device.type != "cuda" or model.dtype != torch.float32):
        raise ConfigError(
            f"eval.tf32=true: is for float32 models on a GPU, not {name_of(model.dtype)} on {model.device.type}; leave "
            "it out, or give model.dtype=float32 and device=cuda"
        )


def check_processes(config: RunConfig, samples: int) -> None:
    """Raise ConfigError where a process would have no sequence; say where one would have none of a step's."""
    size = processes.size()
    if samples < size:
        raise ConfigError(
            f"calib.samples={config.calib.samples}: {samples} sequences cannot be shared by {size} processes; "
            "give more or start fewer"
        )
    for link in chain(config.method):
        if (training := link.training) is not None and training.batch < size:
            warn(
                f"method.training.batch={training.batch} is smaller than the {size} processes: each step is taken by "
                f"{training.batch} of them; a batch of {size} or more keeps all busy"
            )
