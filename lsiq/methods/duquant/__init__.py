"""DuQuant: its settings, and the search for its rotations."""

from lsiq.methods.duquant.settings import DuQuant

__all__ = ["DuQuant"]
