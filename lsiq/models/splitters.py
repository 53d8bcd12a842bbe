"""How byte-level tokenizers split text into words, by the names that llama.cpp has for it (`tokenizer.ggml.pre`).

A GGUF file holds pieces and merges, but of the splitting this name alone. Pieces are joined inside a word only, so
another splitting gives other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

# Steps that are no expression: digits one by one; the splitter of GPT-2, which also spells words in bytes.
DIGITS, GPT2 = "digits", "GPT-2"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
# Words of capitals and small letters in turn; signs that may end in slashes.
_CAPITALS, _SMALL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_LLAMA3 = "|".join((_CONTRACTIONS, _LETTERS, r"\p{N}{1,3}", _SIGNS, _BLANKS))
_QWEN2 = "|".join((_CONTRACTIONS, _LETTERS, r"\p{N}", _SIGNS, _BLANKS))
_TEKKEN = "|".join((f"{_CAPITALS}*{_SMALL}+", f"{_CAPITALS}+{_SMALL}*", r"\p{N}", _PATHS, _BLANKS))
_GPT4O = "|".join(
    (f"{_CAPITALS}*{_SMALL}+{_CONTRACTIONS}?", f"{_CAPITALS}+{_SMALL}*{_CONTRACTIONS}?", r"\p{N}{1,3}", _PATHS, _BLANKS)
)

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


@dataclass(frozen=True)
class Splitter:
    """How text becomes words.

    Attributes:
        steps: each splits what the ones before left: `DIGITS`, an expression whose matches become words, or, as the
            last one, `GPT2`.
        whole_words: whether a word that is a piece is taken whole, whatever the merges say.
        composed: whether letters and their accents are composed first (NFC).
        begins: whether texts begin with the beginning-of-text token where the file does not say it.
    """

    steps: tuple[str, ...]
    whole_words: bool = False
    composed: bool = False
    begins: bool = False


_LLAMA3_WORDS = Splitter((_LLAMA3,), whole_words=True, begins=True)
_DIGITS_THEN_GPT2, _QWEN2_DIGITS = Splitter((DIGITS, GPT2)), Splitter((_QWEN2,))
# Of models whose architecture is read. Of names for one splitter the first is written.
SPLITTERS = {
    **dict.fromkeys(("gpt-2", "mellum", "trillion"), Splitter((GPT2,))),
    **dict.fromkeys(("smollm", "minerva-7b", "refact", "starcoder"), _DIGITS_THEN_GPT2),
    **dict.fromkeys(("llama-bpe", "falcon3", "llama-v3", "llama3", "midm-2.0", "pixtral"), _LLAMA3_WORDS),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitter((_LLAMA3,))),
    "qwen2": replace(_QWEN2_DIGITS, composed=True),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "megrez"), _QWEN2_DIGITS),
    "tekken": Splitter((_TEKKEN,), whole_words=True, begins=True),
    "gpt-4o": Splitter((_GPT4O,)),
    "default": Splitter((r"[\p{P}$+<=>^~|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
}


# Of an expression that matches everything, the second is the same.
_MATCHES_ARE_WORDS = {("Isolated", False), ("Removed", True)}


def find_name(tokenizer: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for how the tokenizer of a `tokenizer.json` splits words; None where it has none.

    llama.cpp composes nothing; of Qwen2, whose tokenizer does, it has the name all the same.
    """
    before = tokenizer.get("pre_tokenizer") or {}
    steps = tuple(filter(None, map(_step, before.get("pretokenizers", [before]))))
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    for name, splitter in SPLITTERS.items():
        composed = {"NFC": splitter.composed, None: True}.get(normalizer, False)
        if composed and (splitter.steps, splitter.whole_words) == (steps, whole_words):
            return name
    return None


def is_byte_level(tokenizer: dict[str, Any]) -> bool:
    before = tokenizer.get("pre_tokenizer") or {}
    return any(step.get("type") == "ByteLevel" for step in before.get("pretokenizers", [before]))


def _step(step: dict[str, Any]) -> str:
    """How a step of tokenizer.json splits words; nothing where it only spells them in bytes."""
    kind = step.get("type", "nothing")
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return GPT2 if step.get("use_regex", True) else ""
    if kind == "Digits" and step.get("individual_digits"):
        return DIGITS
    if kind == "Split" and (step.get("behavior"), step.get("invert")) in _MATCHES_ARE_WORDS:
        return step["pattern"].get("Regex", kind)
    return kind
