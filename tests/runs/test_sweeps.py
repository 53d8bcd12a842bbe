"""Every study under sweeps/ composes, and each of its jobs is a run that would start."""

from __future__ import annotations

import re

import pytest
from helpers.configuration import CONF, compose_run
from helpers.marks import product, slow
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.utils import instantiate

from lsiq.errors import ConfigError
from lsiq.experiment.config import parse
from lsiq.runtime.hydra_entry import version_base

SWEEPS = sorted(file.stem for file in (CONF.parent / "sweeps").glob("*.yaml"))


def jobs(sweep: str) -> list[list[str]]:
    """The overrides of each job of a grid, and of a search those with the least and the largest values."""
    with initialize_config_dir(str(CONF), **version_base()):
        hydra = compose("config", overrides=[f"sweep={sweep}"], return_hydra_config=True).hydra
    assert hydra.mode.name == "MULTIRUN"
    sweeper = instantiate(hydra.sweeper)
    if hydra.sweeper._target_.endswith(".Search"):
        return [[at_end(override, end) for override in sweeper.swept([])] for end in (0, -1)]
    return sweeper.jobs([])


def at_end(override: Override, end: int) -> str:
    """The override with the first or last of the values it may take."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        chosen = (value.start, value.end)[end]
    else:
        chosen = list(override.sweep_string_iterator())[end] if override.is_sweep_override() else value
    return f"{override.get_key_element()}={chosen}"


def head(sweep: str) -> str:
    """The lines of a study that say what it is."""
    return (CONF.parent / "sweeps" / f"{sweep}.yaml").read_text(encoding="utf-8").partition("\nhydra:\n")[0]


def texts(sweep: str) -> list[str]:
    """The files of yours that the study's first command names."""
    _, _, command = head(sweep).partition(f"python run.py sweep={sweep} ")
    return re.findall(r"(?:calib|eval)\.path=\S+", command.partition("\n")[0])


QUICK, SLOW = {"baselines"}, {"learned"}


@pytest.mark.parametrize("sweep", [s if s in QUICK else (slow if s in SLOW else product)(s) for s in SWEEPS])
def test_every_job_of_a_study_is_a_run_that_would_start(sweep: str) -> None:
    found = jobs(sweep)
    assert len(found) > 1
    # Any model and seed will do: a study has hundreds of jobs, and each takes a tenth of a second to compose.
    first = {tuple(word for word in job if not word.startswith(("seed=", "model="))): job for job in reversed(found)}
    configs = [compose_run(f"sweep={sweep}", *texts(sweep), *job) for job in first.values()]
    assert len({str(config) for config in configs}) == len(configs), "two jobs are the same run"
    for config in configs:
        parse(config)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_first_lines_of_a_study_say_how_to_start_it_how_large_it_is_and_what_comes_of_it(sweep: str) -> None:
    words = head(sweep)
    assert f"python run.py sweep={sweep}" in words or "sweep=$part" in words
    said = re.search(r"(\d+) (runs|trials)", words)
    assert said is not None
    if said[2] == "runs":
        assert int(said[1]) == len(jobs(sweep))
    assert "Expected: " in words or "sweeps/study.yaml" in words or "docs/tables/" in words


def test_every_variant_goes_through_all_combinations_and_the_command_line_wins() -> None:
    study = {
        "_target_": "hydra_plugins.lsiq_plugins.Grid",
        "params": {"seed": "0,1", "method": "rtn"},
        "variants": {"plain": [], "fed-back": ["method=gptq", "method.damping=0.1"]},
    }
    fed_back = ["method=gptq", "method.damping=0.1"]
    assert instantiate(study).jobs([]) == [
        ["seed=0", "method=rtn"],
        ["seed=1", "method=rtn"],
        ["seed=0", *fed_back],
        ["seed=1", *fed_back],
    ]
    chosen = instantiate(study, only=["fed-back"])
    assert chosen.jobs(["seed=3", "method.damping=0.2"]) == [["seed=3", "method=gptq", "method.damping=0.2"]]
    # What several variants ask for is carried out once.
    assert instantiate(study).jobs(["method=rtn", "method.damping=0.1"]) == [
        ["seed=0", "method=rtn", "method.damping=0.1"],
        ["seed=1", "method=rtn", "method.damping=0.1"],
    ]
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.only=best: .*no such variant; it has plain, fed-back"):
        instantiate(study, only=["best"]).jobs([])


def test_a_variant_may_have_lists_of_its_own() -> None:
    study = {
        "_target_": "hydra_plugins.lsiq_plugins.Grid",
        "params": {"seed": "0"},
        "variants": {"rounded": ["method=rtn,gptq"], "learned": ["method=lsi", "quant=w4a4,w6a6"]},
    }
    assert instantiate(study).jobs([]) == [
        ["seed=0", "method=rtn"],
        ["seed=0", "method=gptq"],
        ["seed=0", "method=lsi", "quant=w4a4"],
        ["seed=0", "method=lsi", "quant=w6a6"],
    ]


def test_the_folder_of_studies_is_the_config_group() -> None:
    assert (CONF / "sweep").resolve() == CONF.parent / "sweeps"
