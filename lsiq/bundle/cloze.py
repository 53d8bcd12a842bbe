"""The bundled task: which of four endings finishes a sentence of the evaluation text?

    python -m lsiq.bundle.cloze      # writes lsiq/assets/tasks/bundled_cloze.jsonl, the same on every machine

The query is a sentence of a piece and the first half of the next one, the true answer its second half; the others are
second halves, of about the same length, from three other pieces of the same kind. Text and items are CC0.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

from lsiq.assets import ASSETS, KINDS, bundled_text

ITEMS_PER_PIECE = 5
WRONG = 3
_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")


def passages(piece: Path) -> list[tuple[str, str]]:
    """Return queries and their true endings, from evenly spread places of a piece."""
    pairs = []
    for sentences in map(_END.split, piece.read_text(encoding="utf-8").strip().split("\n\n")):
        for before, sentence in itertools.pairwise(sentences):
            words = sentence.split()
            half = len(words) // 2
            pairs.append((" ".join([before, *words[:half]]), " ".join(words[half:])))
    step = len(pairs) / ITEMS_PER_PIECE
    return [pairs[int(step * place)] for place in range(ITEMS_PER_PIECE)]


def items() -> list[dict[str, object]]:
    """Return the items in order: `query`, four `choices`, and `gold`, the place of the true one."""
    draw = random.Random(0)
    questions = []
    for kind in KINDS:
        parts = {piece: passages(piece) for piece in bundled_text("evaluation", kind)}
        for piece, pairs in parts.items():
            for query, true in pairs:
                distractors = draw.sample([other for other in parts if other != piece], WRONG)
                choices = [true, *(_nearest_in_length(true, [ending for _, ending in parts[p]]) for p in distractors)]
                draw.shuffle(choices)
                questions.append({"query": query, "choices": choices, "gold": choices.index(true)})
    return questions


def _nearest_in_length(text: str, candidates: list[str]) -> str:
    return min(candidates, key=lambda candidate: abs(len(candidate) - len(text)))


def main() -> None:
    path = ASSETS / "tasks" / "bundled_cloze.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for item in items():
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
