"""Windows of tokens that were drawn or cut before: a text is tokenised once for all runs that want the same of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lsiq.data.conversations import no_conversation, render, template_of
from lsiq.data.corpora import Split, Text, corpus_files, read_corpus
from lsiq.data.tokens import Windows, cut_windows, draw_windows
from lsiq.errors import InputError
from lsiq.runtime.cache import ContentCache
from lsiq.runtime.sources import source_hash

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenRequest:
    """Windows of a corpus: `samples` drawn with `seed`, or all that can be cut where `samples` is None.

    `windows` says how they are drawn, as in `draw_windows`; `template` that the file holds conversations, which the
    tokenizer's chat template turns into text. They follow each other with nothing between, in the order of the file.
    """

    corpus: str
    split: Split
    path: str | None
    fields: tuple[str, ...]
    seqlen: int
    samples: int | None = None
    seed: int = 0
    windows: Windows = "random"
    template: bool = False


def token_cache(folder: str | None, versions: Mapping[str, str | None], origin: Mapping[str, str]) -> ContentCache:
    """Open the cache of tokens in `folder`, `paths.cache`; None keeps nothing.

    Args:
        versions: of the packages that this run uses, by name.
        origin: what is written beside new entries.
    """
    identity: Mapping[str, Any] = {
        "kind": "tokens",
        "sources": source_hash("data"),
        "versions": {name: versions.get(name) for name in ("transformers", "tokenizers", "numpy")},
    }
    path = None if folder is None else Path(folder).expanduser()
    return ContentCache(path, identity, origin)


def cached_tokens(request: TokenRequest, tokenizer: Any, cache: ContentCache) -> Tensor:
    """Return the windows `(N, seqlen)` that `request` describes, from the cache where they are there.

    They are found again by the content of the text and of the tokenizer. One process draws them while others that want
    the same wait. A tokenizer that is not one of the tokenizers library is not kept for: its state has no one text.

    Raises:
        InputError: the corpus cannot be read or is too short.
    """

    def make() -> dict[str, Tensor]:
        text = _read(request, tokenizer)
        name = request.path or request.corpus
        if request.samples is None:
            windows = cut_windows(text, tokenizer, request.seqlen, name)
        else:
            samples, seqlen, seed = request.samples, request.seqlen, request.seed
            windows = draw_windows(text, tokenizer, samples, seqlen, seed, name, request.windows)
        return {"tokens": windows.to(torch.int32)}

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return make()["tokens"].long()
    content = hashlib.blake2b(backend.to_str().encode(), digest_size=16)
    for file in corpus_files(request.corpus, request.split, request.path):
        with file.open("rb") as stream:
            content.update(hashlib.file_digest(stream, "blake2b").digest())
    if request.template:
        content.update(template_of(tokenizer).encode())
    fields = {key: value for key, value in asdict(request).items() if key != "path"}
    key = cache.key(**fields, content=content.hexdigest())
    return cache.once(key, f"tokens of {request.path or request.corpus}", make)["tokens"].long()


def _read(request: TokenRequest, tokenizer: Any) -> Text:
    if not request.template:
        return read_corpus(request.corpus, request.split, request.path, request.fields)
    assert request.path is not None  # the settings see to it
    documents = render(request.path, tokenizer)
    if not documents:
        raise InputError(no_conversation(request.path))
    return Text(documents, "", special=False)
