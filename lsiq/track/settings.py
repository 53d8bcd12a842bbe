"""Where a run is mirrored, as checked settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lsiq.settings import settings


@settings
class TrackerSettings:
    """Where the story of a run is told besides its record."""

    kind: Literal["wandb", "tensorboard", "trackio", "mlflow", "none"] = Field(
        "wandb", description="wandb, tensorboard, trackio, mlflow or none"
    )
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto (online when logged in, else offline), online, offline or disabled"
    )
    project: str = Field("lsiq", min_length=1, description="the project that runs are filed under")
    group: str | None = Field(None, description="the study a run belongs to")
    tags: list[str] = Field(default_factory=list, description="a list of words, besides the model's and the format's")
    panels: int = Field(
        4, ge=0, description="linears, evenly spread over the network, that get panels of their own, at least 0"
    )
    patience: float = Field(
        60.0, gt=0, description="seconds that the end of a run waits for a tracker before it goes on without it"
    )
    upload: float = Field(
        256.0, ge=0, description="MiB of quantised blocks that are kept as an artifact; more are named by their path"
    )

    def __post_init__(self) -> None:
        if self.kind != "wandb" and self.mode in ("online", "offline"):
            raise ValueError(f"mode={self.mode}: tracker={self.kind} knows no network; use mode=auto or mode=disabled")
