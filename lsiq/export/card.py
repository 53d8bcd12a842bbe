"""The model card that goes along with an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsiq.export.base import Exporter
from lsiq.export.origin import FILE
from lsiq.formats.quant import QuantSettings
from lsiq.models.settings import ModelSettings
from lsiq.results.record import Record, command_line


@dataclass(frozen=True)
class Described:
    """What a card is about.

    Attributes:
        method: the method's name.
        text: what the method learned from: a file or a corpus by name.
    """

    model: ModelSettings
    quant: QuantSettings
    method: str
    text: str | None


def write_card(
    exporter: Exporter, described: Described, record: Record, checks: list[dict[str, Any]], folder: Path
) -> None:
    """Write `README.md`: what the model is, what was measured on it, how to load it, how to make it again."""
    model, quant = described.model, described.quant
    base = model.hub or model.name
    lines = [
        "---",
        *([f"base_model: {model.hub}"] if model.hub else []),
        "tags:",
        *(f"- {tag}" for tag in ("lsiq", quant.name, described.method, exporter.name)),
        "---",
        "",
        f"# {base}, {quant.name}, {described.method}",
        "",
        f"{base}, quantised by lsiq and exported as {exporter.name}.",
        "",
        *_settings(described, record),
        *(["", *record.notes] if record.notes else []),
        "",
        "## Results",
        "",
        *_results(record),
        "",
        "## Read back",
        "",
        *(_check(check) for check in checks),
        *(["Nobody has read it back: `export.verify=false`."] if not checks else []),
        "",
        "## Loading",
        "",
        "```python",
        exporter.usage,
        "```",
        "",
        "## Making it again",
        "",
        "```",
        *dict.fromkeys([record.command, command_line()]),
        "```",
        "",
        _software(record),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _settings(described: Described, record: Record) -> list[str]:
    return [
        "| setting | value |",
        "| --- | --- |",
        *([f"| run | `{record.run_id}` |"] if record.run_id else []),  # a model of lsiq.quantize is of no run
        f"| method | {described.method} |",
        f"| weights | {_weights(described)} |",
        f"| activations | {_activations(described)} |",
        *([f"| keys and values | {described.quant.kv.words} |"] if described.quant.kv.rounds else []),
        f"| average bits, scales and zero points counted | {record.average_bits:.4f} |",
        f"| calibration | {_calibration(described, record)} |",
        f"| seed | {record.seed} |",
    ]


def _weights(described: Described) -> str:
    quant = described.quant
    if not quant.mixed:
        return quant.weight.words
    return f"by linear, see `{FILE}`: " + "; ".join(fmt.words if fmt.bits < 16 else "float" for fmt in quant.formats)


def _activations(described: Described) -> str:
    fmt = described.quant.activation
    return fmt.words if fmt.active else "float"


def _calibration(described: Described, record: Record) -> str:
    if not (calibration := record.calibration):
        return "none"
    return f"{calibration['samples']} sequences of {calibration['seqlen']} tokens, {described.text}"


def _results(record: Record) -> list[str]:
    keys = [key for key in record.metrics if key.startswith("ppl/")]
    if not keys:
        return ["Nothing was measured."]
    rows = [f"| {key.removeprefix('ppl/')} | {_float(record, key)} | {record.metrics[key]:.4f} |" for key in keys]
    return ["| perplexity, corpus@window | float | this model |", "| --- | --- | --- |", *rows]


def _float(record: Record, key: str) -> str:
    value: float | None = record.metrics.get(f"float/{key}")
    return "—" if value is None else f"{value:.4f}"


def _software(record: Record) -> str:
    commit = record.commit or "unknown"
    changed = "" if record.clean in (True, None) else ", with changes that were not committed"
    torch, transformers = (record.versions.get(package, "") for package in ("torch", "transformers"))
    lsiq = record.versions.get("lsiq", "")
    return f"lsiq {lsiq}, commit {commit}{changed}, torch {torch}, transformers {transformers}."


def _check(check: Mapping[str, Any]) -> str:
    if check["status"] == "skipped":
        return f"- not by {check['loader']}: {check['reason']}"
    rounded = f"; storing it rounded the run's own logits by {check['rounding']:.2g}" if check["rounding"] else ""
    return (
        f"- by {check['loader']}: logits in float32 within {check['difference']:.2g} of those written "
        f"(largest logit {check['largest_logit']:.3g}){rounded}"
    )
