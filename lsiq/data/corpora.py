"""Corpora by name: where each comes from, how its rows become text, and which rows calibrate and which evaluate.

Nothing here needs torch or a network until a corpus is read. A hub corpus can be read from a local copy in the hub's
own schema (parquet, jsonl, jsonl.gz), WikiText-2 also from the raw text files of its release.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lsiq.assets import KINDS, bundled_text
from lsiq.data.documents import read_documents
from lsiq.errors import InputError

Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Corpus:
    """A corpus of the Hugging Face hub.

    Attributes:
        files: by split, the files inside the data set's repository; named one by one so that nothing else is fetched
            and no loading script can run.
        column: the field that holds the text of a row.
        glue: what joins the rows to the one text that is tokenised.
        rows: of the evaluation split, how many rows are joined; None joins all.
        by_document: calibration windows are cut from single long documents instead of the joined text.
    """

    repository: str
    files: dict[Split, str]
    column: str = "text"
    glue: str = "\n\n"
    rows: int | None = None
    by_document: bool = False
    revision: str = "main"


# Sources: the data loaders of GPTQ and OmniQuant, which all published tables go back to.
HUB = {
    "wikitext2": Corpus(
        "Salesforce/wikitext",
        {
            "calibration": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
            "evaluation": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        },
    ),
    # GPTQ's `c4-new`: the first 1100 documents of the first validation file, joined by blanks. OmniQuant draws 256
    # windows instead, so C4 values compare within one source only.
    "c4": Corpus(
        "allenai/c4",
        {
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        glue=" ",
        rows=1100,
        by_document=True,
    ),
    # As GPTQ and OmniQuant: evaluated on the validation split, rows joined by blank lines.
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        {
            "calibration": "penn_treebank/train/0000.parquet",
            "evaluation": "penn_treebank/validation/0000.parquet",
        },
        column="sentence",
        revision="refs/convert/parquet",
    ),
    # AWQ's calibration text; it has no other split.
    "pile": Corpus(
        "mit-han-lab/pile-val-backup",
        {"calibration": "val.jsonl.zst", "evaluation": "val.jsonl.zst"},
        by_document=True,
        rows=1000,
    ),
}

# Endings of the raw text files of WikiText's release.
_RAW = (".raw", ".txt", ".tokens")

# `bundled` is all kinds together; each kind can be had alone, to calibrate on one and measure on another.
CORPORA = ("bundled", *KINDS, *HUB, "file", "random")


@dataclass(frozen=True)
class Text:
    """A text to tokenise: documents, the string that joins them, and whether windows stay inside one document.

    `special` says whether the tokenizer adds its special tokens; those of a chat template stand in the text already.
    """

    documents: Sequence[str]
    glue: str
    by_document: bool = False
    special: bool = True

    def joined(self) -> str:
        return self.glue.join(self.documents)


def read_corpus(name: str, split: Split, path: str | None = None, fields: Sequence[str] = ("text",)) -> Text:
    """Return the text of a corpus.

    Args:
        name: one of CORPORA except `random`, which has no text.
        split: which part to read; a `file` has no parts.
        path: the file for `file`; for a hub corpus a local copy of the wanted split.
        fields: for `file`, the fields of a jsonl line that hold text.

    Raises:
        InputError: the file or the hub cannot be read, or holds no text.
    """
    if name == "bundled" or name in KINDS:
        pieces = bundled_text(split, None if name == "bundled" else name)
        return Text([piece.read_text(encoding="utf-8").strip() for piece in pieces], "\n\n")
    if name == "file":
        assert path is not None  # the settings see to it
        text = Text(list(read_documents(path, tuple(fields))), "\n\n")
    else:
        corpus = HUB[name]
        rows = list(_local_rows(corpus, path) if path else _hub_rows(name, corpus, split))
        documents = rows[: corpus.rows] if split == "evaluation" else rows
        text = Text(documents, corpus.glue, corpus.by_document and split == "calibration")
    if not any(document.strip() for document in text.documents):
        raise InputError(f"{path or name}: the text is empty; give a file with text in it")
    return text


def corpus_files(name: str, split: Split, path: str | None = None) -> list[Path]:
    """Return the files that `read_corpus` reads, fetched from the hub if need be.

    Raises:
        InputError: there is no such file, or the hub cannot be reached.
    """
    if name == "bundled" or name in KINDS:
        return list(bundled_text(split, None if name == "bundled" else name))
    if path is not None:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; give the path of a text")
        return [Path(path)]
    return [_hub_file(name, HUB[name], split)]


def check_readers(name: str, split: Split, path: str | None = None) -> None:
    """Raise InputError where a package that reads this hub corpus is not installed; nothing is fetched or imported."""
    ending = Path(path or HUB[name].files[split]).suffix
    if ending in _RAW:
        return
    packages = ("datasets", "zstandard") if ending == ".zst" else ("datasets",)
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(
            f"{name}: is read with {' and '.join(missing)}, not installed here; pip install 'lsiq[hub]', "
            "or choose calib=bundled eval=bundled"
        )


def _local_rows(corpus: Corpus, path: str) -> Iterator[str]:
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: no such file; give a local copy of {corpus.repository}, or leave the path out")
    if file.suffix in _RAW:
        return _raw_rows(file)
    return _column(_load(file.name.partition(".")[2], str(file)), corpus.column, path)


def _raw_rows(file: Path) -> Iterator[str]:
    """The rows that the hub makes of a raw WikiText file: lines with their newline, and "" for each blank line."""
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield line if line.strip() else ""
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error


def _hub_rows(name: str, corpus: Corpus, split: Split) -> Iterator[str]:
    file = _hub_file(name, corpus, split)
    return _column(_load(Path(corpus.files[split]).name.partition(".")[2], str(file)), corpus.column, str(file))


def _hub_file(name: str, corpus: Corpus, split: Split) -> Path:
    from lsiq.data.hub import fetch_file  # hub access in one place, with its short patience

    way_out = (
        f"give a local copy with calib.path=FILE (of a mixture calib.paths.{name}=FILE) or eval.local.{name}=FILE, or "
        "choose calib=bundled eval=bundled"
    )
    return fetch_file(corpus.repository, corpus.files[split], corpus.revision, kind="dataset", way_out=way_out)


def _load(ending: str, file: str) -> Any:
    """Open a parquet or json-lines file, compressed or not, as an iterable data set that reads as it goes."""
    import datasets

    kind = "parquet" if ending.endswith("parquet") else "json"
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(kind, data_files=file, split="train", streaming=True)
    except Exception as error:  # the library raises many kinds for one cause: a file it cannot parse
        raise InputError(f"{file}: cannot be read as {kind} ({type(error).__name__}); fetch it again") from error


def _column(rows: Any, column: str, path: str) -> Iterator[str]:
    # Document corpora are millions of rows; the first hundred thousand are more than any calibration draws from.
    try:
        for row in itertools.islice(rows, 100_000):
            if not isinstance(row.get(column), str):
                raise InputError(f"{path}: a row has no text in {column!r}; it has {', '.join(row)}")
            yield row[column]
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read to its end ({type(error).__name__}: {error}); fetch it again"
        ) from error
