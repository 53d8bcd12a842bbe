"""Token windows: drawn with a seed to calibrate on, cut in order to evaluate on."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lsiq.data.corpora import Text
from lsiq.data.lengths import too_short
from lsiq.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


Windows = Literal["disjoint", "random"]


def tokenize(text: str, tokenizer: Any, special: bool = True) -> Tensor:
    """Return the token ids `(tokens,)` of `text`; `special` adds what the tokenizer puts around a text by default."""
    # The tokenizer warns that a text is longer than the model's context; it is cut into windows afterwards.
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        without = {} if special else {"add_special_tokens": False}
        return torch.tensor(tokenizer(text, verbose=False, **without)["input_ids"], dtype=torch.long)
    finally:
        logger.setLevel(level)


def draw_windows(
    text: Text, tokenizer: Any, samples: int, seqlen: int, seed: int, name: str, windows: Windows = "random"
) -> Tensor:
    """Return `(samples, seqlen)` token ids of `text`, the same for the same seed.

    With `windows="disjoint"` the text is cut from a random offset on and each cut is taken once at most; with
    `"random"` windows begin anywhere, so that some overlap. Where windows stay inside one document each document gives
    one at most, and both mean the same.

    Raises:
        InputError: the text, or every document where windows stay inside one, is shorter than `seqlen` tokens, or it
            holds fewer disjoint windows than are wanted.
    """
    random = np.random.default_rng([seed, seqlen])
    if text.by_document:
        return _draw_by_document(text, tokenizer, samples, seqlen, random, name)
    ids = tokenize(text.joined(), tokenizer, text.special)
    if len(ids) < seqlen:
        raise InputError(too_short(name, len(ids), seqlen, "calib.seqlen"))
    if windows == "disjoint":
        return _draw_disjoint(ids, samples, seqlen, random, name)
    starts = random.integers(0, len(ids) - seqlen + 1, size=samples)
    return torch.stack([ids[start : start + seqlen] for start in starts.tolist()])


def _draw_disjoint(ids: Tensor, samples: int, seqlen: int, random: Any, name: str) -> Tensor:
    most = len(ids) // seqlen
    if most < samples:
        raise InputError(
            f"{name}: the text holds {most} windows of calib.seqlen={seqlen} tokens, and calib.samples={samples} are "
            "wanted; give a longer text, lower either, or set calib.windows=random, which lets windows overlap"
        )
    # As far as the text reaches beyond the windows that are wanted, the first one may begin anywhere.
    offset = int(random.integers(0, min(seqlen, len(ids) - samples * seqlen + 1)))
    windows = ids[offset:]
    windows = windows[: len(windows) // seqlen * seqlen].view(-1, seqlen)
    return windows[torch.from_numpy(random.permutation(len(windows))[:samples])]


def _draw_by_document(text: Text, tokenizer: Any, samples: int, seqlen: int, random: Any, name: str) -> Tensor:
    windows: list[Tensor] = []
    longest = 0
    for index in map(int, random.permutation(len(text.documents))):
        # No piece is shorter than a character, so short documents need not be tokenised.
        if len(text.documents[index]) <= seqlen:
            longest = max(longest, len(text.documents[index]))
            continue
        ids = tokenize(text.documents[index], tokenizer)
        longest = max(longest, len(ids))
        if len(ids) <= seqlen:
            continue
        start = int(random.integers(0, len(ids) - seqlen))
        windows.append(ids[start : start + seqlen])
        if len(windows) == samples:
            return torch.stack(windows)
    raise InputError(
        f"{name}: only {len(windows)} of {len(text.documents)} documents hold more than calib.seqlen={seqlen} tokens, "
        f"and calib.samples={samples} are wanted; lower either (the longest document has about {longest})"
    )


def random_windows(vocabulary: int, samples: int, seqlen: int, seed: int) -> Tensor:
    """Return `(samples, seqlen)` uniformly random token ids."""
    random = np.random.default_rng([seed, seqlen])
    return torch.from_numpy(random.integers(0, vocabulary, size=(samples, seqlen)))


def cut_windows(text: Text, tokenizer: Any, seqlen: int, name: str) -> Tensor:
    """Return `(windows, seqlen)` token ids: the text tokenised once and cut without overlap, the tail dropped.

    Source: the protocol of GPTQ and OmniQuant's published perplexities.

    Raises:
        InputError: the text is shorter than one window.
    """
    ids = tokenize(text.joined(), tokenizer)
    windows = len(ids) // seqlen
    if windows == 0:
        raise InputError(too_short(name, len(ids), seqlen, "eval.seqlen"))
    return ids[: windows * seqlen].view(windows, seqlen)


def token_hash(windows: Tensor) -> str:
    """A hash of the drawn tokens and their arrangement, equal on every machine."""
    array = np.ascontiguousarray(windows.numpy().astype("<i8"))
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=8)
    digest.update(array.tobytes())
    return digest.hexdigest()
