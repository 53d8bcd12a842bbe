"""Which model a run quantises, as checked settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lsiq.settings import settings

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", description="letters, digits and . _ + -")]


@settings
class ModelSettings:
    """Which weights a run quantises. `path` wins over `bundled`, then `package`, then `hub`."""

    name: Name = Field(description="how records and tables call the model")
    path: str | None = Field(None, description="a folder with config.json and safetensors weights, or a GGUF file")
    bundled: Literal["tiny-llama", "tiny-opt"] | None = Field(None, description="tiny-llama or tiny-opt")
    package: str | None = Field(None, description="an installed Python package that holds the model as a GGUF file")
    tokenizer: str | None = Field(
        None, description="a folder with the tokenizer's files; null for the tokenizer that lies with the weights"
    )
    hub: str | None = Field(None, description="a repository of the Hugging Face hub, owner/name")
    revision: str = Field("main", description="a branch, tag or commit of the hub repository")
    weights: Literal["checkpoint", "random"] = Field(
        "checkpoint", description="checkpoint, or random: the true shape without a download, for speed and memory"
    )
    architecture: dict[str, Any] | None = Field(None, description="transformers configuration used by weights=random")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto (float32 on a CPU, half precision on a GPU), float32, bfloat16 or float16"
    )
    seqlen: int = Field(ge=8, description="tokens per window for calibration and evaluation, at least 8")
    allow_pickle: bool = Field(False, description="true reads .bin files (weights only) where no safetensors exist")
    outliers: int = Field(
        0, ge=0, description="giant channels planted between linears without changing the function; 0 for none"
    )
    outlier_strength: float = Field(30.0, gt=0, description="how many times as large planted channels are, above 0")
    published: dict[str, float] = Field(default_factory=dict, description="float perplexities by corpus@seqlen")

    def __post_init__(self) -> None:
        if self.weights == "random" and self.architecture is None and self.path is None and self.bundled is None:
            raise ValueError(
                "weights=random: needs model.architecture or a model.path whose config.json gives the shape"
            )
        if self.weights == "checkpoint" and not (self.path or self.bundled or self.package or self.hub):
            raise ValueError("path=null: no checkpoint is named; set model.path, or choose a model with a hub entry")
