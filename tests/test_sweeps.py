"""Every study under sweeps/ composes, and each of its jobs is a run that would start."""

from __future__ import annotations

import pytest
from conftest import CONF, compose_run
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from lsiq.config import parse

SWEEPS = sorted(file.stem for file in (CONF.parent / "sweeps").glob("*.yaml"))


def jobs(sweep: str) -> list[list[str]]:
    """The overrides of each job, as hydra's sweeper deals them out."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("config", overrides=[f"sweep={sweep}"], return_hydra_config=True).hydra
    assert hydra.mode.name == "MULTIRUN"
    overrides = OverridesParser.create().parse_overrides(
        [f"{key}={value}" for key, value in hydra.sweeper.params.items()]
    )
    return [list(job) for job in BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_job_of_a_study_is_a_run_that_would_start(sweep: str) -> None:
    found = jobs(sweep)
    assert len(found) > 1
    # Any model and seed will do: a study has hundreds of jobs, and each takes a tenth of a second to compose.
    first = {tuple(word for word in job if not word.startswith(("seed=", "model="))): job for job in reversed(found)}
    configs = [compose_run(f"sweep={sweep}", *job) for job in first.values()]
    assert len({str(config) for config in configs}) == len(configs), "two jobs are the same run"
    for config in configs:
        parse(config)


def test_the_folder_of_studies_is_the_config_group() -> None:
    assert (CONF / "sweep").resolve() == CONF.parent / "sweeps"
