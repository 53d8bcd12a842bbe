"""Where configuration files lie: the package's own, and those that a user keeps beside them."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def conf_folder() -> Path:
    """Return the folder of the package's own configuration groups: inside a wheel, beside the package in a checkout."""
    packaged = _PACKAGE / "conf"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "conf"


def user_folder() -> Path | None:
    """Return the folder of a user's own configuration files: `--config-dir`, or else `conf/` in the working directory.

    None where there is none, or where it is the package's own.
    """
    for position, word in enumerate(sys.argv):
        if word in ("--config-dir", "-cd") and position + 1 < len(sys.argv):
            return Path(sys.argv[position + 1])
        if word.startswith("--config-dir="):
            return Path(word.partition("=")[2])
    beside = Path.cwd() / "conf"
    return beside if beside.is_dir() and beside.resolve() != conf_folder().resolve() else None
