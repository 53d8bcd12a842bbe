"""The jobs of a sweep: those that are finished come back from their records, the launcher gets the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hydra.core.utils import JobReturn, JobStatus

from lsiq.errors import ConfigError, LsiqError
from lsiq.results.record import Record
from lsiq.runtime.terminal import say

Job = Sequence[str]


@dataclass(frozen=True)
class Outcome:
    """What came of a job: the number that a search minimises, or an error."""

    job: Job
    value: float | None = None
    error: Exception | None = None


def refuse_engines(choices: Mapping[str, str]) -> None:
    """Check that a single run asks for nothing that only a sweep would use.

    Args:
        choices: of hydra's groups.

    Raises:
        ConfigError: a launcher or a search is named.
    """
    for group, usual in (("hydra/launcher", "basic"), ("hydra/sweeper", "grid")):
        if choices[group] != usual:
            raise ConfigError(
                f"{group}={choices[group]}: one run is the work of this process; add -m, or name a study with sweep=…"
            )


def carry_out(
    jobs: Sequence[Job],
    recognise: Callable[[Job], Record | None],
    launch: Callable[[Sequence[Job]], Sequence[JobReturn]],
) -> list[Outcome]:
    """Return what comes of `jobs`, in their order.

    Args:
        jobs: the overrides of each.
        recognise: returns the record of a job that is finished.
        launch: carries out jobs and returns when all of them have ended.
    """
    records = {index: record for index, job in enumerate(jobs) if (record := recognise(job)) is not None}
    if records:
        say("\n".join(_line(record) for record in records.values()))
        if len(jobs) > 1:
            say(f"{len(records)} of {len(jobs)} jobs are finished")
    remaining = [index for index in range(len(jobs)) if index not in records]
    returned = dict(zip(remaining, launch([jobs[index] for index in remaining]), strict=True)) if remaining else {}
    return [
        Outcome(job, records[index].objective) if index in records else _outcome(job, returned[index])
        for index, job in enumerate(jobs)
    ]


def _outcome(job: Job, returned: JobReturn) -> Outcome:
    if returned.status == JobStatus.COMPLETED:
        return Outcome(job, returned.return_value)
    error = returned._return_value  # its public property would raise
    return Outcome(job, error=error if isinstance(error, Exception) else RuntimeError(str(error)))


def _line(record: Record) -> str:
    value = "" if record.objective is None else f"  perplexity {record.objective:.4f}"
    return f"found {record.run_id}{value}"


def raise_failures(outcomes: Sequence[Outcome]) -> None:
    """Name the jobs that failed, if any, and end the sweep with an error: that of a defect as it is.

    Raises:
        LsiqError: all that failed did so by errors that are the user's to mend.
    """
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        say(f"failed: {' '.join(outcome.job)}: {outcome.error}")
    for outcome in failed:
        if outcome.error is not None and not isinstance(outcome.error, LsiqError):
            raise outcome.error
    if failed:
        raise LsiqError(
            f"{len(failed)} of {len(outcomes)} jobs failed, as said above; the same command tries them again"
        )
