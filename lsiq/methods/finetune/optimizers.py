"""The optimizers of fine-tuning, and the course of their rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lsiq.methods.finetune.eight_bit import EightBitAdam
from lsiq.methods.finetune.form import FUSED

if TYPE_CHECKING:
    from lsiq.methods.finetune.settings import FineTune


class Optimizers:
    """Optimizers of some parameters, whose learning rates run their course over some of the steps of the schedule.

    Args:
        recorded: whether a `Recorder` is given them.
        states: how moments are kept, float32 or int8.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        steps: range,
        device: torch.device,
        recorded: bool = False,
        states: Literal["float32", "int8"] = "float32",
    ) -> None:
        self._steps, self._rates = steps, [group["lr"] for group in groups]
        self.each = _adam(groups, device, recorded, states)

    def set_rates(self, settings: FineTune, step: int) -> None:
        """Let the step run at the rates' share of its place among the steps."""
        factor = settings.training.rate_factor((step - self._steps.start) / len(self._steps))
        groups = [group for optimizer in self.each for group in optimizer.param_groups]
        for group, rate in zip(groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):  # a recorded step reads it where it lies
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor


def _adam(
    groups: list[dict[str, Any]], device: torch.device, recorded: bool, states: str
) -> list[torch.optim.Optimizer]:
    """Return an optimizer of these parameters; none where there are none."""
    if not groups:
        return []
    if states == "int8":
        return [EightBitAdam(groups)]
    if recorded:
        groups = [{**group, "lr": torch.tensor(group["lr"], device=device)} for group in groups]
        return [torch.optim.AdamW(groups, weight_decay=0.0, fused=True, capturable=True)]
    fused = device.type == "cuda" and sum(p.numel() for group in groups for p in group["params"]) >= FUSED
    return [torch.optim.AdamW(groups, weight_decay=0.0, fused=fused or None)]
