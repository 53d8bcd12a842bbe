"""Composing configurations as the command line does, and where the checkout lies."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from lsiq.cli.compose import compose

ROOT = Path(__file__).parent.parent.parent
CONF = ROOT / "conf"
SHARED = ROOT.parent / "shared"


def compose_run(*overrides: str) -> DictConfig:
    """Compose a configuration as the command line would."""
    return compose(*overrides)
