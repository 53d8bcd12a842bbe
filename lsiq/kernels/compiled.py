"""Functions with their backward pass, traced once and compiled for all blocks of a shape.

Tracing runs a function's Python on tensors without data: hooks, context variables and the code of transformers act as
they always do and no compiler has to follow them. What is compiled belongs to shapes and settings, not to one module,
so the first block pays for all. The plain version of each is the function itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# What has been compiled in this process, by function and shapes.
COMPILED: dict[tuple[Any, ...], Callable[..., Any]] = {}


def compiled(function: Callable[..., Any], identity: tuple[Any, ...], keep_all: bool = False) -> Callable[..., Any]:
    """Return `function`, of any nest of tensors, compiled the first time for each set of shapes.

    Args:
        identity: what decides the function besides its arguments' shapes; another function of the same identity must
            do the same.
        keep_all: whether the backward pass may compute nothing anew, for functions whose comparisons must come out
            as they did.
    """

    def run(*arguments: Any) -> Any:
        leaves, structure = pytree.tree_flatten(arguments)
        key = (identity, str(structure), torch.is_grad_enabled(), *(_shape(leaf) for leaf in leaves))
        if key not in COMPILED:
            COMPILED[key] = _compile(function, keep_all)
        return COMPILED[key](*arguments)

    return run


def _shape(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad)


def _compile(function: Callable[..., Any], keep_all: bool) -> Callable[..., Any]:
    from functorch.compile import aot_function, default_partition, min_cut_rematerialization_partition
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    def compile_graph(graph: Any, inputs: Any) -> Any:
        # Triton 3.6 fails on a kernel that holds a whole group and takes both its minimum and its maximum.
        with config.patch({"triton.persistent_reductions": not keep_all}):
            return compile_fx_inner(graph, inputs)

    return aot_function(
        function,
        fw_compiler=compile_graph,  # type: ignore[arg-type]
        partition_fn=default_partition if keep_all else min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
