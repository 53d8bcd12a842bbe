"""The chat template that comes with a checkpoint, read without torch and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lsiq.models.gguf_file import is_gguf, read_header


def read_chat_template(checkpoint: Path) -> str | None:
    """Return the default chat template of a folder's or GGUF file's tokenizer; None if it has none.

    As transformers reads it: `chat_template.jinja` goes before the one in `tokenizer_config.json`. A configuration that
    cannot be read has none; that it is damaged is said when the tokenizer is loaded.

    Raises:
        InputError: the GGUF file cannot be read.
    """
    if is_gguf(checkpoint):
        return _default(read_header(checkpoint).metadata.get("tokenizer.chat_template"))
    file = checkpoint / "chat_template.jinja"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
        config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _default(config.get("chat_template")) if isinstance(config, dict) else None


def _default(template: Any) -> str | None:
    """Return the template that is used unless another one is named."""
    if isinstance(template, list):  # of several, each with its name
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None
