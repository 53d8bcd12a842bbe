"""The format of keys and values as a cache keeps them, apart from that of activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lsiq.errors import ConfigError
from lsiq.formats.activation import Activation, rounded
from lsiq.formats.base import ActivationFormat
from lsiq.formats.cache_scales import CacheScales
from lsiq.formats.fit import check_divides
from lsiq.formats.fp8 import FP8Activation
from lsiq.formats.names import named_activation
from lsiq.settings import fill, settings

if TYPE_CHECKING:
    from torch import Tensor


FLOAT = fill(Activation, {})  # activations as they are


def _checked(value: Any) -> Any:
    if isinstance(value, str) and value != "calibrated":
        raise ValueError("is no scale")
    if isinstance(value, float | int) and not 0 < value < float("inf"):
        raise ValueError("a scale lies above 0")
    return value


@settings
class KeyValue:
    """How keys (after the rotary embedding) and values are rounded when a token's are appended to the cache.

    Integers of `bits` bits over the range of what shares a scale, zero included, by the formulas of `Activation`; or a
    named format of activations, such as a floating one.

        per=token     each token's own, once it is there: all channels of a head, or `group` of them, share a range
        per=channel   each channel's own over `group` tokens: rounded once the last of them is there, so that the
                      newest tokens, fewer than a group, are attended to in float

    `scale` fixes the scale of FP8 numbers for all tokens and heads, as caches of served models have it, and what lies
    beyond the largest number, 448 · scale for e4m3, saturates. A number serves all blocks, and nothing is measured.
    `calibrated` is one for keys and one for values in each block, under which the largest of the calibration tokens is
    the largest number: see `lsiq.calib.cache_range`.

    With neither `bits` nor `format` keys and values are rounded as queries are, as `quant.activation` says. `clip` is
    the share of each range that is kept, as there; given alone, it stands in place of that of `quant.activation`, and
    all else is as that says.

    Source: KIVI (arXiv 2402.02750, section 3) for keys per channel and the float residual; QuaRot (arXiv 2404.00456,
    section 5, `k_clip_ratio` and `v_clip_ratio` in its code) for `clip`.
    Deviation: values per channel too where `per=channel`; KIVI keeps them per token. No other tokens stay in float.
    """

    bits: int | None = Field(
        None, ge=2, le=16, description="2 to 8 bits, 16 to keep keys and values in float, or null for quant.activation"
    )
    format: str | None = Field(None, description="a format of activations by the name of its file, or null")
    per: Literal["token", "channel"] = Field("token", description="token or channel: what has a range of its own")
    group: int | None = Field(
        None,
        ge=1,
        description="channels of a head (per=token) or tokens (per=channel) that share a range; null for all",
    )
    symmetric: bool = Field(False, description="true or false")
    scale: Annotated[Literal["calibrated"] | float | None, BeforeValidator(_checked)] = Field(
        None, description="a fixed scale of FP8 numbers (format=fp8), a number above 0 or calibrated; or null"
    )
    clip: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of each range that is kept, 1 clips nothing; or null: all, or as quant.activation where "
        "bits is null too",
    )

    def __post_init__(self) -> None:
        if self.bits is not None and 8 < self.bits < 16:
            raise ValueError(f"bits={self.bits}: nothing lies between 8 and 16; use 2 to 8, 16 for float, or null")
        if self.bits is not None and self.format is not None:
            raise ValueError(f"format={self.format}: says its own bits; set bits=null")
        ranges = {"per": ("token", self.per), "group": (None, self.group), "symmetric": (False, self.symmetric)}
        changed = [f"{name}={str(value).lower()}" for name, (default, value) in ranges.items() if value != default]
        if self.format is not None and changed:
            raise ValueError(
                f"format={self.format}: shares ranges in its own way; use per=token, group=null and symmetric=false"
            )
        if self.bits is None and self.format is None and changed:
            raise ValueError(
                f"{changed[0]}: applies to keys and values with bits of their own; set quant.kv.bits=4 or another, or "
                "leave it out"
            )
        if self.bits == 16 and changed:
            raise ValueError(f"{changed[0]}: bits=16 leaves keys and values in float; leave it out, or use 2 to 8 bits")
        if self.per == "channel" and self.group is None:
            raise ValueError("group=null: a channel's range is shared by a number of tokens; set group=32 or another")
        if self.format is not None and self.named.bits == 16:
            raise ValueError(f"format={self.format}: leaves activations in float; name another file, or use bits")
        if self.format is not None and getattr(self.named, "per", "token") == "tensor":
            raise ValueError(
                f"format={self.format}: one scale for all tokens would depend on tokens that come later; name a "
                "format with a scale per token, such as fp8"
            )
        if self.scale is not None and self.fixed is None:
            raise ValueError(f"scale={self._scale}: only FP8 numbers have a fixed scale; use format=fp8, or scale=null")
        if self.clip is not None and self.format is not None:
            raise ValueError(f"clip={self.clip:g}: format={self.format} says its own ranges; use bits, or clip=null")
        if self.clip is not None and self.bits == 16:
            raise ValueError(
                f"clip={self.clip:g}: bits=16 leaves keys and values in float; use 2 to 8 bits, or clip=null"
            )

    @property
    def active(self) -> bool:
        """Whether keys and values have a format of their own, be it float or another share of their ranges."""
        return self.bits is not None or self.format is not None or self.clip is not None

    def beside(self, activation: ActivationFormat) -> KeyValue:
        """Return the format beside one of activations, whose bits it takes where it says `clip` alone.

        Raises:
            ValueError: keys and values are not rounded to integers per token there.
        """
        if self.clip is None or self.bits is not None:
            return self
        rounds = activation.active and activation.attention
        if rounds and isinstance(activation, Activation) and activation.per == "token":
            return replace(self, bits=activation.bits, symmetric=activation.symmetric)
        raise ValueError(
            f"kv.clip={self.clip:g}: quant.activation rounds keys and values to no integers per token; set "
            "quant.kv.bits=4 or another, or quant.kv.clip=null"
        )

    @property
    def rounds(self) -> bool:
        return self.active and self.bits != 16

    @cached_property
    def named(self) -> ActivationFormat:
        """The format that `format` names; its file is read once, and not for every token that is rounded."""
        assert self.format is not None
        return named_activation(self.format)

    @property
    def fixed(self) -> FP8Activation | None:
        """The FP8 numbers that are kept under a fixed scale; None where scales are found."""
        fmt = None if self.format is None or self.scale is None else self.named
        return fmt if isinstance(fmt, FP8Activation) else None

    @property
    def calibrated(self) -> bool:
        """Whether the scales are those of each block, found on the calibration tokens."""
        return self.scale == "calibrated"

    @property
    def _scale(self) -> str:
        return f"{self.scale:g}" if isinstance(self.scale, float) else str(self.scale)

    @property
    def suffix(self) -> str:
        """What the name of a setting says of it."""
        if not self.active:
            return ""
        if self.format is not None:
            scale = "" if self.scale is None else "-calibrated" if self.calibrated else f"s{self._scale}"
            return f"-kv-{self.format}{scale}"
        if self.bits is None:
            return f"-kv-clip{self.clip:g}"
        shared = "" if self.group is None else f"{'t' if self.per == 'channel' else 'g'}{self.group}"
        clip = "" if self.clip in (None, 1) else f"-clip{self.clip:g}"
        return f"-kv{self.bits}{shared}{'-sym' if self.symmetric else ''}{clip}"

    @property
    def words(self) -> str:
        """The format in words, for model cards."""
        if (fixed := self.fixed) is not None:
            number = f"8-bit floating point ({fixed.element})"
            if self.calibrated:
                return f"{number} under fixed scales, one for keys and one for values in each block, from calibration"
            return f"{number} under a fixed scale of {self._scale}"
        if self.format is not None:
            return self.named.words
        if self.bits is None:
            return f"as activations, {self.clip:g} of each range kept"
        shared = {"token": "channels of a head", "channel": "tokens of a channel"}[self.per]
        count = "all" if self.group is None else f"{self.group}"
        kept = "" if self.clip in (None, 1) else f", {self.clip:g} of it kept"
        return f"{self.bits} bits, {'' if self.symmetric else 'a'}symmetric, a range for {count} {shared}{kept}"

    def check(self, head_dim: int) -> None:
        """Raise ConfigError unless groups of channels divide a head's."""
        if self.rounds and self.per == "token":
            places = {f"head_dim={head_dim}": head_dim}
            check_divides(
                f"quant.kv.group={self.group}", self.group, places, "quant.kv.group={}".format, "quant.kv.group=null"
            )

    def fake(self, x: Tensor, scale: float | None = None) -> Tensor:
        """Return keys or values `(…, T, channels)` as the cache holds them; rounding lets gradients straight through.

        With `per=channel` the last tokens, fewer than a group, stay as they are.

        Args:
            scale: the calibrated one, where scales are.
        """
        if not self.rounds:
            return x
        if (fixed := self.fixed) is not None:
            scale = self.scale if isinstance(self.scale, float) else scale
            assert scale is not None, "calibrated scales are measured before anything is rounded under them"
            return fixed.fake_under(x, scale)
        if self.format is not None:
            return self.named.fake(x)
        if self.per == "token":
            groups = x.unflatten(-1, (-1, self.group or x.shape[-1]))
            return self._rounded(groups, -1).flatten(-2)
        import torch

        assert self.group is not None
        whole = x.shape[-2] // self.group * self.group
        if not whole:
            return x
        groups = x[..., :whole, :].unflatten(-2, (-1, self.group))
        return torch.cat([self._rounded(groups, -2).flatten(-3, -2), x[..., whole:, :]], -2)

    def scales_for(self, largest: Tensor) -> CacheScales:
        """Return the fixed scales under which the largest key and value `(2,)`, float32, become the largest number."""
        assert self.fixed is not None  # the settings see to it
        return CacheScales.of(self.fixed.scale_for(largest))

    def _rounded(self, x: Tensor, dim: int) -> Tensor:
        assert self.bits is not None
        return rounded(x, (dim,), self.bits, self.symmetric, 1.0 if self.clip is None else self.clip)


@dataclass(frozen=True)
class Running:
    """What is rounded while a block runs: activations, and keys and values by a format of their own.

    It stands wherever an activation format does, and is that format but for `cache`.

    Attributes:
        scales: those of the block that runs, where the cache has calibrated ones.
    """

    activation: ActivationFormat
    cache: KeyValue
    scales: CacheScales | None = None

    active = True

    @property
    def bits(self) -> int:
        return self.activation.bits

    @property
    def attention(self) -> bool:
        return self.activation.active and self.activation.attention

    @property
    def softmax(self) -> bool:
        return self.activation.active and self.activation.softmax

    @property
    def suffix(self) -> str:
        return self.activation.suffix

    @property
    def family(self) -> str:
        return self.activation.family

    @property
    def number(self) -> str:
        return self.activation.number

    @property
    def factors(self) -> str:
        return self.activation.factors

    @property
    def words(self) -> str:
        return self.activation.words

    def fake(self, x: Tensor) -> Tensor:
        return self.activation.fake(x)

    def fake_softmax(self, weights: Tensor) -> Tensor:
        return self.activation.fake_softmax(weights)

    def fake_keys(self, x: Tensor) -> Tensor:
        """Return keys `(…, T, channels)` as the cache holds them."""
        return self.cache.fake(x, None if self.scales is None else self.scales.key)

    def fake_values(self, x: Tensor) -> Tensor:
        """Return values `(…, T, channels)` as the cache holds them."""
        return self.cache.fake(x, None if self.scales is None else self.scales.value)


def under_scales(fmt: ActivationFormat | None, scales: CacheScales | None) -> ActivationFormat | None:
    """Return the format as a block has it whose cache has these scales; as it is where none are asked for."""
    if isinstance(fmt, Running) and fmt.cache.calibrated and scales is not None:
        return replace(fmt, scales=scales)
    return fmt


def cache_of(fmt: ActivationFormat | None) -> KeyValue | None:
    """Return the format of keys and values, where they have one of their own."""
    return fmt.cache if isinstance(fmt, Running) else None


def refuse_padded(kv: KeyValue, tasks: object) -> None:
    """Raise ConfigError for tasks under ranges that tokens share: pads of a batch would count."""
    if tasks and kv.rounds and kv.per == "channel":
        raise ConfigError(
            "quant.kv.per=channel: prompts of tasks are padded, and ranges that tokens share would count the padding; "
            "use eval.tasks=[] or quant.kv.per=token"
        )
