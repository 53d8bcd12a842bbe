"""The floating-point formats against other people's: ml_dtypes, compressed-tensors and torchao."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lsiq.errors import NumericalError
from lsiq.formats.base import ActivationFormat, WeightFormat
from lsiq.formats.fp8 import FP8, FP8Activation
from lsiq.formats.minifloat import ELEMENTS, Minifloat
from lsiq.formats.mxfp import MXFP, MXFPActivation
from lsiq.formats.nvfp4 import NVFP4, NVFP4Activation, split_scale
from lsiq.formats.tensor import quantize

MILLION = 1_000_000
EVEN_OF_8_BITS = {("e4m3", "even"), ("e5m2", "even")}
every_element = pytest.mark.parametrize("name", ELEMENTS)


def edges(element: Minifloat) -> Tensor:
    """All numbers of the type, subnormal ones too, all ties between them, and the float32 numbers beside each."""
    numbers = torch.tensor([n for n in element.numbers() if n == n]).unique()
    points = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    beyond = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38])
    up, down = (points.nextafter(torch.tensor(end)) for end in (1e38, -1e38))
    return torch.cat([points, up, down, beyond])


def many(element: Minifloat) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(MILLION, generator=generator) * element.largest / 3
    numbers[::2] *= 10 ** (torch.rand(MILLION // 2, generator=generator) * 12 - 10)
    return torch.cat([numbers, edges(element)])


@every_element
def test_codes_and_numbers_are_those_of_ml_dtypes(name: Any) -> None:
    dtypes = pytest.importorskip("ml_dtypes")
    theirs = {"e2m1": "float4_e2m1fn", "e2m3": "float6_e2m3fn", "e3m2": "float6_e3m2fn", "e4m3": "float8_e4m3fn"}
    kind = getattr(dtypes, theirs.get(name, "float8_e5m2"))
    element = ELEMENTS[name]
    x = many(element)
    # ml_dtypes makes NaN or infinity of what is too large for 8 bits; here, as in hardware, that saturates.
    cast = x.clamp(-element.largest, element.largest).numpy().astype(kind)
    codes = element.encode(x)
    assert torch.equal(codes.byte(), torch.from_numpy(cast.view("uint8")))
    assert torch.equal(element.round(x), torch.from_numpy(cast.astype("float32")))
    assert torch.equal(element.decode(codes, torch.float32), element.round(x))
    assert torch.equal(element.encode(x.double()), codes.double())


def test_eight_bits_are_those_of_torch() -> None:
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        element = ELEMENTS[name]
        x = many(element)
        cast = x.clamp(-element.largest, element.largest).to(dtype)
        assert torch.equal(element.encode(x).byte(), cast.view(torch.uint8))


@every_element
def test_spacing_is_the_distance_to_the_next_number(name: Any) -> None:
    element = ELEMENTS[name]
    numbers = torch.tensor([n for n in element.numbers() if n >= 0]).unique()
    assert torch.equal(element.spacing(numbers[:-1]), numbers.diff())
    assert torch.equal(element.spacing(-numbers[:-1]), numbers.diff())


def matrices(block: int) -> list[Tensor]:
    """A million numbers in rows of several sizes, in blocks of several sizes, and on the ties of all formats."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = torch.randint(-6, 6, (1000, 1024 // block, 1), generator=generator)
    ties = torch.tensor(
        [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 7.5, 7.75, 8, 448, 464, 480]
    )
    chosen = ties[torch.randint(0, len(ties), (1000, 1024), generator=generator)] * random(1000, 1024).sign()
    return [
        random(1000, 1024) * 10 ** (torch.rand(1000, 1, generator=generator) * 3 - 3),
        (random(1000, 1024 // block, block) * 2.0**sizes).reshape(1000, 1024),
        chosen * 2.0 ** torch.randint(-3, 3, (1000, 1), generator=generator),
    ]


SCHEMES: dict[str, tuple[WeightFormat, str]] = {
    "mxfp4": (MXFP(element="e2m1"), "MXFP4A16"),
    "mxfp6": (MXFP(element="e2m3"), "MXFP6A16"),
    "mxfp8": (MXFP(element="e4m3"), "MXFP8A16"),
    "fp8": (FP8(), "FP8_DYNAMIC"),
    "nvfp4": (NVFP4(), "NVFP4A16"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_of_compressed_tensors(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    fmt, scheme = SCHEMES[name]
    args = PRESET_SCHEMES[scheme]["weights"]
    for w in matrices(fmt.width or 1024):
        lo, hi = fmt.extremes(w)
        scale, zero = fmt.fit(lo, hi)
        lo, hi = lo.squeeze(-1), hi.squeeze(-1)
        above = generate_gparam(lo.min(), hi.max()) if name == "nvfp4" else None
        theirs, _ = calculate_qparams(lo, hi, args, global_scale=above)
        if above is None:
            assert torch.equal(scale.squeeze(-1), theirs)
        else:
            # Their scale of 0.125 for blocks too quiet for any makes these zeros.
            known = theirs != 0.125
            assert known.float().mean() > 0.95  # it is an 8-bit number as well
            assert torch.equal((scale.squeeze(-1))[known], (theirs / above)[known])
            block, shared = split_scale(scale)
            assert torch.equal(block / shared, scale)
            theirs, above = block.squeeze(-1), shared
        mine = fmt.fake(w, scale, zero)
        assert torch.equal(mine, fake_quantize(w, theirs, None, args, global_scale=above))  # type: ignore[arg-type]
        assert torch.equal(mine, fmt.decode(fmt.encode(w, scale, zero), scale, zero))


ACTIVATIONS: dict[str, tuple[ActivationFormat, int]] = {
    "MXFP4": (MXFPActivation(element="e2m1"), 32),
    "MXFP8": (MXFPActivation(element="e4m3"), 32),
    "FP8_DYNAMIC": (FP8Activation(), 1024),
    "NVFP4": (NVFP4Activation(above=1.0), 16),
}


@pytest.mark.parametrize("scheme", ACTIVATIONS)
def test_activations_are_those_of_compressed_tensors(scheme: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    fmt, block = ACTIVATIONS[scheme]
    args = PRESET_SCHEMES[scheme]["input_activations"]
    above = torch.ones(1) if scheme == "NVFP4" else None
    for x in matrices(block):
        scale, zero = compute_dynamic_scales_and_zp(x[None], args, torch.nn.Linear(1, 1), global_scale=above)
        theirs = fake_quantize(x[None], scale, zero, args, global_scale=above)[0]
        differ = (theirs != fmt.fake(x)).reshape(1000, -1, block).any(-1)
        if scheme == "NVFP4":  # in blocks too quiet for any 8-bit scale theirs is 0.125, which makes them zeros
            differ &= scale.reshape(1000, -1) != 0.125
        assert not differ.any()


# The rule even of 8 bits is that of compressed-tensors, which is another.
@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, rule) for name in ELEMENTS for rule in ("floor", "even", "ceil") if (name, rule) not in EVEN_OF_8_BITS],
)
def test_blocks_are_those_of_torchao(name: Any, rule: Any) -> None:
    pytest.importorskip("torchao", reason="torchao is kept apart, see .ci/run")
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode

    kinds = {"e2m1": torch.float4_e2m1fn_x2, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    kind: Any = kinds.get(name, {"e2m3": "fp6_e2m3", "e3m2": "fp6_e3m2"}.get(name))
    mode = {"floor": "FLOOR", "even": "EVEN", "ceil": "RCEIL"}[rule]
    fmt = MXFP(element=name, rule=rule)
    for w in matrices(32):
        theirs = MXTensor.to_mx(w, kind, 32, ScaleCalculationMode[mode]).dequantize(torch.float32)
        assert torch.equal(fmt.fake(w, *fmt.fit(*fmt.extremes(w))), theirs)


@pytest.mark.parametrize("fmt", [MXFP(element="e2m1"), NVFP4(), FP8()], ids=["mxfp4", "nvfp4", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(fmt: WeightFormat, bad: float) -> None:
    w = torch.ones(4, 64)
    w[1, 40] = bad
    with pytest.raises(NumericalError, match="q_proj holds values that are not finite"):
        quantize(w, fmt, "q_proj")


@pytest.mark.parametrize(
    "fmt",
    [MXFPActivation(element="e2m1"), NVFP4Activation(), NVFP4Activation(above=1.0), FP8Activation()],
    ids=["mxfp4", "nvfp4", "nvfp4-fixed", "fp8"],
)
def test_activations_that_are_no_numbers_do_not_become_some(fmt: Any) -> None:
    x = torch.ones(2, 64)
    x[1, 40] = float("nan")
    rounded = fmt.fake(x)
    assert rounded[0].isfinite().all()
    assert rounded[1, 40].isnan()


def test_a_token_is_rounded_alike_in_every_batch() -> None:
    x = (
        torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 30.0, 0.01])[:, None, None]
    )
    for fmt in (MXFPActivation(element="e2m1"), NVFP4Activation(), FP8Activation()):
        assert torch.equal(fmt.fake(x)[1:2, 2:3], fmt.fake(x[1:2, 2:3]))
    tensor = NVFP4Activation(above="tensor")
    assert not torch.equal(tensor.fake(x)[2], tensor.fake(x[2]))


def test_a_matrix_scale_is_kept_where_groups_are_fitted_one_by_one() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    fmt = NVFP4()
    scale, _ = fmt.fit(*fmt.extremes(w))
    changed = w[:, 16:32] * 0.3
    lo, hi = fmt.extremes(changed)
    beside, alone = fmt.fit_beside(lo, hi, scale)[0], fmt.fit(lo, hi)[0]
    together = torch.cat([scale[:, :1], beside, scale[:, 2:]], 1)
    block, shared = split_scale(together)
    assert torch.equal(block / shared, together)
    with pytest.raises(ValueError, match="no 8-bit numbers"):
        split_scale(torch.cat([scale[:, :1], alone, scale[:, 2:]], 1))


def test_average_bits_count_all_scales() -> None:
    shape = (256, 512)
    bits = {
        "mxfp4": (MXFP(element="e2m1"), 4 + 8 / 32),
        "mxfp6": (MXFP(element="e3m2"), 6 + 8 / 32),
        "nvfp4": (NVFP4(), 4 + 8 / 16 + 32 / (256 * 512)),
        "fp8": (FP8(), 8 + 32 / 512),
        "fp8t": (FP8(per="tensor"), 8 + 32 / (256 * 512)),
    }
    for fmt, expected in bits.values():
        assert fmt.stored_bits(*shape) / (256 * 512) == expected
