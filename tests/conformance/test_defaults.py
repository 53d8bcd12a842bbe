"""A setting has one default: what the files under conf/method/ start from is what a class takes by itself.

A method's own file says where it departs from that. Nobody who builds the classes in Python gets another method than
the command line without having said so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from lsiq.cli.compose import compose
from lsiq.experiment.training_length import with_epochs
from lsiq.settings import build, find_target

METHODS = Path(__file__).resolve().parents[2] / "conf" / "method"
NAMES = sorted(file.stem for file in METHODS.glob("*.yaml"))
PRESETS = sorted(METHODS.glob("*/*.yaml"))

Place = tuple[str, ...]


def departures(node: Any, at: Place = ()) -> Iterator[Place]:
    """The places of values that are not their class's default; what has none is stated everywhere."""
    if not isinstance(node, Mapping):
        return
    cls = find_target(node["_target_"], ".".join(at)) if "_target_" in node else None
    defaults = {} if cls is None else {f.name: cls.__pydantic_fields__[f.name] for f in fields(cls)}  # type: ignore
    for key, value in node.items():
        field = defaults.get(key)
        if field is not None and not field.is_required():
            default = field.get_default(call_default_factory=True)
            if isinstance(value, Mapping) and "_target_" not in value:
                value = {"_target_": f"{type(default).__module__}.{type(default).__qualname__}", **value}
            elif (build(value) if isinstance(value, Mapping) else value) != default:
                yield (*at, key)
                continue
        yield from departures(value, (*at, key))


def stated(name: str, at: Place = ()) -> Iterator[Place]:
    """The places that a method's file sets, and those of the methods it is made of; presets of parts are left out."""
    content = yaml.safe_load((METHODS / f"{name}.yaml").read_text(encoding="utf-8"))
    for entry in content.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_" and "/" not in entry:
            method, _, key = entry.partition("@")
            place = (*at, *key.split(".")) if key else at
            yield place
            yield from stated(method, place)
    yield from _leaves(content, at)


def _leaves(node: Any, at: Place) -> Iterator[Place]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield (*at, key)
            yield from _leaves(value, (*at, key))


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_what_methods_start_from_is_the_default_of_the_class(file: Path) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    given = {key: value for key, value in content.items() if value != "???"}
    assert not list(departures(given))


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_in_its_file_where_it_departs(name: str) -> None:
    method = OmegaConf.to_container(compose(f"method={name}"), resolve=False)["method"]  # type: ignore[index, call-overload]
    assert set(departures(with_epochs(method, 0, 0))) <= set(stated(name))  # no class has `tokens`


def test_what_decides_the_training_has_no_default_in_the_class() -> None:
    cls = find_target("lsiq.methods.learned.Training", "")
    required = {name for name, field in cls.__pydantic_fields__.items() if field.is_required()}  # type: ignore
    assert required == {"epochs", "batch", "decay", "precision", "signed", "keep"}
