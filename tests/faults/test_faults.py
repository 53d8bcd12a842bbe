"""Killed at any moment and run again, a run comes to the very result of one that was never stopped."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers.interruption import carry_out, outcome
from helpers.models import SHAPES, save_model
from omegaconf import DictConfig, OmegaConf

from lsiq.results.record import read_record

SmallRun = Callable[..., DictConfig]
pytestmark = pytest.mark.faults

# Processes that have imported what a run needs, so that moments fall into its work.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["lsiq.experiment.stages", "helpers.interruption"])
MOMENTS = 30


def process(
    cfg: DictConfig, rename: int | str | None = None, background: bool = False
) -> multiprocessing.process.BaseProcess:
    started = FRESH.Process(target=carry_out, args=(OmegaConf.to_yaml(cfg, resolve=True), rename, background))
    started.start()
    return started


def finish(cfg: DictConfig, background: bool = False) -> None:
    again = process(cfg, background=background)
    again.join(120)
    assert again.exitcode == 0


def where(folder: Path) -> str:
    """How far a run had come when it was killed."""
    record = read_record(folder)
    if record is None:
        return "before its record"
    blocks = len(list(folder.glob("blocks/block_*.safetensors")))
    partial = " while writing" if list(folder.glob("**/.*.partial")) else ""
    if record.status == "finished":
        return "at its end"
    return ("evaluating" if record.quantised else f"after {blocks} blocks") + partial


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(SHAPES["llama"] | {"num_hidden_layers": 4}, tmp_path_factory.mktemp("deep"))


LEARNED = ["method=lsi", "method.training.epochs=6", "method.training.batch=2", "calib.samples=8"]


def test_killed_at_thirty_random_moments_the_result_is_bit_identical(
    deep_model: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    make = partial(small_run, deep_model, *LEARNED, "eval.corpora=[file,bundled]", "eval.windows=12")
    finish(make(f"paths.runs={tmp_path / 'warm'}"))  # and with it the imports
    start = time.perf_counter()
    finish(make(f"paths.runs={tmp_path / 'undisturbed'}"))
    seconds = time.perf_counter() - start
    (undisturbed,) = (tmp_path / "undisturbed").glob("*/record.json")
    expected = outcome(undisturbed.parent)
    random_moment, met = random.Random(8), Counter[str]()
    trial = 0
    while met.total() < MOMENTS:
        runs = tmp_path / str(trial)
        trial += 1
        cfg = make(f"paths.runs={runs}")
        victim = process(cfg)
        victim.join(random_moment.uniform(0.02, 1) * seconds)
        folder = runs / undisturbed.parent.name
        if victim.exitcode is not None:
            continue  # it was faster this time
        victim.kill()
        victim.join()
        met[where(folder)] += 1
        finish(cfg)
        assert outcome(folder) == expected, where(folder)
    print(f"\n{seconds:.1f} s undisturbed; killed {dict(met)}, {trial - MOMENTS} more were too fast to kill")
    assert len(met) >= 5  # spread over the run


@pytest.mark.parametrize("rename", [1, 2, 3, 4, 7, 11, 13, 14, 16, 17, 18])
def test_killed_while_a_file_is_written_the_result_is_bit_identical(
    deep_model: Path, small_run: SmallRun, tmp_path: Path, rename: int
) -> None:
    """In turn: the record, block, streams, record, later blocks, the trajectory, references, own scores, windows."""
    finish(small_run(deep_model, *LEARNED, f"paths.runs={tmp_path / 'undisturbed'}"))
    cfg = small_run(deep_model, *LEARNED)
    victim = process(cfg, rename)
    victim.join(120)
    assert victim.exitcode == -9
    (folder,) = (tmp_path / "runs").glob("*_*")
    assert list((tmp_path / "runs").glob("**/.*.partial"))
    finish(cfg)
    assert outcome(folder) == outcome(tmp_path / "undisturbed" / folder.name)
    assert not list(folder.glob("**/.*.partial"))


@pytest.mark.parametrize("block", [0, 2, 3])
def test_killed_while_a_block_is_written_beside_the_next_the_result_is_bit_identical(
    deep_model: Path, small_run: SmallRun, tmp_path: Path, block: int
) -> None:
    finish(small_run(deep_model, *LEARNED, f"paths.runs={tmp_path / 'undisturbed'}"))
    cfg = small_run(deep_model, *LEARNED)
    victim = process(cfg, f"block_{block:03d}.safetensors", background=True)
    victim.join(120)
    assert victim.exitcode == -9
    (folder,) = (tmp_path / "runs").glob("*_*")
    assert len(list(folder.glob("blocks/block_*.safetensors"))) == block
    finish(cfg, background=True)
    assert outcome(folder) == outcome(tmp_path / "undisturbed" / folder.name)
    assert not list(folder.glob("**/.*.partial"))


def test_killed_again_and_again_it_comes_to_its_end(deep_model: Path, small_run: SmallRun, tmp_path: Path) -> None:
    finish(small_run(deep_model, *LEARNED, f"paths.runs={tmp_path / 'undisturbed'}"))
    cfg = small_run(deep_model, *LEARNED)
    deaths = 0
    while True:
        victim = process(cfg, 4 + deaths)  # each life finishes a block or what follows them
        victim.join(120)
        if victim.exitcode == 0:
            break
        deaths += 1
        assert victim.exitcode == -9
        assert deaths < 20
    (folder,) = (tmp_path / "runs").glob("*_*")
    assert deaths > 4
    assert outcome(folder) == outcome(tmp_path / "undisturbed" / folder.name)
