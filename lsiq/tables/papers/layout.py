"""What the tables of this project have in their rows and columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lsiq.runtime.hydra_entry import version_base
from lsiq.tables.protocol import ROOT, STUDY, Job, Protocol

BUNDLED = ("tiny-llama", "tiny-opt")
OPT = ("opt-125m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b")
LLAMA = ("llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama-2-7b", "llama-2-13b", "llama-2-70b")
OTHER_MODELS = ("vicuna-7b", "vicuna-13b", "llama-3-8b", "mistral-7b", "qwen2.5-7b", "qwen2.5-14b")
FAMILIES = {"OPT": OPT, "LLaMA": LLAMA, "other models": OTHER_MODELS}

WEIGHT_ONLY = ("w2a16", "w2a16g128", "w2a16g64", "w3a16", "w3a16g128", "w4a16", "w4a16g128")
WEIGHT_ACTIVATION = ("w8a8", "w6a6", "w4a4")

# In the order of the rows, from what uses no data to what trains everything.
METHODS = (
    *("fp16", "rtn", "gptq", "awq", "smoothquant", "rotate", "duquant", "lqer", "l2qer", "qera-approx", "qera-exact"),
    *(
        "lwc",
        "omniquant",
        "lsi-only",
        "lsi-diagonal",
        "lsi-random",
        "lsi-corner",
        "lsi",
        "sde",
        "autoround",
        "dense",
        "best",
    ),
)
# Rows that a table of hub models has even where no paper printed a number.
ALWAYS = ("rtn", "gptq", "awq", "omniquant", "lsi-corner")
# Published methods that this project does not have, as far as they make uniform grids of the same bits.
OTHERS = (
    *("quip", "affinequant", "cbq", "sliderquant", "tesseraq", "efficientqat", "qllm", "atom", "rptq", "duquant-lwc"),
    *("quarot-gptq", "spinquant-gptq", "flatquant", "flatquant-gptq", "sliderquant-plus"),
)
CORPORA = {"bundled": "bundled", "wikitext2": "WikiText-2", "ptb": "PTB", "c4": "C4"}


@dataclass(frozen=True)
class Beside:
    """A row of the study's tables from runs beside it: its protocol, another recipe.

    Attributes:
        setting: whose last rows it joins.
        label: what the row is called.
        method: the runs' label.
    """

    setting: str
    label: str
    method: str
    protocol: Protocol


_BLOCKS = "method.weight_activation.start.then.then"  # those of best
# best as it was: a random rotation, LET at 1e-3, each block's last epoch.
_BEFORE = (
    *("method=best", "method.weight_activation.start.then.steps=0", f"{_BLOCKS}.training.keep=last"),
    *(f"{_BLOCKS}.parts.equivalent.unit=value", f"{_BLOCKS}.parts.equivalent.lr=1e-3"),
)
# As sweeps/hosts.yaml has those of hosts, and docs/best.md those of best.
BESIDE = (
    Beside(
        "w4a4",
        "sde + CL",
        "sde-cl",
        replace(STUDY, recipe=("method=sde", "method.label=sde-cl", "method.training.ahead.blocks=2")),
    ),
    Beside(
        "w4a4",
        "rotate, then sde + CL",
        "rotate+sde-cl",
        replace(
            STUDY,
            recipe=(
                *("method=rotate", "method@method.then=sde"),
                *("method.then.label=sde-cl", "method.then.training.ahead.blocks=2"),
            ),
        ),
    ),
    *(Beside(setting, "best before", "best-before", replace(STUDY, recipe=_BEFORE)) for setting in ("w4a4", "w6a6")),
    Beside(
        "w4a4",
        "best, twice the steps",
        "best-longer",
        replace(
            STUDY,
            recipe=("method=best", "method.weight_activation.label=best-longer", f"{_BLOCKS}.training.epochs=20"),
        ),
    ),
)


def sweep_jobs(name: str) -> list[list[str]]:
    """Return the overrides of each job of a file of sweeps/."""
    with initialize_config_dir(str(ROOT / "conf"), **version_base()):
        sweeper = compose("config", overrides=[f"sweep={name}"], return_hydra_config=True).hydra.sweeper
    return instantiate(sweeper).jobs([])


@cache
def study_jobs() -> frozenset[Job]:
    """The jobs of sweeps/study.yaml: model, setting and method."""
    jobs = (dict(word.split("=", 1) for word in job) for job in sweep_jobs("study"))
    return frozenset((job["model"], job["quant"], job["method"]) for job in jobs)


def study_methods(settings: Iterable[str]) -> list[str]:
    """The study's methods at any of the settings, in the order of rows."""
    names = set(settings)
    methods = {method for _, setting, method in study_jobs() if setting in names}
    return sorted(methods, key=rank)


def rank(method: str) -> tuple[int, str]:
    """Where a method's row stands; one with a `then` comes after the method itself, others at the end."""
    first = method.partition("+")[0]
    return METHODS.index(first) if first in METHODS else len(METHODS), method
