"""Composing configurations as the command line does, and where the checkout lies."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

from omegaconf import DictConfig

from lsiq.cli.compose import compose

ROOT = Path(__file__).parent.parent.parent
CONF = ROOT / "conf"
SHARED = ROOT.parent / "shared"


def compose_run(*overrides: str) -> DictConfig:
    """Compose a configuration as the command line would; the same words in the same folder are composed once."""
    return copy.deepcopy(_composed(Path.cwd(), overrides))


@functools.cache
def _composed(folder: Path, overrides: tuple[str, ...]) -> DictConfig:
    """Of the folder `folder`, which is the current one: what it holds of the user's own is composed, too."""
    return compose(*overrides)
