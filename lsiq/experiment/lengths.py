"""Windows that are too long, in one wording wherever it is noticed. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsiq.errors import ConfigError

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig


def check_window_lengths(config: RunConfig, limit: int | None, prefix: int = 0) -> None:
    """Raise ConfigError where a window, after `prefix` tokens, is longer than the `limit` positions a model knows."""
    calibrates = config.calib.corpus is not None or config.calib.written
    lengths = {"calib.seqlen": config.calib.seqlen} if calibrates else {}
    lengths |= {"eval.seqlen": config.eval.seqlen} if config.eval.corpora else {}
    for key, seqlen in lengths.items():
        if limit is not None and prefix + seqlen > limit:
            after = f" and the prefix takes {prefix}" if prefix else ""
            raise ConfigError(f"{key}={seqlen}: the model has {limit} positions{after}; use at most {limit - prefix}")
