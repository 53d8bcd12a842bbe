"""Passwords and tokens of this machine, kept out of records, trackers and the terminal."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_SHOWN = "[secret]"
_NAMES = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY)$|SECRET", re.IGNORECASE)
# What is a secret wherever it comes from: tokens of the hub and its like, and logins inside addresses.
_SHAPES = re.compile(r"\b(?:hf|ghp|gho|glpat|sk|wandb_v1)[-_][A-Za-z0-9_-]{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
# Shorter values are words such as `disabled`, which stand in many harmless places.
_SHORTEST = 8


def redacted(value: Any) -> Any:
    """Return plain data with every secret that this machine knows, and all that looks like one, blotted out."""
    return _blot(value, sorted(set(_known()), key=len, reverse=True))


def _blot(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _SHOWN)
        return _SHAPES.sub(_SHOWN, value)
    if isinstance(value, Mapping):
        return {_blot(key, secrets): _blot(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_blot(item, secrets) for item in value]
    return value


def _known() -> Iterator[str]:
    yield from (value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST)
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    try:
        token = Path(os.environ.get("HF_TOKEN_PATH", home / "token")).read_text(encoding="utf-8").strip()
        if len(token) >= _SHORTEST:
            yield token
    except (OSError, UnicodeDecodeError):
        pass
    try:
        logins = netrc.netrc().hosts.values()
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return
    yield from (password for _, _, password in logins if password and len(password) >= _SHORTEST)
