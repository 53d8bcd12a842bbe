"""`dry_run=true`: what a run would take of memory and time, by the estimate that suits it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lsiq.errors import ConfigError
from lsiq.experiment.estimate import Estimate
from lsiq.experiment.probe import architecture
from lsiq.methods.base import Method, WholeMethod, chain
from lsiq.methods.rotate import Rotate
from lsiq.report.terminal import show_plan
from lsiq.results.record import Record
from lsiq.runtime.device import find_device
from lsiq.runtime.memory import highest

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig


def dry_run(config: RunConfig, record: Record) -> None:
    """Print what the run would take, stage by stage, and write it into `record` as if it had been measured.

    One block of the model's true shape with random weights is quantised and evaluated on this machine, with few
    sequences, twice; what grows with sequences, windows, epochs and blocks is scaled up. No weights are read. Of large
    blocks on a CPU, and of methods that train whole models, a narrow model is tried instead.

    Raises:
        ConfigError: one block does not fit the device.
    """
    device = find_device(config.device)
    try:
        stages, notes = _estimate(config, device, record).stages()
        if _trains_rotation(config):
            notes.append("the training of the rotation (steps of rotate) is not estimated")
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"dry_run=true: one block does not fit the memory of {device}; lower calib.batch, "
            "method.training.batch or calib.seqlen"
        ) from error
    record.seconds = {stage.name: stage.seconds for stage in stages}
    record.seconds["total"] = sum(record.seconds.values())
    record.peak_bytes = highest(stage.peaks for stage in stages)
    show_plan(f"{config.model.name}  {config.quant.name}  {config.method.name}", stages, record, notes)


def _trains_rotation(config: RunConfig) -> bool:
    methods = (config.method, getattr(config.method, "start", None))
    links = (link for method in methods if isinstance(method, Method | WholeMethod) for link in chain(method))
    return any(isinstance(link, Rotate) and link.steps > 0 for link in links)


def _estimate(config: RunConfig, device: torch.device, record: Record) -> Estimate:
    """Return the estimate that suits: from one block of the true size, or where that takes long or too much, narrow."""
    from lsiq.experiment.narrow_estimate import LARGEST, NarrowEstimate
    from lsiq.models.shape import Shape

    estimate = Estimate(config, device, record)
    large = Shape.of(architecture(config, estimate.folder)).weights > LARGEST
    if isinstance(config.method, WholeMethod) or (large and device.type == "cpu"):
        return NarrowEstimate(config, device, record)
    return estimate
