"""What a model hands its blocks: the states that enter the first one, and the keyword arguments of each.

Blocks of one kind get the same arguments. Where a model mixes kinds (full attention and windows), masks differ by
kind, and in some families the rotary embeddings as well: such an argument is held as `ByKind`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

# The argument of a model and of its blocks that holds keys and values of earlier tokens: transformers 5.24 renamed it.
CACHE = "cache" if tuple(map(int, version("transformers").split(".")[:2])) >= (5, 24) else "past_key_values"
# What a block is given besides its arguments, and what is no part of its function.
_CACHE = (CACHE, "use_cache")


@dataclass(frozen=True)
class ByKind:
    """One keyword argument that differs between kinds of blocks."""

    values: Mapping[str, Any]


class _Reached(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    pass


def kinds_of_blocks(config: Any) -> tuple[str, ...]:
    """Return how each block attends, as transformers calls it; empty where all attend alike."""
    kinds = tuple(getattr(config, "layer_types", None) or ())[: config.num_hidden_layers]
    return kinds if len(set(kinds)) > 1 else ()


def for_kind(kwargs: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the arguments of a block of one kind."""
    return {name: value.values[kind] if isinstance(value, ByKind) else value for name, value in kwargs.items()}


def split_kinds(kwargs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the arguments by kind; under the empty name where all blocks get the same."""
    kinds = next((tuple(value.values) for value in kwargs.values() if isinstance(value, ByKind)), ("",))
    return {kind: for_kind(kwargs, kind) for kind in kinds}


def join_kinds(by_kind: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the arguments of all kinds as one mapping: the reverse of `split_kinds`."""
    first = next(iter(by_kind.values()))
    return {
        name: value
        if all(kwargs[name] is value for kwargs in by_kind.values())
        else ByKind({kind: kwargs[name] for kind, kwargs in by_kind.items()})
        for name, value in first.items()
    }


def enter(
    skeleton: nn.Module, blocks: Sequence[nn.Module], kinds: Sequence[str], inputs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Return what enters the first block, `(batch, T, d)`, and the blocks' keyword arguments.

    The model runs until a block of each kind was reached. Blocks passed on the way run on the meta device, where
    they have no weights and compute nothing.

    Args:
        kinds: of the blocks; empty where all are alike, or where only what enters the first is wanted.
        inputs: of the skeleton's forward pass.
    """
    entered: list[Tensor] = []
    by_kind: dict[str, dict[str, Any]] = {}
    firsts = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)} or {"": 0}

    def reach(kind: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            arguments = {name: value for name, value in kwargs.items() if name not in _CACHE}
            hidden = args[0] if args else arguments.pop("hidden_states")
            entered.append(hidden)
            by_kind.setdefault(kind, arguments)
            if len(by_kind) == len(firsts):
                raise _Reached
            # Without the mask, which may be one for tokens that are in a cache and not here.
            call = ((hidden,), {**arguments, "attention_mask": None})
            return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), call)

        return hook

    last = max(firsts.values())
    handles = [
        block.register_forward_pre_hook(reach(kinds[index] if kinds else ""), with_kwargs=True)
        for index, block in enumerate(blocks[: last + 1])
    ]
    try:
        with contextlib.suppress(_Reached):
            skeleton(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(by_kind) < len(firsts):
        raise AssertionError("the model ran without entering its blocks")
    return entered[0], join_kinds(by_kind)
