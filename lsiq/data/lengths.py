"""A text that is too short, or holds too few windows, in one wording wherever it is noticed. Needs no torch."""

from __future__ import annotations


def too_short(name: str, tokens: int, seqlen: int, key: str) -> str:
    """Return what is said of a text that has fewer tokens than one window."""
    return f"{name}: the text has {tokens} tokens, fewer than {key}={seqlen}; give a longer text or a smaller {key}"


def too_few_windows(name: str, most: int, seqlen: int, samples: int) -> str:
    """Return what is said of a calibration text that holds fewer windows, `most`, than are to be drawn of it."""
    return (
        f"{name}: the text holds {most} windows of calib.seqlen={seqlen} tokens, and calib.samples={samples} are "
        "wanted; give a longer text, lower either, or set calib.windows=random, which lets windows overlap"
    )
