"""Model families as data: where the blocks are, which linears they have, which channels may be rescaled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lsiq.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Channels of one producer that its consumers read, and that may therefore be rescaled between them.

    Attributes:
        producer: dotted name, inside a block, of the module whose outputs are the channels.
        consumers: dotted names of the linears that read them.
        kind: `norm`: the producer's weight and bias take the scale; `linear`: the producer's rows do; `value`: as
            linear, but one value head feeds several query heads under grouped-query attention.
        offset: of a norm: what it multiplies by is its weight plus this.
        fused: whether the producer is one matrix for several projections, the last of which writes the channels.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Literal["norm", "linear", "value"]
    offset: float = 0.0
    fused: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """What the package knows of one model family.

    Attributes:
        model_type: `config.model_type`, matched exactly.
        blocks: dotted name of the list of blocks.
        stages: the linears of a block, in the order in which a token meets them; linears of one stage share an input.
        groups: the channels that may be rescaled.
        homogeneous: channels that reach their reader through a ReLU, which positive scales commute with; outliers can
            be planted there, and smoothing can be asked to fold a scale.
        norm_subtracts_mean: whether the norms are LayerNorms.
        query, key: the linears whose outputs meet in the attention scores; one linear where both are fused.
        unfoldable: why scales cannot be folded into the family's norms, or None where they can.
        unrotatable: why its residual stream cannot be rotated, beyond `unfoldable`; None where it can.
        logits: what the family does to the head's outputs, given its configuration; None for nothing.
    """

    model_type: str
    blocks: str
    stages: tuple[tuple[str, ...], ...]
    groups: tuple[Group, ...]
    homogeneous: tuple[Group, ...] = ()
    norm_subtracts_mean: bool = False
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    unfoldable: str | None = None
    unrotatable: str | None = None
    logits: Callable[[Tensor, Any], Tensor] | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for stage in self.stages for name in stage)

    @property
    def writers(self) -> tuple[str, str]:
        """The linears that write to the residual stream: the output projection and the block's last."""
        (output,) = self.stages[1]
        (last,) = self.stages[-1]
        return output, last

    def inputs(self, places: Sequence[str]) -> tuple[str, ...]:
        """Return the first linear of each stage whose input is at one of `places`: norm, output, down.

        `norm` is what reads the residual stream, behind a norm or, in families that normalise later, without one.
        """
        output, last = self.writers
        names_by_place = {"norm": [stage[0] for stage in self.stages if stage[0] not in self.writers]}
        names_by_place |= {"output": [output], "down": [last]}
        return tuple(name for place, names in names_by_place.items() if place in places for name in names)

    def why_not_foldable(self, config: Any) -> str | None:
        """Why scales cannot be folded into this model's norms, or None where they can."""
        if self.unfoldable is not None:
            return self.unfoldable
        if getattr(config, "do_layer_norm_before", True) is False:
            return (
                "its blocks normalise after each sublayer (post-norm), so a scale folded into a norm would also "
                "change the residual stream; use a method that does not fold, such as rtn or gptq"
            )
        if getattr(config, "layer_norm_elementwise_affine", True) is False:
            return (
                "its norms have no weights to fold a scale into; use a method that does not fold, such as rtn or gptq"
            )
        return None

    def why_not_rotatable(self, config: Any) -> str | None:
        """Why the residual stream of this model cannot be rotated, or None where it can."""
        return self.unrotatable or self.why_not_foldable(config)


def check_supported(config: Any, where: str) -> None:
    """Raise InputError for variants of a known family whose blocks are of kinds that no block function here covers."""
    kinds = set(getattr(config, "layer_types", None) or [])
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise InputError(
            f"{where}: some of its blocks are of the kind {', '.join(sorted(strange))}; "
            "only models whose blocks attend to all tokens or to a window are supported"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise InputError(f"{where}: its tokens attend to later ones; only causal language models are supported")
    if getattr(config, "quantization_config", None):
        raise InputError(f"{where}: the checkpoint is quantised already; give the float checkpoint")
