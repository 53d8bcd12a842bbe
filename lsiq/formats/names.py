"""Weight formats by name: `w3g128`, `w4g64-sym`, `w4-mxint`, `float`, or the file of conf/quant/ that has one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.errors import ConfigError
from lsiq.formats.grid import Grid
from lsiq.runtime import plugins
from lsiq.runtime.folders import conf_folder, user_folder
from lsiq.settings import build, describe_settings

if TYPE_CHECKING:
    from lsiq.formats.base import ActivationFormat, WeightFormat

# What leaves a weight as it is.
FLOAT = "float"


def named_format(name: str) -> WeightFormat:
    """Return the weight format that `name` stands for.

    Formats are asked first, for each knows its own short names; then it is the name of a file of conf/quant/, the
    package's or the user's, whose `weight` is meant.

    Raises:
        ValueError: nothing is called so.
    """
    for kind in _kinds(tuple(plugins.places())):
        if (fmt := kind.named(name)) is not None:
            return fmt
    if (file := quant_file(name)) is not None:
        return as_format(_node_of(file, "weight"))
    raise ValueError(
        f"no weight format is called {name}; there are float, w2 to w8 with g and a group size and -sym (w3g128, "
        "w4g64-sym), and the names of files in conf/quant/"
    )


def named_activation(name: str) -> ActivationFormat:
    """Return the `activation` of the file of conf/quant/, the package's or the user's, that has this name.

    Raises:
        ValueError: there is no such file.
    """
    if (file := quant_file(name)) is not None:
        return build(_node_of(file, "activation"))
    raise ValueError(f"format={name}: no file of conf/quant/ is called so")


def quant_file(name: str) -> Path | None:
    """Return the file of conf/quant/, the user's or the package's, that has this name; None where there is none."""
    for folder in (user_folder(), conf_folder()):
        if folder is not None and (file := folder / "quant" / f"{name}.yaml").is_file():
            return file
    return None


def format_name(fmt: WeightFormat) -> str | dict[str, Any]:
    """Return the name of a weight format, or where its name does not say all its settings, these as plain data.

    Short names come first, then that of a file of conf/quant/, such as `mxfp4`.
    """
    for name in (short_name(fmt), fmt.suffix):
        if is_format_name(name) and named_format(name) == fmt:
            return name
    return describe_settings(fmt)


def is_format_name(name: str) -> bool:
    """Whether `named_format` knows the name."""
    try:
        named_format(name)
    except ValueError:
        return False
    return True


def short_name(fmt: WeightFormat) -> str:
    """Return bits and suffix of a weight format, `w3g128`: not all settings, and no name to every format."""
    return FLOAT if fmt.bits == 16 else f"w{fmt.bits}{fmt.separator}{fmt.suffix}"


def as_format(value: Any) -> WeightFormat:
    """Return the weight format that `value` is, names, or describes by `_target_` and settings.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str):
        return named_format(value)
    try:
        fmt = build(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    if not isinstance(fmt, Grid):
        raise ValueError(f"{value} is no weight format")
    return fmt


@lru_cache
def _kinds(places: tuple[str, ...]) -> tuple[type[Grid], ...]:
    """Return the weight formats of this folder and of plug-ins, which lie in `places`."""
    del places  # only says when to look again
    import lsiq.formats as package

    modules = [
        importlib.import_module(f"{package.__name__}.{name}") for name in sorted(_settings_modules(package.__path__))
    ]
    values = (value for module in (*modules, *plugins.modules()) for value in vars(module).values())
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in values if _is_format(kind)}
    return tuple(kinds[name] for name in sorted(kinds))


def _settings_modules(path: Any) -> Iterator[str]:
    """Names of the modules in which a format may stand: those whose text speaks of a `Grid`; others may want torch."""
    for module in pkgutil.iter_modules(path):
        file = Path(path[0]) / f"{module.name}.py"
        if module.name != __name__.rpartition(".")[2] and "(Grid" in file.read_text(encoding="utf-8"):
            yield module.name


def _is_format(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Grid) and hasattr(value, "__pydantic_fields__")


def _node_of(file: Path, key: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.load(file))
    node = plain.get(key) if isinstance(plain, dict) else None
    if not isinstance(node, dict):
        raise ValueError(f"{file}: has no {key} with a _target_; give another name")
    return node
