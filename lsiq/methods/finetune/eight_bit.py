"""Adam whose moments take 8 bits a number, for weights of which as many as fit are trained at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# Numbers that share a scale.
BLOCK = 256
# Smaller tensors keep their moments in float32.
SMALL = 4096
# Numbers that are moved at once.
CHUNK = 2**24
# Tensors in float32 of a chunk: gradient, moments, and what is made while they are rounded.
COPIES = 8
# Bytes of a number's two moments, with their scales.
MOMENT_BYTES = 2 * (1 + 4 / BLOCK)
# Multiples of the golden ratio, modulo 1, fill the unit interval evenly, however many there are. Those of the other
# number tell the lanes of a block apart.
STEP_PHASE, LANE_PHASE = (math.sqrt(5) - 1) / 2, 0.7548776662466927


@dataclass(frozen=True)
class CodeBook:
    """Codes of 8 bits whose values are a geometric series: `0`, and `10^(-decades · (levels - c) / (levels - 1))`.

    So code 1 stands for `10^-decades` and the last for 1, times the largest magnitude of the block; negative codes
    stand for negative numbers.

    Attributes:
        decades: from the least magnitude to the largest.
        levels: magnitudes besides 0.
        positive: whether what is not 0 is never rounded to it.
    """

    dtype: torch.dtype
    decades: float
    levels: int
    positive: bool

    @property
    def growth(self) -> float:
        """The ratio of neighbouring magnitudes."""
        return 10 ** (self.decades / (self.levels - 1))

    def encode(self, values: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of float32 `values`, `(blocks, BLOCK)`, and the scales of blocks, `(blocks, 1)`.

        Args:
            threshold: of the way from one magnitude to the next, from 0 to below 1, one for each number of a block,
                `(BLOCK,)`, or for all; what is beyond it goes up.
        """
        magnitudes = values.abs()
        scale = magnitudes.amax(1, keepdim=True)
        shares = magnitudes.div_(scale.clamp(min=torch.finfo(torch.float32).tiny))
        # The same threshold on the logarithmic way; code `c` lies at `c`, and a number between it and the next goes up
        # where it is further than that.
        further = threshold.mul(self.growth - 1).log1p_().div_(math.log(self.growth))
        codes = shares.log().div_(math.log(self.growth)).add_(self.levels - further).ceil_().clamp_(1, self.levels)
        least = 0 if self.positive else 0.5 * 10**-self.decades
        codes.masked_fill_(shares <= least, 0)
        if not self.positive:
            codes.copysign_(values)
        return codes.to(self.dtype), scale

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return what codes, `(blocks, BLOCK)`, stand for, in float32."""
        numbers = codes.float()
        magnitudes = numbers.abs().sub_(self.levels).mul_(math.log(self.growth)).exp_()
        return magnitudes.mul_(numbers.sign_()).mul_(scale)


FIRST = CodeBook(torch.int8, decades=4, levels=127, positive=False)
SECOND = CodeBook(torch.uint8, decades=7, levels=255, positive=True)


class EightBitAdam(torch.optim.Optimizer):
    """AdamW without weight decay, whose moments are kept in 8 bits and made float32 for the step.

    The moments of a number take 2 bytes and a 32nd of one, instead of 8. They are rounded in blocks of 256 consecutive
    numbers, each with its largest magnitude as scale in float32. Parameters are contiguous; those of fewer than 4096
    numbers keep float32 moments. The arithmetic is in float32, whatever the parameters' type. It goes through large
    tensors in chunks, whose temporary tensors take 0.5 GiB at most, and never waits for the device. Equal states and
    gradients lead to equal bits, so a training goes on from `state_dict` as if it had not been stopped. A step cannot
    be recorded as a CUDA graph, for its number lies on the host.

    Source: Dettmers et al. 2022 (arXiv 2110.02861, sections 2 and 3).
    Deviation: blocks of 256 instead of 2048. Codes are geometric series in place of dynamic trees, so that the relative
    error is the same at all magnitudes: at most 3.7 % over four decades of the first moment, 6.6 % over seven of the
    second. A positive second moment is never rounded to 0, where a step would be divided by next to nothing; what is
    less than `1e-7` of the block's largest counts as that, which makes steps smaller. Nor is it rounded to nearest: a
    step changes it by less than half the distance of two codes, so that it would stand still. The threshold between
    two codes runs through multiples of the golden ratio instead, a step each, and is right in the mean over steps.

    Args:
        groups: parameters and their learning rates, floats, as torch's optimizers take them.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient stand still."""
        assert closure is None
        for group in self.param_groups:
            betas: tuple[float, float] = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= _start(parameter)
                state["step"] += 1  # on the host
                move = _Move(state["step"].item(), group["lr"], *betas, group["eps"])
                if "exp_avg_scale" in state:
                    _move_in_blocks(parameter, parameter.grad, state, move)
                else:
                    gradient = parameter.grad.float()
                    parameter.add_(move.change(gradient, state["exp_avg"], state["exp_avg_sq"]))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Take up a state; its tensors keep their types, where torch would give them the parameters'."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            if index in state_dict["state"]:
                self.state[parameter] = {
                    name: value.to("cpu" if name == "step" else parameter.device, copy=True)
                    for name, value in state_dict["state"][index].items()
                }


@dataclass(frozen=True)
class _Move:
    """One step of Adam."""

    number: float
    rate: float
    beta1: float
    beta2: float
    eps: float

    def change(self, gradient: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Bring the moments, in float32, to this step, and return what is added to the parameter."""
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        root = second.sqrt().div_(math.sqrt(1 - self.beta2**self.number)).add_(self.eps)
        return (first / root).mul_(-self.rate / (1 - self.beta1**self.number))

    def threshold(self, device: torch.device) -> Tensor:
        """Of each lane of a block, where between two codes a number goes up, `(BLOCK,)`, from 0 to below 1."""
        lanes = torch.arange(BLOCK, device=device) * LANE_PHASE
        return lanes.add_(self.number * STEP_PHASE % 1).frac_()


def _start(parameter: Tensor) -> dict[str, Tensor]:
    """The state before the first step."""
    step = torch.zeros(())
    if parameter.numel() < SMALL:
        zeros = torch.zeros_like(parameter, dtype=torch.float32)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    state, blocks = {"step": step}, math.ceil(parameter.numel() / BLOCK)
    for name, book in (("exp_avg", FIRST), ("exp_avg_sq", SECOND)):
        state[name] = torch.zeros(blocks, BLOCK, dtype=book.dtype, device=parameter.device)
        state[f"{name}_scale"] = torch.zeros(blocks, 1, device=parameter.device)
    return state


def _move_in_blocks(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], move: _Move) -> None:
    thresholds = torch.full((), 0.5, device=parameter.device), move.threshold(parameter.device)
    chunks = zip(parameter.view(-1).split(CHUNK), gradient.reshape(-1).split(CHUNK), strict=True)
    for index, (numbers, slopes) in enumerate(chunks):
        padded = pad(slopes.float(), (0, -len(slopes) % BLOCK)).view(-1, BLOCK)
        rows = slice(index * (CHUNK // BLOCK), index * (CHUNK // BLOCK) + len(padded))
        first = FIRST.decode(state["exp_avg"][rows], state["exp_avg_scale"][rows])
        second = SECOND.decode(state["exp_avg_sq"][rows], state["exp_avg_sq_scale"][rows])
        numbers.add_(move.change(padded, first, second).view(-1)[: len(numbers)])
        for name, codes, scale in (
            ("exp_avg", *FIRST.encode(first, thresholds[0])),
            ("exp_avg_sq", *SECOND.encode(second, thresholds[1])),
        ):
            state[name][rows] = codes
            state[f"{name}_scale"][rows] = scale
