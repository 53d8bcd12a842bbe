"""Where a run leaves its files, as checked settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lsiq.settings import settings


@settings
class PathSettings:
    runs: str = Field("runs", min_length=1, description="the folder that holds one folder per run")
    streams: Literal["memory", "disk"] = Field(
        "memory", description="memory, or disk: in files of the run's folder while it lasts, for large models"
    )
    cache: str | None = Field("runs/cache", description="the folder of what runs share; null keeps nothing")
    locks: str | None = Field(
        "runs/locks", description="the folder of the locks that keep two processes from one run; null for none"
    )
