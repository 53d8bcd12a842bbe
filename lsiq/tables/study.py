"""The runs at hand, asked for by model, setting and method."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsiq.report.compact import Run, read_runs
from lsiq.results.record import origin_note
from lsiq.tables.protocol import ROOT, Protocol
from lsiq.tables.published import Literature

# Nothing is drawn for these: every seed gives the same number, which spreads by nothing.
SEEDLESS = ("fp16", "rtn", "lqer")
LQER_TASKS = ("arc_easy", "arc_challenge", "lambada_openai", "piqa", "openbookqa", "boolq")


@dataclass(frozen=True)
class Sample:
    """What some seeds of one configuration measured, sorted by seed.

    Attributes:
        exact: the seed does not matter, so that one value says all.
        notes: what must be said beside the numbers.
    """

    values: tuple[float, ...]
    exact: bool = False
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None where it is not known, from a single one."""
        if self.exact:
            return 0.0
        return statistics.stdev(self.values) if len(self.values) > 1 else None


class Runs:
    """A collection of runs; of two runs of one configuration and seed the later one counts."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = sorted(runs, key=lambda run: (run.created, run.run_id or ""))
        self._jobs: dict[tuple[str, str, str], list[Run]] = {}
        for run in self.runs:
            self._jobs.setdefault((run.model, run.setting, run.method), []).append(run)
        self._holds: dict[tuple[int, Protocol], bool] = {}

    def find(
        self,
        protocol: Protocol,
        model: str,
        setting: str,
        method: str,
        where: Mapping[str, Any] | None = None,
        metric: str | None = None,
    ) -> list[Run]:
        """Return the runs of a job that follow the protocol, one per seed.

        Args:
            where: values of settings by dotted name, for those that the protocol leaves free.
            metric: what they must have measured.
        """
        by_seed = {
            run.seed: run
            for run in self._jobs.get((model, setting, method), ())
            if all(run.get(key) == value for key, value in (where or {}).items())
            and (metric is None or measured(run, metric) is not None)
            and self.follows(run, protocol)
        }
        return [by_seed[seed] for seed in sorted(by_seed)]

    def follows(self, run: Run, protocol: Protocol) -> bool:
        """Whether the run belongs to the protocol; asked often, answered once."""
        key = (id(run), protocol)
        if key not in self._holds:
            self._holds[key] = protocol.holds(run)
        return self._holds[key]

    def sample(
        self,
        protocol: Protocol,
        model: str,
        setting: str,
        method: str,
        metric: str,
        where: Mapping[str, Any] | None = None,
    ) -> Sample | None:
        """Return what a metric came to over the seeds, or None where it was not measured.

        The float model and rounding to nearest are measured beside every method: their numbers are taken from there
        where they have no run of their own.
        """
        exact = method in SEEDLESS
        if method == "fp16":
            beside = [run for run in self.runs if run.model == model and protocol.same_float(run)]
            values = [measured(run, metric, "float/") for run in beside]
        else:
            values = [measured(run, metric) for run in self.find(protocol, model, setting, method, where, metric)]
        if method == "rtn" and not values:
            beside = [run for run in self.runs if (run.model, run.setting) == (model, setting)]
            values = [measured(run, metric, "rtn/") for run in beside if protocol.same_float(run)]
        numbers = [value for value in values if value is not None]
        if not numbers:
            return None
        return Sample(tuple(numbers[-1:] if exact else numbers), exact, self.notes(model))

    def notes(self, model: str) -> tuple[str, ...]:
        """What must be said wherever numbers of a model stand."""
        origins = dict.fromkeys(run.weights_from for run in self.runs if run.model == model)
        return tuple(origin_note(model, origin) for origin in origins if origin is not None)

    def mean(
        self, protocol: Protocol, model: str, setting: str, method: str, of: Callable[[Run], float | None]
    ) -> float | None:
        """Return the mean of something that each run of a job has, or None."""
        values = [of(run) for run in self.find(protocol, model, setting, method)]
        numbers = [value for value in values if value is not None]
        return statistics.fmean(numbers) if numbers else None


def measured(run: Run, metric: str, of: str = "") -> float | None:
    """The metric of the run, of the float model (`float/`) or of rounding to nearest (`rtn/`); acc/mean6 is LQER's."""
    if metric != "acc/mean6":
        return run.metrics.get(of + metric)
    values = [run.metrics.get(f"{of}acc/{task}") for task in LQER_TASKS]
    return None if None in values else statistics.fmean(value for value in values if value is not None)


def load(folder: Path = ROOT / "analysis") -> tuple[Runs, Literature]:
    """Return the committed records and the published numbers."""
    runs = [run for file in sorted((folder / "records").glob("*.jsonl")) for run in read_runs(file)]
    return Runs(runs), Literature(folder / "published")
