"""The card of a trained model: shape, text, recipe and curve, written beside its weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tokenizers import Tokenizer

from lsiq.bundle.ladder import LADDER
from lsiq.bundle.model import POSITIONS
from lsiq.bundle.training import Run
from lsiq.runtime.device import describe

ROWS = 8  # of the curve


def write_card(run: Run, tokenizer: Tokenizer, texts: list[str], valid: list[str], tokens: int) -> None:
    """Write `README.md` beside the weights.

    Args:
        texts, valid: as the command line names them; their folders are left out.
        tokens: of `texts`, repeats included.
    """
    (run.out / "README.md").write_text(card(run, tokenizer, texts, valid, tokens), encoding="utf-8")


def card(run: Run, tokenizer: Tokenizer, texts: list[str], valid: list[str], tokens: int) -> str:
    """Return the text of the card."""
    plan, machine = run.plan, describe(run.model.device)
    tokens_seen = run.step * plan.batch * plan.seqlen
    names = ", ".join(Path(text).name for text in texts)
    weights = run.out / "model.safetensors"
    file = f"{weights.stat().st_size:,} bytes of bfloat16 safetensors"
    where = f"{machine['processes']} × {machine.get('gpu', machine['device'])}"
    return f"""# {plan.family}-{plan.rung}

A model of the ladder of `lsiq/bundle/ladder.py`: a test object for quantisation, not a model to use.

| | |
| --- | --- |
| shape | {_shape(plan.family, plan.rung)} |
| parameters | {sum(parameter.numel() for parameter in run.model.parameters()):,} |
| file | {file} |
| tokenizer | byte-level BPE, {tokenizer.get_vocab_size()} pieces; nothing is added when encoding |
| context | {POSITIONS} tokens |

## Training

{names}: {tokens / 1e6:.1f} M tokens, {tokens_seen / tokens:.1f} passes, {tokens_seen / 1e6:.0f} M tokens in all.

AdamW (0.9, 0.95, decay 0.1 on matrices), batch {plan.batch} × {plan.seqlen}, peak rate {plan.lr:g},
{plan.warmup:.0%} warm-up, cosine to zero, seed {plan.seed};
{run.seconds:.0f} s on {where}. The whole curve: `curve.jsonl`.

{_curve(run.curve, ", ".join(Path(text).name for text in valid))}"""


def _shape(family: str, name: str) -> str:
    rung = LADDER[name]
    blocks = f"{rung.blocks} blocks, hidden {rung.hidden}"
    if family == "llama":
        heads = f"{rung.heads} query and {rung.kv_heads} key-value heads of {rung.hidden // rung.heads}"
        return f"{blocks}, ffn {rung.llama_ffn} (gated, SiLU), {heads}, rotary positions, RMSNorm, tied head"
    heads = f"{rung.heads} heads of {rung.hidden // rung.heads}"
    return f"{blocks}, ffn {rung.opt_ffn} (ReLU), {heads}, learned positions, LayerNorm before, tied head"


def _curve(path: Path, valid: str) -> str:
    """Return a table of some rows of the curve, the last one included."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["valid"] is not None] or rows
    step = max(1, math.ceil(len(rows) / ROWS))
    rows = rows[:-1][::step] + rows[-1:]
    lines = [f"| step | million tokens | train loss | validation loss ({valid or 'none'}) | perplexity |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in rows:
        loss = row["valid"]
        ends = "| – | – |" if loss is None else f"| {loss:.3f} | {math.exp(loss):.2f} |"
        lines.append(f"| {row['step']} | {row['tokens'] / 1e6:.0f} | {row['train']:.3f} {ends}")
    return "\n".join(lines) + "\n"
