"""LQER, L²QER and QERA: a low-rank product beside the quantised weight repairs what rounding did to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.errors import ConfigError
from lsiq.formats.factors import FACTORS
from lsiq.methods.base import Method, chain
from lsiq.methods.rtn import RTN
from lsiq.methods.wrapper import Wrapper
from lsiq.models.context import Context, Need
from lsiq.models.result import BlockResult
from lsiq.settings import settings

if TYPE_CHECKING:
    from lsiq.formats.base import WeightFormat
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block


_NAMES = {"none": "lqer", "magnitude": "l2qer", "rms": "qera-approx", "covariance": "qera-exact"}


@settings
class LQER(Wrapper):
    """Round with `then`, and put beside each linear the product of rank `rank` that repairs most of its error.

    With `W (out, in)` the float weight, `Ŵ` the rounded one, `E = W - Ŵ` and `T (in, in)`:

        E T = U Σ Vᵀ          up · down = U_r Σ_r V_rᵀ T⁻¹ = U_r (U_rᵀ E)          y = Ŵ x + up (down x) + b

    `scale` chooses `T`, which says what an error costs:

        none         LQER          I
        magnitude    L²QER         diag(s), s_j the largest mean of |x_j| over a sequence
        rms          QERA-approx   diag(s), s_j² the mean of x_j²
        covariance   QERA-exact    T Tᵀ = mean of x xᵀ: the least output error of any product of that rank

    `x` is what the quantised stream brings to the linear inside the block with the float weights that the codes stand
    for; in a quantised-activation setting after the rounding of activations. `W` is that weight as well: folded scales
    of `then` belong to it, clipping and learned increments are part of the error.

    A linear that is narrower than `rank`, such as the keys under grouped-query attention, gets its own full rank.

    The factors are stored in float16, or in 8 bits; `auto` takes what the format of activations is multiplied with: 8
    bits of the same kind for blocks and floating-point numbers, float16 for integers. The branch runs in the activation
    format: what enters `down` and what enters `up` are rounded to it.

    Source: Zhang et al., LQER (arXiv 2402.02446, equations 6 to 9) and its public code; Zhang et al., QERA (arXiv
    2410.06040, theorems 1 and 2).
    Deviation: the right-hand form above needs no inverse of `T`, so no scale is kept away from zero and nothing is
    damped; the singular values are shared between the factors. `U_r` comes from the Gram matrix of the smaller side of
    `E T`, on the device, in float64. `T` itself is not needed where `out ≤ in`; elsewhere it comes from eigenvectors of
    the covariance, where QERA's code takes a matrix square root on the CPU. (A Cholesky factor would do as well, but
    fails on covariances of few tokens.) L²QER's public maximum runs over calibration batches; over sequences it does
    not depend on how they are batched.
    """

    scale: Literal["none", "magnitude", "rms", "covariance"] = Field(
        description="none (LQER), magnitude (L2QER), rms (QERA-approx) or covariance (QERA-exact)"
    )
    rank: int = Field(ge=0, description="of the product, at least 0; 0 leaves it out, for controls")
    factors: str = Field("auto", description=f"auto, {', '.join(FACTORS)}: what factors are stored in")
    then: Method = Field(default_factory=RTN, description="the method that rounds: a _target_ with its settings")

    def __post_init__(self) -> None:
        if self.factors not in ("auto", *FACTORS):
            raise ValueError(f"factors={self.factors}: no such format of factors; use auto, {', '.join(FACTORS)}")
        for method in chain(self.then):
            if isinstance(method, LQER):
                raise ValueError("then: one low-rank product repairs another; give one method=… of that kind a rank")

    @property
    def adds_branches(self) -> bool:
        return self.rank > 0

    @property
    def label(self) -> str:
        return _NAMES[self.scale]

    @property
    def reads(self) -> frozenset[Need]:
        return frozenset() if self.scale == "none" else frozenset({"inputs"})

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        import torch

        from lsiq.methods.lqer.repair import repair

        self.check_rank(tuple(block.weights[name].shape) for name in block.linears)
        result = self.then.quantize_block(block, quant, context)
        if self.rank == 0:
            return result
        with torch.no_grad():
            branches, metrics = repair(self, result, block, quant, context)
        return replace(result, branches=branches, metrics=dict(result.metrics) | metrics)

    def factor_format(self, quant: QuantSettings) -> WeightFormat | None:
        """The format of the factors; None for float16."""
        return FACTORS[quant.activation.factors if self.factors == "auto" else self.factors]

    def check_rank(self, shapes: Iterable[tuple[int, ...]]) -> None:
        """Raise ConfigError for a rank that no linear of a block has; `shapes` are those of its linears."""
        full = max(map(min, shapes))
        if self.rank > full:
            raise ConfigError(
                f"method.rank={self.rank}: no linear has a rank above {full} itself; use method.rank={full} or less"
            )
