"""Parts of a method by position or as a list, as older commands and records have them: `method.parts.0.lr`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from omegaconf import DictConfig, OmegaConf

from lsiq.errors import ConfigError

_POSITION = re.compile(
    r"^(?P<before>[+~]*)(?P<parts>method(\.\w+)*\.parts)(\.|\[)(?P<position>\d+)\]?(?P<after>[.=].*)?$"
)
_LIST = re.compile(r"^(method(\.\w+)*\.parts)=(\[.*)$")


def is_positional(word: str) -> bool:
    """Whether an override names a part by position, or gives all parts as a list."""
    return bool(_POSITION.match(word) or _LIST.match(word))


def with_parts_named(words: Sequence[str], compose: Callable[[list[str]], DictConfig]) -> list[str]:
    """Return overrides in which parts that were named by position have their names, and lists replace named parts.

    Args:
        compose: composes the configuration of some overrides; called with those that name no position, and only where
            others do.

    Raises:
        ConfigError: the method has no part at a position.
    """
    words = [part for word in words for part in _replacing(word)]
    matches = [_POSITION.match(word) for word in words]
    if not any(matches):
        return words
    cfg = compose([word for word, match in zip(words, matches, strict=True) if match is None])
    return [
        word if match is None else _with_part_named(word, match, cfg)
        for word, match in zip(words, matches, strict=True)
    ]


def _replacing(word: str) -> list[str]:
    """Return the overrides that put a list in the place of named parts, which hydra would merge."""
    match = _LIST.match(word)
    return [word] if match is None else [f"~{match[1]}", f"+{word}"]


def _with_part_named(word: str, match: re.Match[str], cfg: DictConfig) -> str:
    parts = OmegaConf.select(cfg, match["parts"])
    if not isinstance(parts, DictConfig):  # no parts there at all: hydra says it better
        return word
    names = [str(name) for name in parts]
    if int(match["position"]) >= len(names):
        raise ConfigError(f"{word}: the method has {len(names)} parts: {', '.join(names)}; name one of them")
    return f"{match['before']}{match['parts']}.{names[int(match['position'])]}{match['after'] or ''}"
