"""Jobs in several processes of this machine, by joblib. The module imports without hydra's plug-in for it."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from pydantic import Field

from lsiq.errors import ConfigError, ResourceError
from lsiq.runtime.signals import terminable
from lsiq.settings import settings

# About how often it is said how many jobs are done; from 50 on joblib says so on stdout, among the results.
REPORTS = 49


@settings
class LauncherSettings:
    """How many processes there are."""

    n_jobs: int = Field(2, description="processes, from 1, or -1 for as many as there are processors")

    def __post_init__(self) -> None:
        if self.n_jobs != -1 and self.n_jobs < 1:
            raise ValueError(f"n_jobs={self.n_jobs}: use 1 or more, or -1 for as many as there are processors")


def launch(
    settings: LauncherSettings,
    jobs: Sequence[Sequence[str]],
    first: int,
    hydra_context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
) -> Sequence[JobReturn]:
    """Run `jobs` in processes and return what came of each, in their order.

    If this process is asked to end, the others end at once; what they were at goes on with the next call.

    Args:
        first: the number of the first job.

    Raises:
        ConfigError: the plug-in is not installed.
        ResourceError: one of the processes was killed.
    """
    try:
        from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
        from joblib.externals.loky import get_reusable_executor
        from joblib.externals.loky.process_executor import TerminatedWorkerError
    except ModuleNotFoundError as error:
        raise ConfigError(
            "hydra/launcher=processes: what it needs is not installed; pip install 'lsiq[joblib]'"
        ) from error

    n_jobs = settings.n_jobs
    # All jobs at once, so that joblib knows how many there are when it says how long the others will take.
    launcher = JoblibLauncher(n_jobs=n_jobs, pre_dispatch="all", verbose=REPORTS)
    launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)
    with terminable():
        try:
            return launcher.launch(jobs, first)
        except TerminatedWorkerError as error:
            raise ResourceError(
                "hydra/launcher=processes: a process was killed, as a full memory does, and the others were ended; "
                f"the same command goes on, perhaps with fewer than hydra.launcher.n_jobs={n_jobs}"
            ) from error
        except BaseException:
            # Left to themselves they would finish what they have, and hold the GPU until then.
            get_reusable_executor().shutdown(wait=True, kill_workers=True)
            raise
