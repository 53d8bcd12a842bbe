"""Side branches of linears, through forward hooks: no layer of any model is copied or changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from lsiq.formats.base import ActivationFormat

Factors = Mapping[str, tuple[Tensor, Tensor]]


@contextlib.contextmanager
def side_branches(module: nn.Module, factors: Factors, fmt: ActivationFormat | None) -> Iterator[None]:
    """While this lasts, each linear named in `factors` gives `W x + b + up (down x)`.

    Args:
        factors: `up (out, rank)` and `down (rank, in)` by dotted name of the linear's weight.
        fmt: the format of activations: `x` comes to the hook in it, and what enters `up` is put into it here.
    """

    def add(up: Tensor, down: Tensor) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inner = args[0] @ down.t()
            return output + (inner if fmt is None else fmt.fake(inner)) @ up.t()

        return hook

    handles = [
        module.get_submodule(name.removesuffix(".weight")).register_forward_hook(add(up, down))
        for name, (up, down) in factors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
