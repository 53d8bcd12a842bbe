"""The tokenizer of a GGUF file, as transformers reads it but with the splitting that the file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lsiq.errors import InputError
from lsiq.models.gguf_config import find_architecture
from lsiq.models.gguf_file import Header, read_header
from lsiq.models.splitters import DIGITS, GPT2, SPLITTERS, Splitter


def find_splitter(path: Path) -> str | None:
    """Return the name of the file's splitter; None for a vocabulary of SentencePiece, which has none.

    Raises:
        InputError: the name is missing or not known, so that tokens would be others than the model was trained on.
    """
    header = read_header(path)
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    name = header.metadata.get("tokenizer.ggml.pre")
    if name not in SPLITTERS:
        says = "does not say how its tokenizer splits words (tokenizer.ggml.pre)"
        if name is not None:
            says = f"its tokenizer splits words in a way that is not known here (tokenizer.ggml.pre={name})"
        raise InputError(
            f"{path}: {says}; give the model's own tokenizer with model.tokenizer=DIR, a folder with tokenizer.json"
        )
    return name


def read_tokenizer(path: Path) -> Any:
    """Return the tokenizer of the file.

    transformers takes splitters that it does not know, such as SmolLM's, for GPT-2's.

    Raises:
        InputError: it is not known how the tokenizer splits words.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name, header = find_splitter(path), read_header(path)
    # The first takes the family's class, for which it wants to read the model's configuration too.
    kind: Any = AutoTokenizer if find_architecture(header, path).by_transformers else PreTrainedTokenizerFast
    tokenizer = kind.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if name is not None:
        _set_splitter(tokenizer, SPLITTERS[name], header)
    return tokenizer


def _set_splitter(tokenizer: Any, splitter: Splitter, header: Header) -> None:
    from tokenizers import normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.NFC() if splitter.composed else None
    steps: list[Any] = [_step(step) for step in splitter.steps]
    if splitter.steps[-1] != GPT2:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.model.ignore_merges = splitter.whole_words
    if splitter.begins and "tokenizer.ggml.add_bos_token" not in header.metadata and tokenizer.bos_token is not None:
        tokenizer.add_bos_token = True


def _step(step: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if step == DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    if step == GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Split(Regex(step), behavior="isolated")
