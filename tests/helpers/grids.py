"""Weights of every size and shape, with formats that may hold them: strategies for hypothesis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from lsiq.formats.base import WeightFormat
from lsiq.formats.fp8 import FP8
from lsiq.formats.integer import Integer
from lsiq.formats.minifloat import ELEMENTS
from lsiq.formats.mxfp import MXFP
from lsiq.formats.mxint import MXInt
from lsiq.formats.nvfp4 import NVFP4

RULES = ["floor", "even", "ceil"]


@st.composite
def weights_and_integers(draw: st.DrawFn) -> tuple[torch.Tensor, Integer]:
    group = draw(st.sampled_from([1, 2, 8, 16, None]))
    rows, columns = draw(st.integers(1, 5)), (group or 1) * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-42, 38))
    kind = draw(st.sampled_from(["plain", "dead row", "constant row", "one sign", "duplicates"]))
    if kind == "dead row":
        w[0] = 0.0
    elif kind == "constant row":
        w[-1] = w[-1, 0].item()
    elif kind == "one sign":
        w = -w.abs()
    elif kind == "duplicates":
        w = w[:1].repeat(rows, 1)
    w = w.clamp(-3.0e38, 3.0e38)
    fmt = Integer(
        bits=draw(st.integers(2, 8)),
        group=group,
        symmetric=draw(st.booleans()),
        scale=draw(st.sampled_from(["float32", "float16"])),
    )
    return w, fmt


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int, most: int, more: Sequence[str] = ()) -> torch.Tensor:
    """Draw a matrix of numbers up to `10^most` in size, plain or with one of the peculiarities that grids meet."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-42, most))
    kind = draw(st.sampled_from(["plain", "dead row", "powers of two", "one sign", *more]))
    if kind == "dead row":
        w[0] = 0.0
    elif kind == "powers of two":
        w = torch.exp2(torch.randint(-20, 20, w.shape, generator=generator).float())
    elif kind == "one sign":
        w = -w.abs()
    elif kind == "quiet row":
        w[0] *= 1e-5  # below what an 8-bit scale reaches beside the others
    return w


@st.composite
def weights_and_blocks(draw: st.DrawFn) -> tuple[torch.Tensor, MXInt]:
    block = draw(st.sampled_from([1, 4, 16, 32]))
    rows, columns = draw(st.integers(1, 5)), block * draw(st.integers(1, 4))
    w = draw(matrices(rows, columns, 37))
    fmt = MXInt(bits=draw(st.integers(2, 8)), block=block, exponent=draw(st.sampled_from([4, 8])))
    return w, fmt


@st.composite
def weights_and_floats(draw: st.DrawFn) -> tuple[torch.Tensor, WeightFormat]:
    block = draw(st.sampled_from([1, 4, 16, 32]))
    rows, columns = draw(st.integers(1, 5)), block * draw(st.integers(1, 4))
    w = draw(matrices(rows, columns, 36, ["quiet row"]))
    fmt: WeightFormat = draw(
        st.one_of(
            st.builds(MXFP, element=st.sampled_from(list(ELEMENTS)), block=st.just(block), rule=st.sampled_from(RULES)),
            st.builds(NVFP4, block=st.just(block)),
            st.builds(FP8, element=st.sampled_from(["e4m3", "e5m2"]), per=st.sampled_from(["channel", "tensor"])),
        )
    )
    return w, fmt
