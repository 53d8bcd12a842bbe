"""Fixtures: small real models of both families with random weights, and short texts."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of workers side by side would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, for the tests of its kernels
from omegaconf import DictConfig

from lsiq.assets import bundled_model
from lsiq.cli.compose import compose

CONF = Path(__file__).parent.parent / "conf"
SHARED = Path(__file__).parent.parent.parent / "shared"

# Small shapes with what trips careless code: fewer key-value heads than heads, a width that is no power of two.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": 4096,
        "hidden_size": 96,
        "word_embed_proj_dim": 96,
        "ffn_dim": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": 128,
    },
}


# Workers beyond this number mostly wait for memory: each holds torch and transformers.
MOST_WORKERS = 8


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread whole folders of tests over this machine's cores, where pytest-xdist is there and no `-n` is given.

    Single files run in this process: they start sooner, and their output is seen.
    """
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist"):
        return
    asked = config.option.numprocesses is not None or config.option.tx or config.option.dist != "no"
    whole = all(Path(arg).is_dir() for arg in config.args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked and whole and cores > 1 and not config.option.usepdb and not config.option.collectonly:
        config.option.numprocesses = min(cores, MOST_WORKERS)


def random_model(shape: dict[str, Any], std: float = 0.08) -> Any:
    """Return a model of transformers with random weights, large enough that rounding them shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, initializer_range=std, init_std=std))
    with torch.no_grad():  # norms and biases that are not all ones and zeros
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert parameter.isfinite().all(), name
    return model


def save_model(shape: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32, std: float = 0.08) -> Path:
    """Write a checkpoint of `random_model` and the bundled tokenizer."""
    from transformers import AutoTokenizer

    random_model(shape, std).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled_model("tiny-llama")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder per family."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: save_model(shape, root / family) for family, shape in SHAPES.items()}


@pytest.fixture(params=sorted(SHAPES))
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    """The checkpoint of each family in turn."""
    return checkpoints[request.param]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 900 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The {n}th boat carried {n * 7} barrels of salt to the harbour.\n" for n in range(60)))
    return path


@pytest.fixture
def small_run(text_file: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose a run on a small checkpoint and a short text, rounding to nearest unless the overrides say otherwise."""

    def make(checkpoint: Path, *overrides: str) -> DictConfig:
        method = [] if any(override.startswith("method=") for override in overrides) else ["method=rtn"]
        return compose_run(
            *method,
            f"model.path={checkpoint}",
            "calib=file",
            f"calib.path={text_file}",
            "calib.samples=4",
            "calib.seqlen=32",
            "calib.batch=2",
            "eval=file",
            f"eval.path={text_file}",
            "eval.seqlen=64",
            "quant.weight.group=32",
            "tracker=none",
            f"paths.runs={tmp_path / 'runs'}",
            *overrides,
        )

    return make


def compose_run(*overrides: str) -> DictConfig:
    """Compose a configuration as the command line would."""
    return compose(*overrides)
