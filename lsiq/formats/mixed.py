"""Settings that give linears formats of their own: rules, and bits that are shared out where they count."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from lsiq.formats.base import WeightFormat
from lsiq.formats.names import as_format, named_format
from lsiq.settings import settings

# Tensors outside the blocks that can have a format.
EMBEDDING, HEAD = "embed_tokens", "lm_head"
OUTSIDE = (EMBEDDING, HEAD)


def _blocks(value: str) -> str:
    for piece in value.split(","):
        if not re.fullmatch(r"-?\d+|(-?\d+)?:(-?\d+)?", piece.strip()):
            raise ValueError(f"{piece.strip()} is no block")
    return value


def _name(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _known(value: str) -> str:
    named_format(value)
    return value


@settings
class Rule:
    """The linears that it matches get a weight format.

    `match` is compared with the name of a linear inside a block, such as `self_attn.q_proj`: `*` stands for any
    characters and `?` for one. `lm_head` and `embed_tokens`, written out, mean the head and the embeddings.

    Of several rules that match one linear the last counts.
    """

    match: str = Field("*", min_length=1, description="a name of linears, * and ? allowed, or lm_head or embed_tokens")
    blocks: Annotated[str | None, BeforeValidator(_name), AfterValidator(lambda v: v if v is None else _blocks(v))] = (
        Field(
            None,
            description="numbers of blocks, from 0 or from the end with a minus, and ranges without their end: "
            "0,-1 or 2:6; null for all",
        )
    )
    format: Annotated[WeightFormat, BeforeValidator(as_format)] = Field(
        description="a weight format by name, such as w8g128, or float to leave the linears as they are"
    )

    def block_numbers(self, depth: int) -> list[int]:
        """Return the numbers of the blocks that it means in a model of so many."""
        if self.blocks is None:
            return list(range(depth))
        numbers: set[int] = set()
        for piece in self.blocks.split(","):
            begin, colon, end = piece.strip().partition(":")
            if colon:
                numbers |= set(range(depth)[slice(int(begin) if begin else None, int(end) if end else None)])
            elif -depth <= int(begin) < depth:
                numbers.add(int(begin) % depth)
        return sorted(numbers)


@settings
class Allocation:
    """Formats of linears chosen so that the model diverges least under an average of bits, or a number of bytes.

    Each of `choices` is tried on each unit of linears, the rest of the model in float; the divergence of what the model
    predicts on `samples` calibration sequences is the unit's sensitivity. A choice for each unit with the least sum is
    found exactly. Then it may be measured again around the plan, `rounds` times: see `lsiq.allocation.refine`.
    """

    bits: float | None = Field(
        None, gt=0, le=16, description="average bits per weight of the linears, all that decodes them counted; or null"
    )
    bytes: int | None = Field(
        None, gt=0, description="bytes that the linears may take in all, instead of bits; or null"
    )
    choices: list[Annotated[str, BeforeValidator(_name), AfterValidator(_known)]] = Field(
        ["w2g128", "w3g128", "w4g128", "w8g128"], min_length=1, description="weight formats by name"
    )
    unit: Literal["linear", "stage", "block"] = Field(
        "linear", description="what gets one format: a linear, a stage (linears that read the same input) or a block"
    )
    measure: Literal["divergence", "fisher"] = Field(
        "divergence",
        description="divergence (of the model's predictions, one pass for each unit and choice) or fisher (its "
        "second-order estimate, from gradients)",
    )
    samples: int = Field(8, ge=1, description="calibration sequences on which sensitivities are measured, at least 1")
    rounds: int = Field(
        0, ge=0, description="how often sensitivities are measured again around the plan, and the plan solved again"
    )
    rounding: Literal["nearest", "method"] = Field(
        "nearest", description="nearest, or method: how linears are rounded while the model is measured"
    )

    def __post_init__(self) -> None:
        if self.bits is not None and self.bytes is not None:
            raise ValueError(f"bits={self.bits}: and bytes={self.bytes} are two limits; set one of them to null")
        if not self.active:
            for name, info in type(self).__pydantic_fields__.items():  # type: ignore[attr-defined]
                if (value := getattr(self, name)) != info.default:
                    raise ValueError(f"{name}={value}: bits are shared out under a limit; set bits or bytes as well")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices={self.choices}: names a format twice; each may stand once")
        if self.measure == "fisher" and self.rounding == "method":
            raise ValueError("rounding=method: the estimate takes rounding to nearest; use measure=divergence")

    @property
    def active(self) -> bool:
        return self.bits is not None or self.bytes is not None

    @property
    def formats(self) -> list[WeightFormat]:
        return [named_format(name) for name in self.choices]
