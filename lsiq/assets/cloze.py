"""The bundled task: which of four sentences goes on with a passage of the evaluation text?

    python -m lsiq.assets.cloze      # writes lsiq/assets/tasks/bundled_cloze.jsonl, the same on every machine

The passage is two sentences of a piece, the answer the third; the others are sentences of about the same length from
three other pieces of the same kind. Text and items are CC0.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from lsiq.assets import ASSETS, KINDS, bundled_text

ITEMS_PER_PIECE = 5
WRONG = 3
_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")


def passages(piece: Path) -> list[list[str]]:
    """Return three sentences in a row, from evenly spread places of a piece."""
    paragraphs = piece.read_text(encoding="utf-8").strip().split("\n\n")
    found = []
    for sentences in map(_END.split, paragraphs):
        found += [sentences[start : start + 3] for start in range(len(sentences) - 2)]
    step = len(found) / ITEMS_PER_PIECE
    return [found[int(step * place)] for place in range(ITEMS_PER_PIECE)]


def items() -> list[dict[str, object]]:
    """Return the items in order: `query`, four `choices`, and `gold`, the place of the true one."""
    draw = random.Random(0)
    made = []
    for kind in KINDS:
        pieces = bundled_text("evaluation", kind)
        sentences = {piece: [row[2] for row in passages(piece)] for piece in pieces}
        for piece in pieces:
            for first, second, true in passages(piece):
                choices = [true]
                for other in draw.sample([p for p in pieces if p != piece], WRONG):
                    choices.append(min(sentences[other], key=lambda wrong: abs(len(wrong) - len(true))))  # noqa: B023
                draw.shuffle(choices)
                made.append({"query": f"{first} {second}", "choices": choices, "gold": choices.index(true)})
    return made


def main() -> None:
    path = ASSETS / "tasks" / "bundled_cloze.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for item in items():
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
