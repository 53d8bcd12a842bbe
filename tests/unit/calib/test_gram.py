"""Gram matrices of what enters linears: in which precision a GPU makes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import model_settings
from torch import Tensor

from lsiq.calib import gram as gram_module
from lsiq.calib.gram import gram_matrix, input_grams
from lsiq.calib.scale_search import observe_inputs
from lsiq.formats.activation import Activation
from lsiq.models.loading import Model, load


@pytest.fixture
def precisions(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether products were allowed in TF32, one entry for each; a CPU multiplies in float32 either way."""
    torch.set_float32_matmul_precision("highest")  # whatever was trained in this process before
    allowed: list[bool] = []
    product = gram_module._product

    def noting(x: Tensor) -> Tensor:
        allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return product(x)

    monkeypatch.setattr(gram_module, "_product", noting)
    return allowed


def in_bfloat16(checkpoint: Path) -> Model:
    settings = replace(model_settings(checkpoint), dtype="bfloat16")
    return load(settings, checkpoint, torch.device("cpu"), seed=0)


def test_a_wide_gram_matrix_is_that_of_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 70, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    monkeypatch.setattr(gram_module, "STRIP", 32)
    gram = gram_module.gram_matrix(x, torch.float64)
    assert torch.equal(gram, gram.t())
    assert torch.allclose(gram, x.t() @ x, rtol=1e-12, atol=1e-12)  # measured: 3e-14 apart at most


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tf32_holds_every_number_of_sixteen_bits(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    bits = numbers[numbers.isfinite()].float().view(torch.int32)
    assert not (bits & 0x1FFF).any()  # of float32's 23 bits of mantissa TF32 drops the last 13


def test_inputs_of_sixteen_bits_alone_are_multiplied_in_tf32(precisions: list[bool]) -> None:
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float16, torch.bfloat16):
        narrow = x.to(dtype)
        assert torch.equal(gram_matrix(narrow), narrow.float().t() @ narrow.float())
    gram_matrix(x)
    gram_matrix(x.half(), torch.float64)
    assert precisions == [True, True, False, False]
    assert not torch.backends.cuda.matmul.allow_tf32


def test_what_enters_a_block_in_half_precision_is_not_rounded_on_the_way(
    checkpoint: Path, precisions: list[bool]
) -> None:
    model = in_bfloat16(checkpoint)
    tokens = torch.randint(0, 4096, (3, 24), generator=torch.Generator().manual_seed(5))
    hidden, kwargs = model.embed(tokens, batch=3)
    block = model.block(0, kwargs)
    first = block.spec.stages[0][0]
    shown: list[Tensor] = []
    handle = block.module.get_submodule(first).register_forward_pre_hook(lambda _, args: shown.append(args[0]))
    block.with_weights({})(hidden)
    handle.remove()
    x = shown[0].flatten(0, -2)
    assert x.dtype == torch.bfloat16
    gram = x.float().t() @ x.float()
    found = input_grams(block, {}, hidden, 3, [first], Activation(bits=16))[first]
    assert torch.equal(found, gram.double() / len(x))
    statistics = observe_inputs(block, hidden, 3)[first]
    assert torch.equal(statistics.gram, (gram.double() / len(x)).float())
    assert torch.equal(statistics.mean_abs, x.float().abs().mean(0, dtype=torch.float64).float())
    assert all(precisions)


def test_rounded_activations_are_multiplied_in_float32(checkpoint: Path, precisions: list[bool]) -> None:
    model = in_bfloat16(checkpoint)
    hidden, kwargs = model.embed(torch.randint(0, 4096, (2, 16)), batch=2)
    block = model.block(0, kwargs)
    input_grams(block, {}, hidden, 2, [block.spec.stages[0][0]], Activation(bits=4))
    assert precisions == [False]
