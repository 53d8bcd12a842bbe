"""What hydra's own part of a configuration may not do: call what it likes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lsiq.cli.positions import is_positional, with_parts_named
from lsiq.errors import ConfigError
from lsiq.experiment.training_length import refuse_epochs_with_tokens

_LOGGING = ("hydra.hydra_logging", "hydra.job_logging")
# Settings whose keys are the user's own names; hydra takes new keys with a + only.
_OPEN = re.compile(r"^(?=eval\.tasks_local\.)")


def check_hydra(config: Any) -> None:
    """Raise ConfigError where the node `hydra` of a composed configuration would have something called.

    Plug-ins (launchers, sweepers) hydra looks up among the installed ones itself. Its callbacks, and the factories of
    a logging configuration, may name any function there is.
    """
    from omegaconf import OmegaConf

    if OmegaConf.select(config, "hydra.callbacks"):
        raise ConfigError("hydra.callbacks: could call anything, and is not used here; leave it out")
    for key in _LOGGING:
        node = OmegaConf.select(config, key)
        plain = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
        if (factory := _factory(plain)) is not None:
            raise ConfigError(
                f"{key}: {factory} could call anything or write anywhere; choose hydra/job_logging=none or stdout"
            )


def _factory(node: Any) -> str | None:
    """The first entry of a logging configuration that names something to call, or a handler that writes files."""
    if isinstance(node, list):
        return next((factory for item in node if (factory := _factory(item)) is not None), None)
    if not isinstance(node, Mapping):
        return f"{node}" if isinstance(node, str) and node.startswith("ext://") and node not in _STREAMS else None
    for key, value in node.items():
        if key in ("()", ".", "_target_") or (key in ("class", "factory") and not _is_known(value)):
            return f"{key}={value}"
        if (factory := _factory(value)) is not None:
            return factory
    return None


_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def _is_known(value: Any) -> bool:
    return isinstance(value, str) and value in (
        "logging.StreamHandler",
        "logging.NullHandler",
        "logging.Formatter",
        "colorlog.ColoredFormatter",
    )


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Let `check_hydra` see every configuration that hydra composes, before hydra acts on it.

    Parts that overrides name by position get their names first, and keys may be new where names are the user's own.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.types import RunMode
    from omegaconf import open_dict

    load = ConfigLoaderImpl.load_configuration

    def load_checked(self: ConfigLoaderImpl, config_name: Any, overrides: list[str], run_mode: RunMode, **kwargs: Any):
        def compose(words: list[str]) -> Any:
            return load(self, config_name, [_OPEN.sub("++", word) for word in words], run_mode, **kwargs)

        if run_mode == RunMode.MULTIRUN:  # a method may be swept: each job knows what its positions mean
            by_position = [word for word in overrides if is_positional(word)]
            config = compose([word for word in overrides if word not in by_position])
            with open_dict(config):
                config.hydra.overrides.task.extend(by_position)
        else:
            refuse_epochs_with_tokens(overrides)
            config = compose(with_parts_named(overrides, compose))
        check_hydra(config)
        return config

    ConfigLoaderImpl.load_configuration = load_checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]
