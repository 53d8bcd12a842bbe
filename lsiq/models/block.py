"""One transformer block as a function of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lsiq.formats.activation import Activation
from lsiq.formats.base import ActivationFormat
from lsiq.formats.cache_scales import CacheScales
from lsiq.formats.key_value import under_scales
from lsiq.linalg.rotation import QUERY_KEY, Rotation
from lsiq.models.attention import activations
from lsiq.models.entrance import CACHE, for_kind
from lsiq.models.prefix import BlockPrefix, KeysReached, PrefixCache, Recorder
from lsiq.models.result import result_weights
from lsiq.models.shape import Shape
from lsiq.models.side_branches import Factors, side_branches
from lsiq.models.spec import Group, ModelSpec
from lsiq.runtime import streams
from lsiq.runtime.micro_batch import MicroBatch, in_parts

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.result import BlockResult


class BlockFunction(Protocol):
    """A block with its weights: `(batch, T, d) -> (batch, T, d)`.

    `kwargs` replace the keyword arguments that the block was read with, for sequences of another length.
    """

    def __call__(self, hidden: Tensor, kwargs: Mapping[str, Any] | None = None, /) -> Tensor: ...


@dataclass(frozen=True)
class Block:
    """An immutable view of one transformer block.

    Attributes:
        module: the untouched layer of transformers, on the meta device: structure without weights.
        spec: what is known of its family.
        index: its place in the model, from 0.
        weights: by dotted name inside the block, float32 on the compute device.
        kwargs: the keyword arguments that the model passes to every block (mask, positions, rotary embedding), at
            batch 1; they broadcast over any batch.
        dtype: the precision in which the block runs.
        unfoldable: why scales cannot be folded into its norms; None where they can.
        rotations: by the first linear of a stage, what rotates the stage's input while the block runs; `query_key` for
            queries and keys, head by head after the rotary embedding. The weights are those of rotated inputs.
        prefix: tokens whose keys and values stand before those of every sequence.
        compiled: whether the block runs compiled where gradients are wanted; rotated inputs and prefixes do not.
        fused_rounding: whether one kernel rounds tokens where gradients are wanted; compiled blocks do so anyway.
        kind: how the block attends, where the blocks of its model do not all attend alike.
        untouched: dotted names of linears' weights that stay in float.
        cache_scales: under which keys and values are rounded, where scales are calibrated.
    """

    module: nn.Module
    spec: ModelSpec
    index: int
    weights: Mapping[str, Tensor]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype
    unfoldable: str | None = None
    rotations: Mapping[str, Rotation] = field(default_factory=dict)
    prefix: BlockPrefix | None = None
    compiled: bool = False
    fused_rounding: bool = False
    kind: str = ""
    untouched: frozenset[str] = frozenset()
    cache_scales: CacheScales | None = None

    @property
    def device(self) -> torch.device:
        """Where its weights lie, and so where it computes."""
        return next(iter(self.weights.values())).device

    @property
    def linears(self) -> tuple[str, ...]:
        """Dotted names of the weights to quantise, in the order in which a token meets them."""
        return tuple(name for linear in self.spec.linears if (name := f"{linear}.weight") not in self.untouched)

    def under(self, quant: QuantSettings) -> Block:
        """Return the block with the linears that a setting leaves in float untouched."""
        formats = quant.in_block(self.index)
        names = (f"{linear}.weight" for linear in self.spec.linears)
        exempt = quant.mixed or quant.kv.active  # else a setting of 16 bits quantises nothing, and no method is asked
        return replace(self, untouched=frozenset(name for name in names if exempt and formats.of(name).bits == 16))

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self._attention.head_dim  # type: ignore[return-value]

    @property
    def heads(self) -> tuple[int, int]:
        """The number of query heads and of key-value heads."""
        config: Any = self._attention.config
        return config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)

    @property
    def shape(self) -> Shape:
        """Counts of its model that costs go by."""
        return Shape.of_config(self.spec.model_type, self._attention.config)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The channels that may be rescaled: those of the family, less what is rotated between producer and reader."""
        return self._unrotated(self.spec.groups)

    @property
    def homogeneous(self) -> tuple[Group, ...]:
        """Further channels that may be rescaled, which reach their reader through a ReLU."""
        return self._unrotated(self.spec.homogeneous)

    def _unrotated(self, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        return tuple(group for group in groups if self.rotation_of(group.consumers[0]) is None)

    @property
    def identity(self) -> str:
        """What decides the layer's function besides its weights: the configuration, and what is set layer by layer."""
        attention = self._attention
        plain = (bool, int, float, str, type(None))
        settings = {name: value for name, value in vars(attention).items() if isinstance(value, plain)}
        settings.pop("layer_idx", None)  # only says where its keys go in a cache
        return f"{attention.config.to_json_string()} {sorted(settings.items())}"  # type: ignore[union-attr]

    @property
    def _attention(self) -> nn.Module:
        return self.module.get_submodule(self.spec.query.rpartition(".")[0])

    def rotation_of(self, linear: str) -> Rotation | None:
        """Return what rotates the input of a linear, named without `.weight`."""
        return next((self.rotations.get(stage[0]) for stage in self.spec.stages if linear in stage), None)

    def rotated(self, rotations: Mapping[str, Rotation]) -> Block:
        """Return the block with more of its inputs rotated, weights included; its function stays the same.

        Args:
            rotations: named as in the attribute; what is rotated already is rotated again.
        """
        device = self.device
        weights, all_rotations = dict(self.weights), dict(self.rotations)
        for place, rotation in rotations.items():
            rotation = rotation.to(device)
            before = self.rotations.get(place)
            all_rotations[place] = rotation if before is None else before.then(rotation)
            for name in next((stage for stage in self.spec.stages if stage[0] == place), ()):
                weights[f"{name}.weight"] = rotation.apply(weights[f"{name}.weight"])
        return replace(self, weights=weights, rotations=all_rotations)

    def in_dtype(self, dtype: torch.dtype) -> Block:
        """Return the block running in another precision, rotary embeddings and float masks included."""

        def cast(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cast(item) for item in value)
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        prefix = self.prefix
        if prefix is not None:
            prefix = replace(prefix, kwargs={name: cast(value) for name, value in prefix.kwargs.items()})
        kwargs = {name: cast(value) for name, value in self.kwargs.items()}
        return replace(self, dtype=dtype, kwargs=kwargs, prefix=prefix)

    def with_weights(
        self,
        weights: Mapping[str, Tensor],
        activation: ActivationFormat | None = None,
        branches: Factors | None = None,
    ) -> BlockFunction:
        """Return the block as a function `(batch, T, d) -> (batch, T, d)` in which `weights` replace the block's own.

        With `activation`, the inputs of the linears and queries, keys and values are put into that format. Linears
        named in `branches` have their low-rank product added.
        Differentiable in the weights. Nothing is written: the layer of transformers runs through `functional_call`.
        """
        activation = under_scales(activation, self.cache_scales)
        cast = {name: weight.to(self.dtype) for name, weight in {**self.weights, **weights}.items()}
        # The function outlives the block, and must not keep its float32 weights alive.
        module, linears, block_kwargs, kind, index = self.module, self.spec.linears, self.kwargs, self.kind, self.index
        beside = {name: (up.to(self.dtype), down.to(self.dtype)) for name, (up, down) in (branches or {}).items()}
        rotations = {name: r for name in linears if (r := self.rotation_of(name)) is not None}
        if QUERY_KEY in self.rotations:
            rotations[QUERY_KEY] = self.rotations[QUERY_KEY]

        prefix = 0 if self.prefix is None else self.prefix.hidden.shape[1]

        def call(hidden: Tensor, kwargs: Mapping[str, Any], fmt: ActivationFormat | None) -> Tensor:
            with activations(module, linears, fmt, rotations, prefix), side_branches(module, beside, fmt):
                return functional_call(module, cast, (hidden,), dict(kwargs))

        if self.compiled and not (rotations or beside or self.prefix) and compilable(activation):
            compiled_call = self._compiled(activation)
            # Evaluation comes in other shapes, and too few of them.
            return lambda hidden, kwargs=None, /: (
                compiled_call(cast, hidden, block_kwargs if kwargs is None else for_kind(kwargs, kind))
                if torch.is_grad_enabled()
                else call(hidden, block_kwargs if kwargs is None else for_kind(kwargs, kind), activation)
            )

        before = None if self.prefix is None else _prefix_cache(self.prefix, self.dtype, call)
        in_training = activation
        if self.fused_rounding and compilable(activation):
            in_training = fused_activation(activation)

        def run(hidden: Tensor, kwargs: Mapping[str, Any] | None = None, /) -> Tensor:
            call_kwargs = block_kwargs if kwargs is None else for_kind(kwargs, kind)
            if before is not None:
                call_kwargs = before.begin(call_kwargs, len(hidden), index)
            return call(hidden, call_kwargs, in_training if torch.is_grad_enabled() else activation)

        return run

    def _compiled(self, activation: ActivationFormat | None) -> Callable[..., Tensor]:
        from lsiq.kernels.compiled import compiled

        module, linears = self.module, self.spec.linears
        fmt = fused_activation(activation)

        def call(weights: Mapping[str, Tensor], hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
            with activations(module, linears, fmt):
                return functional_call(module, dict(weights), (hidden,), dict(kwargs))

        return compiled(call, (self.identity, activation))

    def with_result(self, result: BlockResult, activation: ActivationFormat | None = None) -> BlockFunction:
        """Return, as a function, the block with all that a result stands for, side branches among it."""
        device = self.device
        factors = {name: branch.decode() for name, branch in result.branches.items()}
        branches = {name: (up.to(device), down.to(device)) for name, (up, down) in factors.items()}
        return self.holding(result).with_weights({}, activation, branches)

    def holding(self, result: BlockResult) -> Block:
        """Return the block with the weights, rotations and scales of a result, without its side branches."""
        weights = {**self.weights, **result_weights(result, self.weights)}
        return replace(self.with_rotations_of(result), weights=weights)

    def with_rotations_of(self, result: BlockResult) -> Block:
        """Return the block with the rotations of a result, for whose inputs its weights are not made, and its scales.

        Where the scales of keys and values are not measured yet, those of the block stay.
        """
        device = self.device
        rotations = {place: rotation.to(device) for place, rotation in result.rotations.items()}
        scales = result.cache_scales or self.cache_scales
        return replace(self, rotations={**self.rotations, **rotations}, cache_scales=scales)


def compilable(activation: ActivationFormat | None) -> bool:
    """Whether a block with activations in this format can run compiled, and one kernel can round its tokens."""
    return (
        activation is None
        or not activation.active
        or (isinstance(activation, Activation) and activation.per == "token")
    )


def fused_activation(activation: ActivationFormat | None) -> ActivationFormat | None:
    """Return the format as one kernel, an operation that a compiler leaves whole."""
    if activation is None or not activation.active:
        return None
    from lsiq.kernels.activation import FusedActivation

    return FusedActivation(activation)  # type: ignore[arg-type, return-value]


def _prefix_cache(
    prefix: BlockPrefix, dtype: torch.dtype, call: Callable[[Tensor, Mapping[str, Any], None], Tensor]
) -> PrefixCache:
    """Make keys and values of the prefix with the block's weights; its activations are not rounded."""
    try:
        call(prefix.hidden.to(dtype), {**prefix.kwargs, CACHE: Recorder()}, None)
    except KeysReached as reached:
        return PrefixCache(reached.keys, reached.values)
    raise AssertionError("the block ran without reaching its cache")


class FloatStream:
    """What the float model's blocks make of the calibration tokens, each computed once.

    Args:
        block: gives a block by its index.
        hidden: `(N, T, d)`, what enters it.
        batch: sequences that pass through a block at once.
        first: the block that `hidden` enters, where it is not the model's first.
    """

    def __init__(self, block: Callable[[int], Block], hidden: Tensor, batch: int, first: int = 0) -> None:
        self._block, self._batch = block, batch
        self._streams = {first - 1: hidden}

    def after(self, index: int) -> Tensor:
        """Return what leaves the block `index`, `(N, T, d)`; a look ahead has computed it already."""
        if index not in self._streams:
            before, block = self.after(index - 1), self._block(index)
            device = block.device
            self._streams[index] = run_stream(block.with_weights({}), before, self._batch, device)
        return self._streams[index]

    def forget_before(self, index: int) -> None:
        """Let go of what entered the blocks up to `index`."""
        self._streams = {position: stream for position, stream in self._streams.items() if position >= index}


@torch.no_grad()
def run_stream(block: BlockFunction, stream: Tensor, batch: int, device: torch.device) -> Tensor:
    """Return the block's outputs for a stream `(N, T, d)`, `batch` sequences at a time, where the stream lies."""
    on_host = stream.device.type == "cpu"
    out = streams.empty(stream.shape, stream.dtype, stream.is_pinned()) if on_host else torch.empty_like(stream)
    micro = MicroBatch(batch, "running a block")
    for start in range(0, len(stream), batch):
        part = slice(start, start + batch)
        out[part].copy_(in_parts(block, stream[part].to(device, non_blocking=True), micro), non_blocking=True)
        streams.release(stream, out)
    if out.is_pinned():
        torch.cuda.synchronize(device)  # the copies have arrived
    return out
