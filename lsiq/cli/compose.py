"""Configurations composed from the files of conf/ outside hydra's own command line."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from lsiq.cli.hydra_guard import guarded
from lsiq.cli.messages import choices, explain_hydra
from lsiq.errors import ConfigError
from lsiq.runtime.folders import conf_folder, user_folder
from lsiq.runtime.hydra_entry import version_base
from lsiq.runtime.plugins import find_in


def compose(*overrides: str) -> DictConfig:
    """Return the configuration that `python run.py` makes of the same words.

    A user's own files are found as on the command line: in `conf/` of the working directory.

    Raises:
        ConfigError: a word is no setting, or names a choice that does not exist.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    find_in(Path.cwd())
    folder = user_folder()
    path = [] if folder is None else [f"hydra.searchpath=[file://{folder.resolve()}]"]
    try:
        with guarded(), hydra.initialize_config_dir(str(conf_folder()), **version_base()):
            return hydra.compose("config", overrides=[*path, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_hydra(error, choices(conf_folder()))) from error
