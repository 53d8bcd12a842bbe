"""Searches: jobs proposed by Optuna from the outcomes so far. The module imports without Optuna."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from pydantic import Field

from lsiq.errors import ConfigError
from lsiq.experiment.identity import NOT_IDENTITY
from lsiq.runtime.locks import exclusive
from lsiq.runtime.terminal import say
from lsiq.settings import settings
from lsiq.sweeps.jobs import Job, Outcome

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial


@settings
class SearchSettings:
    """How values are proposed, and how many."""

    sampler: Literal["random", "tpe"] = Field(description="random or tpe")
    trials: int = Field(ge=1, description="how many sets of values are tried, at least 1")
    at_once: int = Field(1, ge=1, description="how many of them the launcher gets at once, at least 1")
    seed: int = Field(0, ge=0, description="seed of the proposals, a whole number from 0")
    folder: str = Field(min_length=1, description="the folder that holds a file of trials for each search")


def search(
    config: SearchSettings,
    swept: Sequence[Override],
    identity: Mapping[str, Any],
    name: str,
    carry_out: Callable[[Sequence[Job]], list[Outcome]],
) -> list[Outcome]:
    """Try sets of values until `config.trials` of them have an outcome, and return what this call tried.

    Every proposal and outcome is kept in a file that is named by all that decides the search, so that a search that
    was killed goes on where it stopped, and makes the proposals that it would have made.

    Args:
        swept: keys with the values that may be chosen, and others with their one value.
        identity: what else decides the outcomes.
        name: what the file's name begins with.
        carry_out: returns what comes of jobs; the smaller the value the better.

    Raises:
        ConfigError: Optuna is not installed, or nothing is swept.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError as error:
        raise ConfigError("hydra/sweeper: a search needs Optuna; pip install 'lsiq[optuna]'") from error
    space = {override.get_key_element(): distribution(override) for override in swept if override.is_sweep_override()}
    fixed = [_override_text(override) for override in swept if not override.is_sweep_override()]
    if not space:
        raise ConfigError(
            "hydra.sweeper.params: nothing to search; give values such as seed=0,1 or "
            "'method.parts.singular.lr=tag(log,interval(1e-4,1e-2))'"
        )
    file = Path(config.folder).expanduser() / f"{name}_{_digest(config, space, fixed, identity)}.journal"
    with exclusive(file.with_suffix(".lock"), f"search {name}", "set hydra.sweeper.folder=DIR"):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(file)))
        study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
        _take_up(study)
        outcomes = _try_all(study, config, space, fixed, carry_out)
        _report(study, fixed, file)
    return outcomes


def _try_all(
    study: Study,
    config: SearchSettings,
    space: dict[str, BaseDistribution],
    fixed: Sequence[str],
    carry_out: Callable[[Sequence[Job]], list[Outcome]],
) -> list[Outcome]:
    from optuna.trial import TrialState

    outcomes: list[Outcome] = []
    failed = 0
    while (remaining := config.trials - failed - len(study.get_trials(False, (TrialState.COMPLETE,)))) > 0:
        trials = []
        for ahead in range(min(config.at_once, remaining)):
            study.sampler = _sampler(config, config.trials - remaining + ahead)
            trials.append(study.ask(space))
        batch = carry_out([[*fixed, *_overrides(trial)] for trial in trials])
        for trial, outcome in zip(trials, batch, strict=True):
            value = outcome.value if outcome.error is None else None
            if outcome.error is None and value is None:
                raise ConfigError(
                    "eval.corpora=[]: a search needs a text to judge by; choose eval=bundled or eval=file"
                )
            good = value is not None and math.isfinite(value)
            study.tell(trial, value if good else None, state=TrialState.COMPLETE if good else TrialState.FAIL)
            failed += not good
        outcomes += batch
    return outcomes


def _sampler(config: SearchSettings, number: int) -> BaseSampler:
    """The sampler of one proposal: seeded by its number, so that it does not matter when a search was interrupted."""
    from optuna.samplers import RandomSampler, TPESampler

    seed = (config.seed * 1_000_003 + number) % 2**32
    return RandomSampler(seed) if config.sampler == "random" else TPESampler(seed=seed, constant_liar=True)


def _take_up(study: Study) -> None:
    """Try again what failed, and what a process that is no more was trying."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
    settled = [trial.params for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.WAITING)]
    for trial in trials:
        if trial.state in (TrialState.RUNNING, TrialState.FAIL) and trial.params and trial.params not in settled:
            settled.append(trial.params)
            study.enqueue_trial(trial.params)


def distribution(override: Override) -> BaseDistribution:
    """What a swept key may be: one of several, a step of a range, or a number of an interval (`tag(log, …)`)."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        integer = isinstance(value.start, int) and isinstance(value.end, int)
        log = "log" in value.tags
        try:
            if integer:
                return IntDistribution(int(value.start), int(value.end), log=log)
            return FloatDistribution(float(value.start), float(value.end), log=log)
        except ValueError as error:
            raise ConfigError(f"{override.input_line}: {error}; write interval(LOW,HIGH)") from error
    if isinstance(value, RangeSweep) and value.shuffle is False:
        choices = list(value.range())
        if len(choices) > 1 and all(isinstance(choice, int) for choice in choices) and value.step > 0:
            return IntDistribution(int(choices[0]), int(choices[-1]), step=int(value.step))
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def _overrides(trial: Trial | FrozenTrial) -> list[str]:
    return [f"{key}={value}" for key, value in trial.params.items()]


def _override_text(override: Override) -> str:
    return override.input_line or f"{override.get_key_element()}={override.get_value_element_as_str()}"


def _digest(config: SearchSettings, space: Mapping[str, Any], fixed: Sequence[str], identity: Mapping[str, Any]) -> str:
    decides = {
        "sampler": [config.sampler, config.seed],
        "space": {key: repr(value) for key, value in space.items()},
        "fixed": [override for override in fixed if re.split("[=.@]", override)[0] not in NOT_IDENTITY],
        **identity,
    }
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def _report(study: Study, fixed: Sequence[str], file: Path) -> None:
    from optuna.trial import TrialState

    trials = study.get_trials(False, (TrialState.COMPLETE,))
    say(f"{len(trials)} trials in {file}")
    if trials:
        best = study.best_trial
        say(f"best: {best.value:.4f} with {' '.join(_overrides(best))}")
        say(f"python run.py {' '.join([*fixed, *_overrides(best)])}")
