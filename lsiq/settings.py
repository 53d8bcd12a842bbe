"""Settings are frozen dataclasses whose fields carry their own rules; this module builds them from a composed config.

A node with `_target_: lsiq.…` names the dataclass that its other keys fill. Only dataclasses of this package and of
`lsiq_plugins`, where a user's own stand, can be named, so a configuration cannot call anything else. Modules that hold
settings import without torch: a wrong key or value is then answered within a second.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from typing import Any, TypeVar, dataclass_transform, get_args, get_origin

import pydantic
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from lsiq.errors import ConfigError

T = TypeVar("T")
_MAY_BE_NAMED = ("lsiq.", "lsiq_plugins.")
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
# What pydantic puts into a place beside names: which kind of several was tried, and that a mapping's own key is meant.
_TAGS = re.compile(r"(literal|function-\w+)\[.*|constrained-\w+|float|int|str|bool|\[key\]")
_STRICT = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that refuses unknown keys and values outside its fields' rules."""
    return pydantic_dataclass(frozen=True, kw_only=True, config=_STRICT)(cls)  # type: ignore[return-value]


def build(node: Any, key: str = "") -> Any:
    """Return `node` with every mapping that has a `_target_` replaced by the settings object it describes.

    Args:
        node: plain data (dict, list, scalar), as `OmegaConf.to_container` gives it.
        key: where the node stands, for messages.

    Raises:
        ConfigError: a target outside the package, an unknown key, a value that breaks a rule.
    """
    if isinstance(node, Mapping):
        children = {name: build(value, f"{key}.{name}" if key else str(name)) for name, value in node.items()}
        if "_target_" not in children:
            return children
        return fill(find_target(children.pop("_target_"), key), children, key)
    if isinstance(node, list):
        return [build(value, f"{key}[{position}]") for position, value in enumerate(node)]
    return node


def describe_settings(value: Any) -> dict[str, Any]:
    """Return plain data from which `build` makes `value`, a settings object without others inside, again."""
    cls = type(value)
    fields = {field.name: getattr(value, field.name) for field in dataclass_fields(cls)}
    return {"_target_": f"{cls.__module__}.{cls.__qualname__}", **fields}


def find_target(target: Any, key: str) -> type:
    """Return the settings class that the dotted name `target` stands for."""
    way_out = "name a settings class of this package, such as lsiq.methods.rtn.RTN, or one in lsiq_plugins/"
    if not isinstance(target, str) or not target.startswith(_MAY_BE_NAMED):
        raise ConfigError(f"{key}._target_={target}: only classes of the package lsiq may be built; {way_out}")
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}._target_={target}: no such class; {way_out}") from error
    if not (isinstance(cls, type) and is_dataclass(cls) and hasattr(cls, "__pydantic_fields__")) or not (
        cls.__module__.startswith(_MAY_BE_NAMED)
    ):
        raise ConfigError(f"{key}._target_={target}: not a settings class; {way_out}")
    return cls


def fill(cls: type[T], values: Mapping[str, Any], key: str = "") -> T:
    """Return `cls(**values)` after its rules have been checked.

    Raises:
        ConfigError: names the first broken key, its value, the rule and what would be right.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, cls, key)) from error


def _explain(error: ValidationError, cls: type, key: str) -> str:
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] in _UNKNOWN), errors[0])  # a misspelt key may leave one out
    place = [str(part) for part in first["loc"] if not _TAGS.fullmatch(str(part))]
    where = ".".join(part for part in [key, *place] if part)
    full = where or cls.__name__
    kind = first["type"]
    if kind in _UNKNOWN:
        names = [field.name for field in dataclass_fields(_owner(cls, place))]  # type: ignore[arg-type]
        near = difflib.get_close_matches(place[-1], names, n=1)
        return f"{full}={first['input']}: no such setting; " + (
            f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        )
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{full} has no value; {_describe(cls, place)}"
    if kind == "is_instance_of":
        return f"{full}={_text(first['input'])}: cannot stand there; {_describe(cls, place)}"
    rule = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind == "value_error" and (not place or _names_a_key(rule, first["input"])):
        return f"{where}.{rule}".removeprefix(".")  # a rule across fields names its own field first
    return f"{full}={_text(first['input'])}: {rule[0].lower()}{rule[1:]}; {_describe(cls, place)}"


def _names_a_key(rule: str, value: Any) -> bool:
    """Whether what a rule says begins with a key of the settings that it is about, as `bits=9: …` does."""
    name, equals, _ = rule.partition("=")
    return bool(equals) and isinstance(value, Mapping) and name in value


def _text(value: Any) -> str:
    text = "null" if value is None else str(getattr(value, "name", value))
    return text if len(text) <= 80 else text[:77] + "…"


def _owner(cls: type, place: list[str]) -> type:
    """The settings class that holds the last name of `place`, following fields that are settings, or lists of them."""
    for name in _names(place)[:-1]:
        info = getattr(cls, "__pydantic_fields__", {}).get(name)
        kind = None if info is None else info.annotation
        kind = get_args(kind)[0] if get_origin(kind) is list else kind
        if not is_dataclass(kind):
            break
        cls = kind  # type: ignore[assignment]
    return cls


def _names(place: list[str]) -> list[str]:
    """Return a place without the positions in lists."""
    return [name for name in place if not name.isdigit()]


def _describe(cls: type, place: list[str]) -> str:
    place, owner, index = _names(place), cls, 0
    while index < len(place) - 1 and _owner(owner, place[index : index + 2]) is not owner:
        owner, index = _owner(owner, place[index : index + 2]), index + 1
    info = getattr(owner, "__pydantic_fields__", {}).get(place[index]) if place else None
    if info is not None and info.description:
        return f"expected: {info.description}"
    return "see the comments in the files under conf/"
