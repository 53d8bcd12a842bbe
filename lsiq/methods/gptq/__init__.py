"""GPTQ: its settings, and the columns that it rounds one after another."""

from lsiq.methods.gptq.settings import GPTQ

__all__ = ["GPTQ"]
