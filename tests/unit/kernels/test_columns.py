"""The Triton kernel of GPTQ rounds as its plain loop does; on a CPU, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers.marks import slow
from torch import Tensor

from lsiq.formats.base import WeightFormat
from lsiq.formats.integer import Integer
from lsiq.formats.mxfp import MXFP
from lsiq.formats.mxint import MXInt
from lsiq.methods.gptq.columns import Curvature, choose_kernels, factorise, round_with_feedback

pytest.importorskip("triton", reason="Triton is not installed")

from lsiq.kernels import columns


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter takes as long for a small tile as for a large one."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(columns, "TILE_BYTES", 1 << 16)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layer(width: int, act_order: bool, precision: str, dead: int = 2) -> tuple[Tensor, Curvature]:
    """Weights `(24, width)` and the curvature of correlated inputs with loud and dead channels."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(24, width, generator=generator) * 0.1
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    x = torch.randn(4 * width, width, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(width))
    x[:, ::17] *= 6
    x[:, 5 : 5 + dead] = 0
    gram = (x.t() @ x / len(x)).to(device())
    return w.to(device()), factorise(gram, act_order, 0.01, precision, "layer")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fmt", "width", "act_order", "static"),
    [
        (Integer(bits=3, group=32), 96, True, True),
        (Integer(bits=4, group=None, symmetric=True), 40, False, False),
        slow(Integer(bits=2, group=32), 96, False, False),
        slow(Integer(bits=2, group=64, symmetric=True), 128, True, True),
        slow(Integer(bits=3, group=128, symmetric=True), 256, False, False),
        slow(Integer(bits=4, group=64, scale="float16"), 192, False, False),
        slow(Integer(bits=4, group=128), 256, True, True),
        slow(Integer(bits=8, group=32, symmetric=True), 96, True, True),
        slow(Integer(bits=8, group=None), 150, True, True),
        slow(MXInt(bits=4, block=16), 96, False, True),
    ],
)
def test_codes_and_grids_are_those_of_the_plain_loop(
    fmt: WeightFormat, width: int, act_order: bool, static: bool
) -> None:
    w, curvature = layer(width, act_order, "float64")
    plain, fused = (
        round_with_feedback(w, curvature, fmt, static, 70, kernels)  # the last block is narrower
        for kernels in ("plain", "triton")
    )
    assert plain.codes.float().std() > 0.3
    assert torch.equal(fused.codes, plain.codes)
    assert torch.equal(fused.scale, plain.scale)
    assert torch.equal(fused.zero, plain.zero)


def test_in_float32_few_codes_lie_close_enough_to_a_boundary_to_fall_the_other_way() -> None:
    w, curvature = layer(96, True, "float32")
    fmt = Integer(bits=4, group=32)
    plain, fused = (round_with_feedback(w, curvature, fmt, True, 128, kernels) for kernels in ("plain", "triton"))
    assert (plain.codes == fused.codes).float().mean() > 0.99  # measured: 1.0


@pytest.mark.parametrize(
    ("fmt", "covered"), [(Integer(bits=4), True), (MXInt(bits=4), True), (MXFP(element="e2m1"), False)]
)
def test_the_kernel_is_for_formats_of_equal_steps_and_for_a_gpu(fmt: WeightFormat, covered: bool) -> None:
    assert columns.covers(fmt) == covered
    assert choose_kernels("auto", torch.zeros(2, 32), fmt) == "plain"
    expected = "triton" if covered and torch.cuda.is_available() else "plain"
    assert choose_kernels("auto", torch.zeros(2, 32, device=device()), fmt) == expected
    assert choose_kernels("plain", torch.zeros(2, 32, device=device()), fmt) == "plain"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lsiq.kernels.columns import round_block

for dtype in ("fp32", "fp64"):
    constants = {"COLUMNS": 128, "ROWS": 8, "LOWEST": 0, "LEVELS": 15, "MAGIC": 2.0**23}
    kinds = {name: f"*{dtype}" for name in round_block.arg_names}
    kinds |= {"codes_ptr": "*u8", "count": "i32", "height": "i32"}
    source = ASTSource(round_block, kinds | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 1, "enable_fp_fusion": False})
    assert "fma.rn" not in compiled.asm["ptx"], dtype
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu_and_rounds_products_before_it_subtracts_them() -> None:
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=os.environ | {"TRITON_INTERPRET": "0"})
