"""Fine-tuning of a quantised model: its settings, and the tuner of its blocks."""

from lsiq.methods.finetune.settings import FineTune

__all__ = ["FineTune"]
