"""Jobs as tasks of Ray, on this machine or on a cluster. The module imports without Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from pydantic import Field

from lsiq.errors import ConfigError, InputError, LsiqError
from lsiq.settings import settings


@settings
class LauncherSettings:
    """Where Ray runs and what a job gets of it."""

    address: str | None = Field(
        None, min_length=1, description="null starts Ray here; auto joins this machine's cluster, HOST:PORT another one"
    )
    cpus: float = Field(1, ge=0, description="processors reserved for each job, from 0")
    gpus: float = Field(0, ge=0, description="GPUs reserved for each job, from 0; 0.5 lets two jobs share one")
    memory_gib: float | None = Field(None, gt=0, description="host memory reserved for each job in GiB, or null")
    retries: int = Field(2, ge=0, description="how often a job is started again whose worker died, from 0")
    init: dict[str, Any] = Field(default_factory=dict, description="further arguments of ray.init")


def launch(
    settings: LauncherSettings,
    jobs: Sequence[Sequence[str]],
    first: int,
    hydra_context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
) -> list[JobReturn]:
    """Run `jobs` as Ray tasks and return what came of each, in their order.

    A job whose worker dies is started again; one that fails by itself is not. Jobs run in the folder that this process
    runs in, which every machine of a cluster must see.

    Args:
        first: the number of the first job.

    Raises:
        ConfigError: Ray is not installed, or cannot be started or joined.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError("hydra/launcher=ray: Ray is not installed; pip install 'lsiq[ray]'") from error

    defaults: dict[str, Any] = {"include_dashboard": False} if settings.address is None else {}
    try:
        ray.init(address=settings.address or "local", **defaults | settings.init)
    except (ConnectionError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"hydra.launcher.address={settings.address}: Ray cannot be started or joined ({error}); "
            "start a cluster with `ray start --head`, or leave the address out"
        ) from error
    try:
        memory = None if settings.memory_gib is None else int(settings.memory_gib * 2**30)
        resources: dict[str, Any] = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "memory": memory}
        task = ray.remote(max_retries=settings.retries, **resources)(_run)
        shared: list[Any] = [ray.put(item) for item in (hydra_context, config, task_function, Singleton.get_state())]
        started = [task.remote(list(job), first + index, os.getcwd(), *shared) for index, job in enumerate(jobs)]
        return [_returned(ray, reference, job) for reference, job in zip(started, jobs, strict=True)]
    finally:
        ray.shutdown()


def _run(
    job: list[str],
    number: int,
    folder: str,
    hydra_context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
    singletons: dict[Any, Any],
) -> JobReturn:
    setup_globals()
    Singleton.set_state(singletons)
    if not Path(folder).is_dir():
        raise InputError(
            f"{folder}: the machine {socket.gethostname()} of the Ray cluster has no such folder; "
            "run where all machines see the same files"
        )
    os.chdir(folder)
    job_config = hydra_context.config_loader.load_sweep_config(config, job)
    with open_dict(job_config):
        job_config.hydra.job.id, job_config.hydra.job.num = f"{job_config.hydra.job.name}_{number}", number
    HydraConfig.instance().set_config(job_config)
    return run_job(
        hydra_context=hydra_context,
        config=job_config,
        task_function=task_function,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _returned(ray: Any, reference: Any, job: Sequence[str]) -> JobReturn:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        failure = error.cause  # raised before the job began
    except ray.exceptions.RayError as error:
        failure = LsiqError(f"its worker died each time it was started ({type(error).__name__})")
    return JobReturn(overrides=list(job), status=JobStatus.FAILED, _return_value=failure)
