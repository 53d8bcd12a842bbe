"""What methods, parts and formats say of themselves decides what they may be put together with, whoever wrote them."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.configuration import compose_run
from torch import Tensor

from lsiq.errors import ConfigError
from lsiq.experiment.config import parse
from lsiq.export.base import integers
from lsiq.formats.integer import Integer
from lsiq.formats.mxint import MXInt
from lsiq.methods.gptq.columns import factorise, round_with_feedback
from lsiq.methods.rtn import RTN
from lsiq.settings import build, fill, settings


@settings
class Quadratic(Integer):
    """A grid that is not uniform: the step widens with the distance from 0."""

    def nearest(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        codes = torch.arange(self.levels + 1, dtype=w.dtype).view(-1, *[1] * w.dim())
        return (self.value(codes, scale, zero) - w).abs().argmin(0).to(w.dtype)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        steps = codes - zero
        return steps.sign() * steps.square() * scale / self.levels


class Foreign:
    """A format of somebody else's, which says of itself no more than a method asks."""

    bits, active, words = 4, True, "4 bits (squares)"


@settings
class Nearest(RTN):
    """A rounding method from outside the package."""


def test_gptq_rounds_to_the_grid_of_the_format() -> None:
    generator = torch.Generator().manual_seed(2)
    w, x = torch.randn(6, 32, generator=generator), torch.randn(200, 32, generator=generator, dtype=torch.float64)
    fmt = fill(Quadratic, {"bits": 4, "group": 16})
    curvature = factorise(x.t() @ x / 200, 0.01, True, "float64", "test")
    rounded = round_with_feedback(w, curvature, fmt, True, 8)
    scale, zero = fmt.fit(*fmt.extremes(w))
    plain = fmt.decode(fmt.encode(w, scale, zero), scale, zero)

    def error(other: Tensor) -> float:
        return ((w - other).double() @ x.t()).square().mean().item()

    assert torch.equal(fmt.encode(rounded.decode(), rounded.scale, rounded.zero), rounded.codes)
    assert error(rounded.decode()) < error(plain)


@pytest.mark.parametrize("fmt", [MXInt(bits=4), Foreign()])
def test_an_export_of_integers_refuses_every_other_format(fmt: MXInt | Foreign) -> None:
    with pytest.raises(ValueError, match=f"holds integers in groups, not quant.weight of {re.escape(fmt.words)}"):
        integers(fmt, "gguf")  # type: ignore[arg-type]


def test_a_learned_method_takes_whatever_only_rounds() -> None:
    learned = parse(compose_run("method=lsi-corner")).method
    fields = {name: getattr(learned, name) for name in ("label", "parts", "training")}
    assert fill(type(learned), {**fields, "then": Nearest()}).name == "lsi-corner+rtn"
    with pytest.raises(ConfigError, match="does more than round"):
        parse(compose_run("method=lsi", "method@method.then=awq"))


def test_every_method_and_part_says_what_it_is() -> None:
    learned = parse(compose_run("method=lsi-corner", "method@method.then=gptq")).method
    assert learned.training.epochs > 0
    assert not learned.rounds_only
    assert learned.then.rounds_only
    assert [part.name for part in learned.parts if part.keeps_function] == ["equivalent"]
    (rounding, *_) = parse(compose_run("method=autoround")).method.parts
    assert rounding.chooses_codes
    assert not rounding.keeps_function
    for words, rank in ((["method=lqer"], True), (["method=lqer", "method.rank=0"], False), (["method=rtn"], False)):
        assert parse(compose_run(*words)).method.adds_branches is rank


@pytest.mark.parametrize("target", ["clip.Clip", "dense.Dense", "singular.Singular", "expansion.Expansion"])
def test_what_is_tuned_has_its_value_in_the_files_alone(target: str) -> None:
    with pytest.raises(ConfigError, match=r"(lr|corner) has no value"):
        build({"_target_": f"lsiq.parts.{target}"})
