"""How parameters move: AdamW or signed-gradient steps, part by part, within their bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq.parts.base import Part, PartState, rate_of

if TYPE_CHECKING:
    from lsiq.learning.schedule import Training


class SignSGD(torch.optim.Optimizer):
    """`p ← p - lr · sign(∂L/∂p)`, without momentum or decay.

    With linear decay from a rate of `1 / steps` a parameter travels at most one half in all, which is how far an
    offset has to go to choose the other neighbour on a grid. Rates may be tensors, so that a recorded step reads the
    present ones; parameters without a gradient stand still.

    Source: AutoRound (arXiv 2309.05516, section 3.2).
    """

    # GradScaler then hands over what it found instead of waiting for the device to say whether to step.
    _step_supports_amp_scaling = True

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; none where the gradient scaler found a gradient that is not finite."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            directions = list(torch._foreach_sign([p.grad for p in parameters]))  # pyright: ignore[reportPrivateImportUsage]
            if self.found_inf is not None:
                directions = [torch.where(self.found_inf > 0, 0.0, direction) for direction in directions]
            torch._foreach_mul_(directions, group["lr"])  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_sub_(parameters, directions)  # pyright: ignore[reportPrivateImportUsage]


class Optimizers:
    """The optimizers of all parts, and the rates at which they run.

    Args:
        states: of each part, those of all blocks that are trained.
        steps: how many will be taken, for parts whose rate goes by their number.
        slow: what all rates are multiplied by.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        states: Sequence[Sequence[PartState]],
        training: Training,
        steps: int,
        slow: float,
        device: torch.device,
    ) -> None:
        self.bounds = [
            (state.parameters[name], bounds)
            for part_states in states
            for state in part_states
            for name, bounds in state.bounds.items()
        ]
        self.rates: list[tuple[dict[str, Any], float]] = []
        groups: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for part, part_states in zip(parts, states, strict=True):
            by_rate: dict[float, list[Tensor]] = {}  # blocks of other widths may have units of their own
            for state in part_states:
                if state.parameters:
                    by_rate.setdefault(slow * rate_of(part, state, steps), []).extend(state.parameters.values())
            for rate, parameters in by_rate.items():
                # Rates are tensors so that a recorded step reads the present ones.
                group = {"params": parameters, "lr": torch.tensor(rate, device=device)}
                groups[part.name in training.signed].append(group)
                self.rates.append((group, rate))
        self.optimizers: list[torch.optim.Optimizer] = []
        if groups[False]:
            # fused: one kernel for all parameters; the CPU has one as well.
            adam = torch.optim.AdamW(
                groups[False], betas=(0.9, 0.999), weight_decay=0.0, fused=True, capturable=device.type == "cuda"
            )
            self.optimizers.append(adam)
        if groups[True]:
            self.optimizers.append(SignSGD(groups[True]))

    def set_rates(self, factor: float) -> None:
        """Let the next step run at the parts' rates times `factor`."""
        for group, rate in self.rates:
            group["lr"].fill_(rate * factor)

    def parameters(self) -> Iterator[Tensor]:
        """All that is moved."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def forget_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Bring the gradients back to their own size."""
        for optimizer in self.optimizers:
            scaler.unscale_(optimizer)

    @torch.no_grad()
    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Move all parameters, then bring back those that left their bounds."""
        for optimizer in self.optimizers:
            scaler.step(optimizer)
        scaler.update()
        for parameter, (least, largest) in self.bounds:
            parameter.clamp_(least, largest)
