"""Groups that do not fit a model are refused in one line with the one that does, on every way to a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import call
from helpers.configuration import compose_run
from helpers.gguf_files import write_gguf
from helpers.models import SHAPES, random_model, save_model
from omegaconf import DictConfig

import lsiq
from lsiq.errors import ConfigError
from lsiq.experiment.config import parse
from lsiq.experiment.run import run
from lsiq.formats.fit import check_divides, largest_group
from lsiq.formats.placed import check_widths

SmallRun = Callable[..., DictConfig]
# Widths that 64 divides and 128 does not, as SmolLM2's.
SHAPE = SHAPES["llama"] | {"hidden_size": 192, "intermediate_size": 320}
FITS = "quant.weight.group=64 (quant=w3a16g64), the largest power of two up to 128 that divides all widths"
REFUSED = f"quant.weight.group=128 does not divide hidden_size=192 of {{}}; use {FITS}"
WIDTHS = {"self_attn.q_proj": 192, "mlp.down_proj": 320}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(SHAPE, tmp_path_factory.mktemp("narrow") / "narrow")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    pytest.importorskip("gguf")
    return write_gguf(folder, folder.parent / "single.gguf", "F16")


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_run_and_a_dry_run_of_a_checkpoint(kind: str, dry: bool, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    with pytest.raises(ConfigError) as why:
        run(compose_run(f"model.path={path}", "quant=w3a16g128", "tracker=none", f"dry_run={dry}"))
    assert str(why.value) == REFUSED.format(path.stem)


def test_a_dry_run_of_a_package_reads_its_stated_shape() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size=576 of smollm2-135m; use quant\.weight\.group=64 \(quant=w3"):
        run(compose_run("model=smollm2-135m", "quant=w3a16g128", "dry_run=true"))


@pytest.mark.parametrize("dry", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_job_of_a_sweep(dry: bool, folder: Path, tmp_path: Path) -> None:
    job = [f"model.path={folder}", "tracker=none", f"dry_run={dry}", "quant=w3a16g128", "seed=0,1"]
    done, _ = call(*job, "-m", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count(f"error: {REFUSED.format('narrow')}\n") == 2


def test_quantize() -> None:
    model = lsiq.load_model(random_model(SHAPE))
    with pytest.raises(ConfigError, match=r"in_features=192 of self_attn\.q_proj; use quant") as why:
        lsiq.quantize(model, lsiq.recipe("rtn"), lsiq.format("w3a16g128"))
    assert FITS in str(why.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quant=w3a16g128", "quant.activation.bits=6"], "quant.weight.group=64, the largest"),  # no file has both
        (["quant=w4a8-mxint", "quant.weight.block=128"], "quant.weight.block=64, the largest"),
        (["quant=w3a16", "quant.rules=[{match: '*.down_proj', format: w2g128}]"], "the group of w2g128 .* use w2g64,"),
        (["quant=w3a16", "quant.allocate.bits=3"], "quant=mixed3a16: the group of w2g128 .* use w2g64,"),
        (["quant=w2a16g128", "quant.allocate.bits=3"], "quant=mixed3a16: the group of w2g128 .* use w2g64,"),
    ],
)
def test_what_is_named_is_a_setting_that_would_be_read(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_widths(parse(compose_run(*overrides)).quant, WIDTHS)


def test_the_group_that_is_named_fits_every_linear_not_only_the_one_at_fault() -> None:
    quant = parse(compose_run("quant=w3a16g64")).quant
    with pytest.raises(ConfigError, match=r"in_features=96 of b; use quant\.weight\.group=8,"):
        check_widths(quant, {"a": 192, "b": 96, "c": 200})


def test_narrow_groups_are_named_beside_one_group_in_all() -> None:
    quant = parse(compose_run("quant=w3a16g64")).quant
    with pytest.raises(
        ConfigError, match=r"use quant\.weight\.group=1,.*, or quant\.weight\.group=null for one group in all"
    ):
        check_widths(quant, {"a": 63})
    with pytest.raises(ConfigError, match=r"widths$"):
        check_widths(quant, {"a": 96})


def test_heads_are_divided_too() -> None:
    with pytest.raises(ConfigError, match=r"quant\.kv\.group=64 does not divide head_dim=96; use quant\.kv\.group=32,"):
        parse(compose_run("quant.kv.bits=4", "quant.kv.group=64")).quant.kv.check(96)


def test_groups_as_wide_as_what_they_lie_on_fit() -> None:
    check_divides("quant.weight.group=null", None, {"in_features=7 of a": 7}, str)


@pytest.mark.parametrize(("widths", "most", "fits"), [([576, 1536], 128, 64), ([896, 4864], 128, 128), ([96, 5], 8, 1)])
def test_the_group_that_is_named_divides_everything(widths: list[int], most: int, fits: int) -> None:
    assert largest_group(widths, most) == fits
