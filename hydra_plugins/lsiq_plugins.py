"""What conf/hydra names: hydra takes sweepers and launchers from the package `hydra_plugins` only.

Imported whenever hydra starts, so what they do is elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from lsiq.sweeps.jobs import Outcome


class Grid(BasicSweeper):
    """Deals out every combination of the lists; what is finished already comes back from its record.

    Where a study names `variants`, sets of overrides, each of them goes through all combinations. A variant may have
    lists of its own.
    """

    def __init__(
        self,
        params: dict[str, str] | None = None,
        variants: Mapping[str, Sequence[str]] | None = None,
        only: Sequence[str] | None = None,
    ) -> None:
        super().__init__(max_batch_size=None, params=params)
        self._variants, self._only = variants or {}, only
        self._launched = 0

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher; ConfigError where its package is not installed."""
        from lsiq.errors import ConfigError

        choice = config.hydra.runtime.choices["hydra/launcher"]
        if choice == "slurm" and shutil.which("srun") is None:
            raise ConfigError(
                "hydra/launcher=slurm: there is no srun here; start the sweep on a machine of the cluster, "
                "or use hydra/launcher=slurm-local"
            )
        try:
            super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        except RuntimeError as error:
            if not str(error).startswith("Unknown plugin class"):
                raise
            extra = choice.partition("-")[0]
            raise ConfigError(
                f"hydra/launcher={choice}: what it needs is not installed; pip install 'lsiq[{extra}]'"
            ) from error

    def sweep(self, arguments: list[str]) -> Any:
        """Carry out all jobs; raises where some failed, after all have ended."""
        from lsiq.runtime.terminal import say
        from lsiq.sweeps.jobs import raise_failures

        assert self.config is not None
        outcomes = self.carry_out(self.jobs(arguments))
        raise_failures(outcomes)
        # Some launchers keep to themselves what their jobs print.
        say(f"{len(outcomes)} jobs done; look at them with: python -m lsiq.report --runs {self.config.paths.runs}")
        return outcomes

    def jobs(self, arguments: Sequence[str]) -> list[list[str]]:
        """The overrides of each job, those of one variant after the other; what several variants ask for comes once.

        Raises:
            ConfigError: a variant is asked for that the study does not have.
        """
        from lsiq.errors import ConfigError

        for name in self._only or ():
            if name not in self._variants:
                there = f"it has {', '.join(self._variants)}" if self._variants else "leave it null"
                raise ConfigError(f"hydra.sweeper.only={name}: the study has no such variant; {there}")
        chosen = [words for name, words in self._variants.items() if self._only is None or name in self._only]
        swept = [self.swept([*words, *arguments]) for words in chosen or [()]]
        jobs = [job for overrides in swept for job in self.split_arguments(overrides, max_batch_size=None)[0]]
        return list({frozenset(job): job for job in jobs}.values())

    def swept(self, arguments: Sequence[str]) -> list[Override]:
        """The study's lists and `arguments`, parsed; a later one of the same key wins."""
        loader = None if self.hydra_context is None else self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        return parser.parse_overrides([*self._parse_config(), *arguments])

    def carry_out(self, jobs: Sequence[Sequence[str]]) -> list[Outcome]:
        """Return what comes of `jobs`; finished ones are taken from their records, the launcher gets the others."""
        from lsiq.sweeps.jobs import carry_out
        from lsiq.sweeps.ledger import Ledger

        assert self.config is not None
        ledger = Ledger(self.config.hydra, self.config.paths.cache, self.config.paths.runs)
        return carry_out(jobs, lambda job: ledger.recognise(job, self._compose), self._launch)

    def _compose(self, job: Sequence[str]) -> DictConfig:
        assert self.config is not None
        assert self.hydra_context is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
        return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])  # what a job gets

    def _launch(self, jobs: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        assert self.config is not None
        assert self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        first, self._launched = self._launched, self._launched + len(jobs)
        return self.launcher.launch(jobs, initial_job_idx=first)


class Search(Grid):
    """Lets Optuna propose the values; see `lsiq.sweeps.search`."""

    def __init__(self, **values: Any) -> None:
        # A study that names this class in its file still has the keys of the grid, which is the default.
        super().__init__(**{key: values.pop(key, None) for key in ("params", "variants", "only")})
        self._values = values

    def sweep(self, arguments: list[str]) -> Any:
        """Try values, going on with what an earlier call tried; raises where some failed."""
        from lsiq.errors import ConfigError
        from lsiq.experiment.identity import NOT_IDENTITY
        from lsiq.settings import fill
        from lsiq.sweeps.jobs import raise_failures
        from lsiq.sweeps.search import SearchSettings, search

        assert self.config is not None
        if self._variants or self._only:
            raise ConfigError(
                "hydra.sweeper.variants, hydra.sweeper.only: a search has no variants; "
                "give values in hydra.sweeper.params"
            )
        settings = fill(
            SearchSettings, {"folder": f"{self.config.paths.runs}/searches", **self._values}, "hydra.sweeper"
        )
        identity = {
            str(key): OmegaConf.to_container(OmegaConf.create({"": value}), resolve=False)
            for key, value in self.config.items()
            if key not in ("hydra", *NOT_IDENTITY)
        }
        # A key that is given twice counts as it was given last.
        swept = {override.get_key_element(): override for override in self.swept(arguments)}
        name = self.config.hydra.runtime.choices.get("sweep") or "search"
        outcomes = search(settings, list(swept.values()), identity, name, self.carry_out)
        raise_failures(outcomes)
        return outcomes


class _Launcher(Launcher):
    """Has its jobs carried out by a module of `lsiq.sweeps`."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what there is to launch; ConfigError where a setting is wrong."""
        from lsiq.settings import fill

        plain = OmegaConf.to_container(OmegaConf.create(self._values), resolve=True)
        assert isinstance(plain, dict)
        kind = self._module().LauncherSettings
        self._settings = fill(kind, {str(key): value for key, value in plain.items()}, "hydra.launcher")
        self._context, self._function, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Return what came of the jobs, in their order, when all of them have ended."""
        launch = self._module().launch
        return launch(self._settings, job_overrides, initial_job_idx, self._context, self._config, self._function)

    def _module(self) -> Any:
        raise NotImplementedError


class ProcessLauncher(_Launcher):
    """Runs jobs in processes of this machine; see `lsiq.sweeps.on_processes`."""

    def _module(self) -> Any:
        from lsiq.sweeps import on_processes

        return on_processes


class RayLauncher(_Launcher):
    """Runs jobs as tasks of Ray; see `lsiq.sweeps.on_ray`."""

    def _module(self) -> Any:
        from lsiq.sweeps import on_ray

        return on_ray
