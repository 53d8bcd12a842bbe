"""The bundled models' tokenizer, and token streams made with it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lsiq.data.documents import SEPARATOR, read_documents
from lsiq.errors import InputError

# Documents are encoded in pieces of about this many characters: one long file (WikiText is a single document) would
# otherwise occupy one core while the others wait.
PIECE = 64_000
# Pieces handed to the encoder at once: some 30 MB of encyclopedia, which bounds the memory and keeps 16 cores busy.
PIECES_PER_CALL = 4096


@dataclass(frozen=True)
class Source:
    """A text given as `PATH`, `PATH*REPEAT` or `hub:REPO[:CONFIG[:SPLIT[:FIELD]]]`."""

    name: str
    repeat: int = 1

    @classmethod
    def parse(cls, text: str) -> Source:
        name, star, repeat = text.rpartition("*")
        if not star:
            return cls(text)
        if not repeat.isdigit() or int(repeat) < 1:
            raise InputError(f"--text {text}: {repeat!r} after '*' is no positive whole number; write PATH*2 or PATH")
        return cls(name, int(repeat))

    def documents(self) -> Iterator[str]:
        """Yield the documents, from the local file or streamed from the hub."""
        if self.name.startswith("hub:"):
            return _hub_documents(self.name)
        return read_documents(self.name)

    def digest(self) -> str:
        """The content's hash for a local file; the name's for a hub data set, whose revision is not looked up."""
        if self.name.startswith("hub:"):
            return hashlib.sha256(self.name.encode()).hexdigest()
        try:
            with open(self.name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{self.name} cannot be read ({error.strerror}); check the path") from error


def _hub_documents(name: str) -> Iterator[str]:
    from datasets import load_dataset  # slow to import, and needless for local files

    repo, config, split, field = (name.split(":")[1:] + [""] * 4)[:4]
    rows = load_dataset(repo, config or None, split=split or "train", streaming=True)
    for number, row in enumerate(rows):
        if not isinstance(row.get(field or "text"), str):
            raise InputError(f"{name}, row {number}: no string field {field or 'text'!r}; it has {', '.join(row)}")
        yield row[field or "text"]


def train_tokenizer(documents: Iterable[str], vocab: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of `vocab` pieces, `<|endoftext|>` being id 0.

    Every string survives: `decode(encode(x).ids) == x`. Nothing is added to a text's tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def first_characters(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Yield the leading documents until they hold `limit` characters together."""
    for document in documents:
        if limit <= 0:
            return
        yield document
        limit -= len(document)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained` loads; `<|endoftext|>` is bos, eos and pad."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder written by `save_tokenizer`."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"--tokenizer {folder}: no tokenizer.json there; make one with --train-tokenizer {folder}")
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.token_to_id(SEPARATOR) is None:
        raise InputError(f"--tokenizer {folder}: lacks the token {SEPARATOR}; make one with --train-tokenizer")
    if tokenizer.get_vocab_size() > 1 << 16:
        raise InputError(
            f"--tokenizer {folder}: {tokenizer.get_vocab_size()} pieces exceed the 65536 of a 16-bit stream"
        )
    return tokenizer


def _pieces(document: str) -> Iterator[str]:
    start = 0
    while len(document) - start > PIECE:
        # Cut behind the last newline of the piece, so that no word is split.
        cut = document.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield document[start:cut]
        start = cut
    yield document[start:]


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """Return one uint16 stream `(tokens,)`: each document's tokens, then `<|endoftext|>`."""
    end = tokenizer.token_to_id(SEPARATOR)
    # A None marks a document's end, so that the pieces of long documents can travel in one flat sequence.
    flat = (piece for document in documents for piece in (*_pieces(document), None))
    parts = []
    while block := list(islice(flat, PIECES_PER_CALL)):
        encoded = iter(tokenizer.encode_batch_fast([p for p in block if p is not None], add_special_tokens=False))
        parts += [np.array([end] if p is None else next(encoded).ids, np.uint16) for p in block]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


def token_stream(tokenizer: Tokenizer, source: Source, cache: Path) -> np.ndarray:
    """Return the source's tokens `(tokens,)` once, without its repeats, kept in `cache` for the next call.

    The cache file is named by the hash of the tokenizer and the content: a changed file is encoded anew.
    """
    key = hashlib.sha256((tokenizer.to_str() + source.digest()).encode()).hexdigest()[:16]
    path = cache / f"tokens-{key}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = cache / f"{path.stem}.{os.getpid()}.npy"
        np.save(unfinished, encode_documents(tokenizer, source.documents()))
        unfinished.replace(path)
    return np.load(path, mmap_mode="r")
