"""Fixtures: small real models of both families with random weights, and short texts."""

from __future__ import annotations

import gc
import os

if gc.isenabled():  # again once all is imported and collected: the 700,000 objects and more that come with it stay
    gc.disable()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of workers side by side would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.parsed import parse_once

# Torch and transformers are imported by what needs them: a process that only hands tests to others starts at once.
if TYPE_CHECKING:
    from omegaconf import DictConfig

# Whole files about what an extra brings are left out where it is not installed.
NEEDED = {
    "lm_eval": ["unit/evals/test_tasks.py", "unit/evals/test_generation.py"],
    "matplotlib": ["pages/test_tables.py"],
}
collect_ignore = [file for package, files in NEEDED.items() if find_spec(package) is None for file in files]

# Workers beyond this number mostly wait for memory: each holds torch and transformers.
MOST_WORKERS = 8


parse_once()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread whole folders of tests over this machine's cores, where pytest-xdist is there and no `-n` is given.

    Single files run in this process: they start sooner, and their output is seen. `-m slow` leaves out what has
    another marker beside that one.
    """
    if config.option.markexpr == "slow":
        config.option.markexpr = "slow and not product and not shared and not faults"
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist"):
        return
    asked = config.option.numprocesses is not None or config.option.tx or config.option.dist != "no"
    whole = all(Path(arg).is_dir() for arg in config.args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked and whole and cores > 1 and not config.option.usepdb and not config.option.collectonly:
        config.option.numprocesses = min(cores, MOST_WORKERS)
        config.option.dist = "loadfile"  # what the tests of a file share is made in one process


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Get ready for tests to be imported, in each process that does so."""
    if session.config.getoption("numprocesses", None):
        return
    import hypothesis  # noqa: F401  # asks the collector who holds a generator of trio's, before that is frozen
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, for the tests of its kernels


def pytest_collection_finish() -> None:
    """Keep the garbage collector from what was imported, which it would look through ever again."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder per family."""
    from helpers.models import SHAPES, save_model

    root = tmp_path_factory.mktemp("checkpoints")
    return {family: save_model(shape, root / family) for family, shape in SHAPES.items()}


@pytest.fixture(params=["llama", pytest.param("opt", marks=pytest.mark.slow)])
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    """The checkpoint of each family in turn; what families do otherwise is in tests/conformance/test_families.py."""
    return checkpoints[request.param]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 540 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The {n}th boat carried {n * 7} barrels of salt to the harbour.\n" for n in range(36)))
    return path


@pytest.fixture
def small_run(text_file: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose a run on a small checkpoint and a short text, rounding to nearest unless the overrides say otherwise."""
    from helpers.configuration import compose_run
    from omegaconf import OmegaConf

    def make(checkpoint: Path, *overrides: str) -> DictConfig:
        method = [] if any(override.startswith("method=") for override in overrides) else ["method=rtn"]
        # Paths are filled in afterwards: the same words are composed once.
        runs = [override.partition("=")[2] for override in overrides if override.startswith("paths.runs=")]
        paths = {"model.path": checkpoint, "calib.path": text_file, "eval.path": text_file}
        cfg = compose_run(
            *method,
            "calib=file",
            "calib.samples=4",
            "calib.seqlen=32",
            "calib.batch=2",
            "eval=file",
            "eval.seqlen=64",
            "quant.weight.group=32",
            "tracker=none",
            *(override for override in overrides if not override.startswith("paths.runs=")),
        )
        cfg.paths.runs = runs[-1] if runs else str(tmp_path / "runs")
        for key, path in paths.items():
            if not any(override.startswith(f"{key}=") for override in overrides):
                OmegaConf.update(cfg, key, str(path))
        return cfg

    return make
