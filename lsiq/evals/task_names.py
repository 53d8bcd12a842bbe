"""What is wrong with the tasks that a run names, told without importing the harness, which takes many seconds."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lsiq.assets import bundled_task
from lsiq.errors import ConfigError, InputError
from lsiq.evals.tasks import FLAT, check_packages, harness_missing, no_such_task, read_rows

if TYPE_CHECKING:
    from lsiq.evals.settings import EvalSettings


_NAMES = re.compile(rb"^(?:task|group): *['\"]?([\w.+-]+)['\"]?\s*$", re.MULTILINE)
_DATA = re.compile(r"^dataset_path: *['\"]?([\w.-]+/[\w.-]+)['\"]?\s*$", re.MULTILINE)


def check_tasks(settings: EvalSettings) -> None:
    """Raise what is wrong with the tasks of `settings`, as far as files on this machine tell.

    Raises:
        ConfigError: the harness or what it scores a task with is not installed, or it knows no such task.
        InputError: a file's rows do not fit, or the hub's data are not here and may not be fetched.
    """
    if not settings.tasks:
        return
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(harness_missing(settings.tasks))
    definitions = Path(spec.submodule_search_locations[0]) / "tasks"
    for name in dict.fromkeys(settings.tasks):
        check_packages(name)
        path = settings.tasks_local.get(name) or bundled_task(name)
        if path is not None:
            read_rows(Path(path).expanduser(), name)
        elif name in FLAT:
            _check_data(name, definitions / FLAT[name][0])
        else:
            _check_known(name, definitions)


def _check_known(name: str, definitions: Path) -> None:
    """Raise ConfigError where no definition mentions the task; one that does may still not define it."""
    names: set[str] = set()
    for content in _contents(definitions):
        if name.encode() in content:
            return
        names |= {match.decode() for match in _NAMES.findall(content)}
    raise ConfigError(no_such_task(name, difflib.get_close_matches(name, sorted(names), n=3)))


def _contents(folder: Path) -> Iterator[bytes]:
    for place, _, files in os.walk(folder):
        for file in files:
            if file.endswith(".yaml"):
                yield Path(place, file).read_bytes()


def _check_data(name: str, folder: Path) -> None:
    """Raise InputError where the task's data set is in no cache and the network is forbidden."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not os.environ.get("HF_DATASETS_OFFLINE"):
        return
    definition = next((file for file in sorted(folder.glob("*.yaml")) if _defines(file, name)), None)
    match = None if definition is None else _DATA.search(definition.read_text(encoding="utf-8"))
    if match is None:
        return
    repository = match[1]
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    places = (
        prepared / repository.replace("/", "___"),
        Path(constants.HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}",
    )
    if not any(place.exists() for place in places) and not Path(repository).exists():
        raise InputError(
            f"eval.tasks: the data of {name} cannot be had ({repository} is not in the cache {prepared}, and "
            f"HF_HUB_OFFLINE forbids to fetch it); go online, or give its items with eval.tasks_local.{name}=FILE"
        )


def _defines(file: Path, name: str) -> bool:
    return re.search(rf"^task: *['\"]?{re.escape(name)}['\"]?\s*$", file.read_text(encoding="utf-8"), re.M) is not None
