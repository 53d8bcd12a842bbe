"""Which text a run calibrates on, as checked settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lsiq.data.corpora import CORPORA
from lsiq.settings import settings


def _corpus(name: str) -> str:
    if name not in CORPORA:
        raise ValueError(f"no such corpus (there are {', '.join(CORPORA)})")
    return name


Corpus = Annotated[str, AfterValidator(_corpus), Field(description="a corpus by name; file reads a path of yours")]


@settings
class CalibSettings:
    """The tokens that methods learn from."""

    corpus: Corpus | None = Field(description="a corpus by name, or null for methods that need no data")
    path: str | None = Field(None, description="the text to read for corpus=file, or a local copy of a hub corpus")
    fields: list[str] = Field(["text"], min_length=1, description="the fields of a jsonl line that hold text")
    samples: int = Field(128, ge=1, le=1_000_000, description="sequences drawn, at least 1")
    written: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="sequences that the float model writes itself, besides those drawn; 0 for none",
    )
    seqlen: int = Field(ge=8, description="tokens per sequence, at least 8")
    batch: int = Field(8, ge=1, description="sequences that pass through a block at once, at least 1")
    windows: Literal["disjoint", "random"] = Field(
        "random", description="disjoint (no token is drawn twice) or random (windows may overlap)"
    )

    def __post_init__(self) -> None:
        if self.corpus == "file" and self.path is None:
            raise ValueError("path=null: corpus=file reads a text of yours; give calib.path=FILE (txt, txt.xz, jsonl)")
