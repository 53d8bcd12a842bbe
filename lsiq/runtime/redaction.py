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
# What is a secret wherever it comes from: tokens with the prefix, length and alphabet that their issuers give them.
# Names of runs and folders begin alike (`hf_w3a16g64_rtn_s0_…` of a checkpoint in `hf`), so no part is left open.
# Tokens without a prefix are missing on purpose: the 40 hexadecimal digits of Weights & Biases are also a git commit.
_TOKENS = (
    r"(?:hf|api_org)_[A-Za-z0-9]{34}",  # Hugging Face
    r"gh[oprsu]_[A-Za-z0-9]{36}",  # GitHub, classic
    r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",  # GitHub, fine-grained
    r"glpat-(?=[\w-]*[0-9])(?=[\w-]*[a-z])(?=[\w-]*[A-Z])[A-Za-z0-9_-]{20}",  # GitLab
    r"sk-(?:(?:proj|svcacct|admin)-)?[A-Za-z0-9_-]{20,100}T3BlbkFJ[A-Za-z0-9_-]{20,100}",  # OpenAI
    r"sk-(?:(?:proj|svcacct|admin)-)?[A-Za-z0-9]{48}",  # OpenAI, the oldest
    r"sk-ant-[a-z]{3,5}[0-9]{2}-[A-Za-z0-9_-]{93}AA",  # Anthropic
    r"wandb_v1_[A-Za-z0-9_-]{60,100}",  # Weights & Biases, the newer ones
    r"(?:AKIA|ASIA)[A-Z0-9]{16}",  # AWS, the name of a key; the key itself has no prefix
    r"AIza[A-Za-z0-9_-]{35}",  # Google
)
_SHAPES = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_TOKENS)})(?![A-Za-z0-9])")
_LOGINS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
# Shorter values are words such as `disabled`, which stand in many harmless places.
_SHORTEST = 8


def redacted(value: Any) -> Any:
    """Return plain data with every secret that this machine knows, and all that has a token's shape, blotted out."""
    return _blot(value, sorted(set(_secrets()), key=len, reverse=True))


def _blot(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _SHOWN)
        return _LOGINS.sub(_SHOWN, _SHAPES.sub(_SHOWN, value))
    if isinstance(value, Mapping):
        return {_blot(key, secrets): _blot(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_blot(item, secrets) for item in value]
    return value


def _secrets() -> Iterator[str]:
    # A variable such as GOOGLE_APPLICATION_CREDENTIALS says where a secret lies.
    candidates = (value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST)
    yield from (value for value in candidates if not os.path.exists(value))
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
