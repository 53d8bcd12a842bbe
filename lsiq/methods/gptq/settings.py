"""GPTQ: round column by column and let the columns that follow make up for each error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.errors import NumericalError
from lsiq.methods.base import Traits
from lsiq.models.context import Context, Need
from lsiq.models.result import BlockResult
from lsiq.settings import settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lsiq.formats.base import WeightFormat
    from lsiq.formats.quant import QuantSettings
    from lsiq.formats.tensor import QuantizedTensor
    from lsiq.methods.gptq.columns import Kernels
    from lsiq.models.block import Block


@settings
class GPTQ(Traits):
    """Rounding with error feedback through the inverse Hessian of each linear's output error.

        H = 2 XᵀX / tokens + λ I,   λ = damping · mean(diag)        H⁻¹ = Uᵀ U
        ŵ_i = round(w_i) on its grid,   e_i = (w_i - ŵ_i) / U_ii,   w_j ← w_j - e_i U_ij  for j > i

    with `w_i` column `i` of `W (out, in)`. `X` is what the quantised model feeds the linear, in a quantised-activation
    setting after the rounding of activations.

    `act_order` takes the columns by falling diagonal of `H`. With `true_sequential` each stage of the block (q, k, v;
    o; gate, up; down) sees the earlier ones rounded, otherwise all inputs come from the unrounded block. With
    `static_groups` the grids are fitted on the weights as they came; without, a group's grid is fitted on its updated
    weights when its turn comes. Together with `act_order` that would make groups of columns that are not neighbours,
    which no checkpoint layout of this package holds, so the pair is refused.

    `precision` is that of the factorisation and the feedback. `auto` takes float32 while `eps · ‖H‖₁ / λ`, a bound on
    its relative error, stays under 1 %, and float64 otherwise; it decides linear by linear.

    `kernels` says what rounds a block of columns on a GPU: one Triton kernel for formats that count equal steps, or the
    plain loop, with eleven launches a column. The kernel's operations are those of the loop, in the same order.

    Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1; `act_order`, `true_sequential`, `static_groups` as
    options of its public code.
    Deviation: a dead input channel is rounded to nearest where the public code sets its weights to zero (text that
    does reach it then still meets a weight), and the mean diagonal leaves dead channels out. A grid that is fitted
    late sees all feedback so far; the public code leaves out that of the current block of columns.
    """

    rounds_only = True

    act_order: bool = Field(True, description="true rounds the columns with the largest inputs first")
    true_sequential: bool = Field(True, description="true lets each stage of a block see the earlier ones rounded")
    static_groups: bool = Field(True, description="true fits all grids before rounding; act_order needs it")
    damping: float = Field(0.01, ge=0, le=1, description="share of the mean diagonal added to the Hessian, 0 to 1")
    block_size: int = Field(128, ge=1, description="columns between two updates of the rest, at least 1; speed only")
    precision: Literal["auto", "float32", "float64"] = Field("auto", description="auto, float32 or float64")
    kernels: Literal["auto", "plain"] = Field(
        "auto", description="auto (a Triton kernel on a GPU, for integers and MXINT; else plain) or plain"
    )

    def __post_init__(self) -> None:
        if self.act_order and not self.static_groups:
            raise ValueError(
                "static_groups=false: with act_order=true groups would hold columns that are not neighbours, which "
                "cannot be stored; set static_groups=true or act_order=false"
            )

    @property
    def name(self) -> str:
        return "gptq"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"})

    def quantize_block(self, block: Block, quant: QuantSettings, context: Context) -> BlockResult:
        from lsiq.methods.gptq.columns import choose_kernels

        tensors: dict[str, QuantizedTensor] = {}
        stages = [[f"{name}.weight" for name in stage] for stage in block.spec.stages]
        stages = [names for stage in stages if (names := [name for name in stage if name in block.linears])]
        first = [names[0].removesuffix(".weight") for names in stages]  # linears of a stage share their input
        grams = {} if self.true_sequential else self._grams(block, {}, first, quant, context)
        kernels: dict[str, Kernels] = {}
        kernels |= {name: choose_kernels(self.kernels, block.weights[name], quant.of(name)) for name in block.linears}
        lost = 0.0
        for shown, names in zip(first, stages, strict=True):
            if self.true_sequential:
                grams = self._grams(block, tensors, [shown], quant, context)
            rounded, error = self._round_stage(block, names, grams[shown], quant, kernels)
            tensors |= rounded
            lost += error / len(stages)
        return BlockResult(tensors, metrics={"output_error": lost}, kernels=", ".join(sorted(set(kernels.values()))))

    def _grams(
        self,
        block: Block,
        tensors: dict[str, QuantizedTensor],
        linears: list[str],
        quant: QuantSettings,
        context: Context,
    ) -> dict[str, Tensor]:
        """`XᵀX / tokens` of the inputs of `linears`, with the quantised `tensors` in place."""
        import torch

        from lsiq.calib.gram import input_grams
        from lsiq.runtime.timing import measured_stage

        assert context.inputs is not None
        product = torch.float64 if self.precision == "float64" else torch.float32
        weights = {name: tensor.decode() for name, tensor in tensors.items()}
        with measured_stage("statistics"):
            return input_grams(block, weights, context.inputs, context.batch, linears, quant.running, product)

    def _round_stage(
        self, block: Block, names: list[str], gram: Tensor, quant: QuantSettings, kernels: Mapping[str, Kernels]
    ) -> tuple[dict[str, QuantizedTensor], float]:
        """Round the linears of one stage, for they share its Hessian; those of one format as one matrix.

        Also return the output error relative to the output's mean square.
        """
        import torch

        from lsiq.calib.gram import output_error
        from lsiq.formats.tensor import QuantizedTensor
        from lsiq.methods.gptq.columns import factorise, round_with_feedback
        from lsiq.runtime.timing import measured_stage

        alike: dict[WeightFormat, list[str]] = {}
        for name in names:
            alike.setdefault(quant.of(name), []).append(name)
            if not block.weights[name].isfinite().all():
                raise NumericalError(
                    f"{name} holds values that are not finite; the checkpoint is damaged, fetch it again"
                )
        where = f"block {block.index}, {names[0].removesuffix('.weight')}"
        with measured_stage("factorise"):
            curvature = factorise(gram, self.act_order, self.damping, self.precision, where)
        tensors: dict[str, QuantizedTensor] = {}
        lost = power = 0.0
        for fmt, same in alike.items():
            stacked = torch.cat([block.weights[name] for name in same])
            with measured_stage("round"):
                tensor = round_with_feedback(
                    stacked, curvature, fmt, self.static_groups, self.block_size, kernels[same[0]]
                )
            rows = [len(block.weights[name]) for name in same]
            parts = zip(same, tensor.codes.split(rows), tensor.scale.split(rows), tensor.zero.split(rows), strict=True)
            tensors |= {name: QuantizedTensor(codes, scale, zero, fmt) for name, codes, scale, zero in parts}
            power += output_error(stacked, torch.zeros_like(stacked), gram)
            lost += output_error(stacked, tensor.decode(), gram)
        return tensors, lost / max(power, 1e-30)
