"""Jobs in several processes of this machine, by joblib. The module imports without hydra's plug-in for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lsiq.errors import ConfigError, ResourceError
from lsiq.interrupt import terminable


def launch(
    settings: Mapping[str, Any],
    jobs: Sequence[Sequence[str]],
    first: int,
    hydra_context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
) -> Sequence[JobReturn]:
    """Run `jobs` in processes and return what came of each, in their order.

    If this process is asked to end, the others end at once; what they were at goes on with the next call.

    Args:
        settings: those of `joblib.Parallel`.
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

    launcher = JoblibLauncher(**settings)
    launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)
    with terminable():
        try:
            return launcher.launch(jobs, first)
        except TerminatedWorkerError as error:
            raise ResourceError(
                f"hydra/launcher=processes: a process was killed, as a full memory does, and the others were ended; "
                f"the same command goes on, perhaps with hydra.launcher.n_jobs below {settings.get('n_jobs')}"
            ) from error
        except BaseException:
            # Left to themselves they would finish what they have, and hold the GPU until then.
            get_reusable_executor().shutdown(wait=True, kill_workers=True)
            raise
