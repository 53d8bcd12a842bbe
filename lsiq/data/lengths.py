"""A text that is too short, in one wording wherever it is noticed. Needs no torch."""

from __future__ import annotations


def too_short(name: str, tokens: int, seqlen: int, key: str) -> str:
    """Return what is said of a text that has fewer tokens than one window."""
    return f"{name}: the text has {tokens} tokens, fewer than {key}={seqlen}; give a longer text or a smaller {key}"
