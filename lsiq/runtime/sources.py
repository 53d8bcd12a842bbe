"""Hashes of this package's own code, by folder: what was computed once is taken up only while its code is the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def rooms() -> list[str]:
    """Return the names of the package's folders, and of the modules beside them."""
    files = (file.relative_to(_PACKAGE) for file in _PACKAGE.rglob("*.py"))
    return sorted({file.parts[0].removesuffix(".py") for file in files} - {"__init__"})


def source_hash(*names: str) -> str:
    """Return a hash of the code of the folders and modules called `names`; of all where there are none.

    Raises:
        FileNotFoundError: there is no such folder or module.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in names or rooms():
        place = _PACKAGE / name
        files = sorted(place.rglob("*.py")) or [place.with_suffix(".py")]
        for file in files:
            digest.update(str(file.relative_to(_PACKAGE)).encode() + file.read_bytes())
    return digest.hexdigest()
