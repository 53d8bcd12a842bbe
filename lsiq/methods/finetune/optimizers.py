"""The optimizers of fine-tuning, and the course of their rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lsiq.methods.finetune.form import FUSED

if TYPE_CHECKING:
    from lsiq.methods.finetune.settings import FineTune


class Optimizers:
    """Optimizers of some parameters, whose learning rates run their course over some of the steps of the schedule."""

    def __init__(self, groups: list[dict[str, Any]], steps: range, device: torch.device) -> None:
        self.each = _adam(groups, device)
        self._steps, self._rates = steps, [[group["lr"] for group in each.param_groups] for each in self.each]

    def set_rates(self, settings: FineTune, step: int) -> None:
        """Let the step run at the rates' share of its place among the steps."""
        factor = settings.training.rate_factor((step - self._steps.start) / len(self._steps))
        for optimizer, rates in zip(self.each, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor


def _adam(groups: list[dict[str, Any]], device: torch.device) -> list[torch.optim.Optimizer]:
    """Return an optimizer of these parameters; none where there are none."""
    fused = device.type == "cuda" and sum(p.numel() for group in groups for p in group["params"]) >= FUSED
    return [torch.optim.AdamW(groups, weight_decay=0.0, fused=fused or None)] if groups else []
