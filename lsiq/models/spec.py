"""Model families as data: where the blocks are, which linears they have, which channels may be rescaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lsiq.errors import InputError


@dataclass(frozen=True)
class Group:
    """Channels of one producer that its consumers read, and that may therefore be rescaled between them.

    Attributes:
        producer: dotted name, inside a block, of the module whose outputs are the channels.
        consumers: dotted names of the linears that read them.
        kind: `norm`: the producer's weight and bias take the scale; `linear`: the producer's rows do; `value`: as
            linear, but one value head feeds several query heads under grouped-query attention.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Literal["norm", "linear", "value"]


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
        query, key: the linears whose outputs meet in the attention scores.
    """

    model_type: str
    blocks: str
    stages: tuple[tuple[str, ...], ...]
    groups: tuple[Group, ...]
    homogeneous: tuple[Group, ...] = ()
    norm_subtracts_mean: bool = False
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"

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
        """Return the first linear of each stage whose input is at one of `places`: norm, output, down."""
        output, last = self.writers
        named = {"norm": [group.consumers[0] for group in self.groups if group.kind == "norm"]}
        named |= {"output": [output], "down": [last]}
        return tuple(name for place, names in named.items() if place in places for name in names)

    def why_not_foldable(self, config: Any) -> str | None:
        """Why scales cannot be folded into this model's norms, or None where they can."""
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


def check_supported(config: Any, spec: ModelSpec, where: str) -> None:
    """Raise InputError for variants of a known family whose blocks do not all take the same keyword arguments."""
    kinds = set(getattr(config, "layer_types", None) or [])
    if len(kinds) > 1:
        raise InputError(
            f"{where}: its blocks mix {', '.join(sorted(kinds))}; "
            "only models whose blocks all attend alike are supported"
        )
    if getattr(config, "quantization_config", None):
        raise InputError(f"{where}: the checkpoint is quantised already; give the float checkpoint")


def find_spec(model_type: str, where: str) -> ModelSpec:
    """Return the spec of a family.

    Raises:
        InputError: the family is not supported.
    """
    from lsiq.models.llama import LLAMA, MISTRAL, QWEN2, QWEN3
    from lsiq.models.opt import OPT

    specs = {spec.model_type: spec for spec in (LLAMA, MISTRAL, QWEN2, QWEN3, OPT)}
    if model_type not in specs:
        raise InputError(f"{where}: model_type={model_type} is not supported; there are {', '.join(specs)}")
    return specs[model_type]
