"""LQER, L²QER and QERA: their settings, and the low-rank repair."""

from lsiq.methods.lqer.settings import LQER

__all__ = ["LQER"]
