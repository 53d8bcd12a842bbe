"""Which text a run calibrates on, as checked settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lsiq.data.corpora import CORPORA, HUB
from lsiq.data.mixture import apportion
from lsiq.settings import settings


def _corpus(name: str) -> str:
    if name not in CORPORA:
        raise ValueError(f"no such corpus (there are {', '.join(CORPORA)})")
    return name


def _corpus_or_mix(name: str) -> str:
    return name if name == "mix" else _corpus(name)


Corpus = Annotated[str, AfterValidator(_corpus), Field(description="a corpus by name; file reads a path of yours")]
CorpusOrMix = Annotated[str, AfterValidator(_corpus_or_mix)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Share:
    """What is drawn from one corpus.

    Attributes:
        path: of a text or a local copy; None for none.
        samples: sequences.
        template: whether the text is conversations, which the chat template renders.
    """

    corpus: str
    path: str | None
    samples: int
    template: bool


@settings
class CalibSettings:
    """The tokens that methods learn from."""

    corpus: CorpusOrMix | None = Field(description="a corpus by name, mix, or null for methods that need no data")
    path: str | None = Field(None, description="the text to read for corpus=file, or a local copy of a hub corpus")
    fields: list[str] = Field(["text"], min_length=1, description="the fields of a jsonl line that hold text")
    template: bool = Field(
        False, description="true renders the messages of a jsonl file with the tokenizer's chat template"
    )
    mix: dict[Corpus, Weight] = Field(
        default_factory=dict, description="for corpus=mix, the weight of each corpus by name, at least 0"
    )
    paths: dict[Corpus, str | None] = Field(
        default_factory=dict, description="for corpus=mix, the text of file and local copies of hub corpora, by name"
    )
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
        if self.corpus == "mix":
            self._check_mix()
        elif self.weights or self.given_paths:
            raise ValueError(f"corpus={self.corpus}: calib.mix and calib.paths belong to a mixture; choose calib=mix")
        if self.template and self.corpus != "file" and "file" not in self.weights:
            raise ValueError(
                "template=true: only a file of yours holds conversations; use calib=file calib.path=FILE, or calib=mix "
                "with calib.mix.file"
            )
        if self.template and self.fields != ["text"]:
            raise ValueError(f"fields={self.fields}: template=true reads messages; leave calib.fields out")

    def _check_mix(self) -> None:
        if not self.weights:
            raise ValueError("mix: no corpus has a weight; give two or more, as calib.mix.wikitext2=1 calib.mix.c4=1")
        if self.path is not None:
            raise ValueError(f"path={self.path}: a mixture has a path for each corpus; give calib.paths.NAME=FILE")
        if "file" in self.weights and self.paths.get("file") is None:
            raise ValueError("paths.file=null: file reads a text of yours; give calib.paths.file=FILE")
        for name, path in self.given_paths.items():
            if name not in self.weights:
                raise ValueError(f"paths.{name}={path}: {name} has no weight; give calib.mix.{name}")
            if name not in HUB and name != "file":
                raise ValueError(f"paths.{name}={path}: {name} is read from no file; leave it out")
        for name, count in apportion(self.weights, self.samples).items():
            if count == 0:
                raise ValueError(
                    f"mix.{name}={self.mix[name]}: is less than one of calib.samples={self.samples} sequences; raise "
                    "either, or set it to 0"
                )

    @property
    def weights(self) -> dict[str, float]:
        """The weights of a mixture that are above 0, in the order of CORPORA whatever order they were given in."""
        return {name: self.mix[name] for name in CORPORA if self.mix.get(name)}

    @property
    def given_paths(self) -> dict[str, str]:
        """The paths of a mixture, without those that are null."""
        return {name: path for name, path in self.paths.items() if path is not None}

    @property
    def sequences(self) -> int:
        """How many sequences a method that trains on them gets."""
        return (self.samples if self.corpus is not None else 0) + self.written

    def shares(self, limit: int | None = None) -> list[Share]:
        """Return what is drawn from each corpus, `limit` sequences in all at most; nothing for corpus=null."""
        if self.corpus is None:
            return []
        samples = self.samples if limit is None else min(self.samples, limit)
        if self.corpus != "mix":
            return [Share(self.corpus, self.path, samples, self.template)]
        counts = apportion(self.weights, samples)
        return [
            Share(name, self.paths.get(name), count, self.template and name == "file")
            for name, count in counts.items()
            if count
        ]

    @property
    def text(self) -> str | None:
        """What is learned from, in words: a file, a corpus by name, or the parts of a mixture."""
        if self.corpus != "mix":
            return self.path or self.corpus
        return ", ".join(f"{share.samples} of {share.path or share.corpus}" for share in self.shares())
