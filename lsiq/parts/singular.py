"""Singular (LSI): learnable increments of the singular values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lsiq.errors import ConfigError
from lsiq.parts.base import Draft, PartState
from lsiq.settings import settings

if TYPE_CHECKING:
    from torch import Tensor

    from lsiq.config import QuantSettings
    from lsiq.methods.base import Context
    from lsiq.models.block import Block

# Increments are small against the singular vectors' entries; scaled by this inside a half-precision product they keep
# their digits (4e-4 relative error at |I| = 1e-6 in float16, against 0.21 without).
_HALF_SCALE = 4096.0


@settings
class Singular:
    """Learnable singular value increments: `W' = W + U diag(I) Vᵀ`, with `W = U diag(S) Vᵀ` decomposed once.

    Only `I` is trained; it starts at 0, so the start is exact whatever the decomposition's error, and the increment
    product may run in half precision beside a float32 `W`. The grid follows `W'`, so `I` moves it too. With `corner`,
    a dense `(c, c)` block in the directions of the `c` largest singular values is trained as well. The result is an
    ordinary grid: nothing is left to do at inference.

    Source: LSI (arXiv 2406.16299). Its text leaves open which linears are trained and whether the fold comes first;
    here the order of the parts in a method says what comes first.
    """

    lr: float = Field(1e-3, gt=0, description="learning rate of the increments, above 0")
    corner: int = Field(0, ge=0, description="size of the dense block of the largest singular directions; 0 for none")
    top: int | None = Field(None, ge=1, description="train only the increments of the largest values; null for all")
    linears: list[str] | None = Field(
        None, description="names of linears such as self_attn.q_proj or mlp.down_proj; null for all"
    )
    directions: Literal["singular", "random"] = Field(
        "singular", description="singular, or random orthonormal directions (the control)"
    )
    product: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of the increment product: float32, bfloat16 or float16"
    )

    @property
    def name(self) -> str:
        return "singular" if self.directions == "singular" else "random"

    def start(self, block: Block, quant: QuantSettings, context: Context) -> PartState:
        from lsiq.svd import decompose, random_directions

        del quant
        parameters: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}
        for name in self._names(block):
            w = block.weights[name]
            if self.directions == "singular":
                u, s, vh = decompose(w)
            else:
                u, s, vh = random_directions(w, context.generator)
            parameters[f"{name}:increment"] = s.new_zeros(min(self.top or len(s), len(s)))
            if self.corner:
                c = min(self.corner, len(s))
                parameters[f"{name}:corner"] = s.new_zeros(c, c)
            constants |= {f"{name}:u": u, f"{name}:s": s, f"{name}:vh": vh}
        return PartState(parameters, constants)

    def apply(self, draft: Draft, state: PartState, block: Block) -> Draft:
        weights = dict(draft.weights)
        for name in self._names(block):
            weights[name] = weights[name] + self._update(state, name)
        return Draft(weights, draft.clip)

    def _update(self, state: PartState, name: str) -> Tensor:
        """Return `U (diag(I) + corner) Vᵀ (out, in)`: one product, over only the directions that are trained."""
        import torch

        increment, corner = state.parameters[f"{name}:increment"], state.parameters.get(f"{name}:corner")
        width = max(len(increment), 0 if corner is None else len(corner))
        u, vh = state.constants[f"{name}:u"][:, :width], state.constants[f"{name}:vh"][:width]
        core = torch.nn.functional.pad(increment, (0, width - len(increment)))[:, None] * vh
        if corner is not None:
            c = len(corner)
            core = torch.cat([core[:c] + corner @ vh[:c], core[c:]])
        if self.product == "float32":
            return u @ core
        dtype = getattr(torch, self.product)
        return (u.to(dtype) @ (core * _HALF_SCALE).to(dtype)).float() / _HALF_SCALE

    def _names(self, block: Block) -> tuple[str, ...]:
        if self.linears is None:
            return block.linears
        unknown = set(self.linears) - set(block.spec.linears)
        if unknown:
            raise ConfigError(
                f"singular.linears: {block.spec.model_type} has no {', '.join(sorted(unknown))}; "
                f"there are {', '.join(block.spec.linears)}"
            )
        return tuple(name for name in block.linears if name.removesuffix(".weight") in self.linears)
