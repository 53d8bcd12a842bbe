"""What comes with the package: two small trained models, their tokenizer, and text to calibrate and evaluate on."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent
TEXT = ASSETS / "text"


def bundled_model(name: str) -> Path:
    """The folder of a bundled model: `tiny-llama` or `tiny-opt`."""
    return ASSETS / name


KINDS = ("science", "history", "craft", "stories")


def bundled_text(split: str, kind: str | None = None) -> list[Path]:
    """The pieces of a split, `calibration` (100) or `evaluation` (24), of one kind or of all, in a fixed order."""
    return sorted((TEXT / split / (kind or "")).rglob("*.txt"))


def bundled_task(name: str) -> Path | None:
    """The items of a task that comes with the package, or None."""
    path = ASSETS / "tasks" / f"{name}.jsonl"
    return path if path.is_file() else None
