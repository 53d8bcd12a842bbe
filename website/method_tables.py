"""The tables of a method's page: its settings from the YAML and the dataclasses, its numbers from committed records."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from lsiq.cli.compose import compose
from lsiq.experiment.training_length import TOKENS
from lsiq.settings import find_target
from lsiq.tables.papers.layout import BUNDLED
from lsiq.tables.papers.model_sizes import TEXTS
from lsiq.tables.papers.size_runs import ENTRIES, load_sizes
from lsiq.tables.protocol import STUDY
from lsiq.tables.study import Runs, Sample, load

WIDTHS = ("w2a16g128", "w3a16g128", "w4a16g128", "w4a4", "w4a8-mxint")
# Settings that every learned method has; docs/methods/training.md shows them once.
SHARED = "training"


def settings_of(methods: Sequence[str]) -> str:
    """Return a table of the settings of some files of conf/method/, a column each.

    Those of the training that a file leaves as they are stand in docs/methods/training.md.
    """
    found = {method: dict(_settings(_composed(method))) for method in methods}
    usual = {f"{SHARED}.{key}": value for key, value in _usual_training().items()}
    keys = list(dict.fromkeys(key for values in found.values() for key in values))
    rows = []
    for key in keys:
        values = [found[method].get(key) for method in methods]
        if all(value is None or (key in usual and value[0] == usual[key]) for value in values):
            continue
        description = next(value[1] for value in values if value is not None)
        cells = ["" if value is None else f"`{_written(value[0])}`" for value in values]
        rows.append([f"`{key}`", *cells, description])
    return _table(["`method.` …", *(f"`{method}`" for method in methods), "what it is"], rows)


def training_settings(_: Sequence[str] = ()) -> str:
    """Return the table of the settings that every learned method trains with."""
    found = dict(_settings(_composed("omniquant")["training"]))
    rows = [[f"`{key}`", f"`{_written(value)}`", about] for key, (value, about) in found.items()]
    return _table(["`method.training.` …", "usual", "what it is"], rows)


def numbers(methods: Sequence[str]) -> str:
    """Return what committed records hold of the methods: the bundled models over seeds, then models by size."""
    runs, _ = load()
    parts = []
    if rows := list(_of_the_study(runs, methods)):
        heads = ["setting", "method", *(f"{model}, {text}" for model in BUNDLED for text in ("bundled", "WikiText-2"))]
        parts.append(
            "Excess loss over the float model, mean ± standard deviation over three seeds, 11 million parameters "
            "([how it was measured](../results.md)):\n\n" + _table(heads, rows)
        )
    if rows := list(_by_size(methods)):
        heads = ["bits", "method", *(size.name for size in load_sizes().sizes)]
        parts.append(
            "By size, C4 / WikiText-2 test, mean (number of runs), other calibration text than above "
            "([how it was measured](../tables/main.md)):\n\n" + _table(heads, rows)
        )
    return "\n\n".join(parts) or "No committed record has this method by itself."


def _composed(method: str) -> Mapping[str, Any]:
    composed = OmegaConf.to_container(compose(f"method={method}", "eval=none", "tracker=none").method, resolve=True)
    assert isinstance(composed, dict)
    return composed  # type: ignore[return-value]


def _usual_training() -> dict[str, Any]:
    return {key: value for key, (value, _) in _settings(_composed("omniquant")["training"])}


def _settings(node: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, tuple[Any, str]]]:
    """Dotted names with values and descriptions, of settings inside settings too; a method in `then` is named."""
    fields = find_target(node["_target_"], above).__pydantic_fields__ if "_target_" in node else {}
    for key, value in node.items():
        if key in ("_target_", "label"):
            continue
        about = fields[key].description or "" if key in fields else TOKENS if key == "tokens" else ""
        if isinstance(value, Mapping) and key not in ("then", "start"):
            yield from _settings(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", (value, about)


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value["_target_"]).rpartition(".")[2].lower()
    if value == "???":
        return "to be given"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _of_the_study(runs: Runs, methods: Sequence[str]) -> Iterator[list[str]]:
    keys = [(model, f"excess/{text}@512") for model in BUNDLED for text in ("bundled", "wikitext2")]
    for setting in WIDTHS:
        for method in methods:
            samples = [runs.sample(STUDY, model, setting, method, key) for model, key in keys]
            if any(samples):
                yield [f"`{setting}`", f"`{method}`", *map(_sampled, samples)]


def _sampled(sample: Sample | None) -> str:
    if sample is None:
        return "not run"
    spread = "" if sample.exact else " (1 seed)" if sample.spread is None else f" ± {sample.spread:.3f}"
    return f"{sample.mean:.3f}{spread}"


def _by_size(methods: Sequence[str]) -> Iterator[list[str]]:
    """Rows of the study of scale: the methods and their variants, with the number of runs of each cell."""
    runs = load_sizes()
    for width in ("w2", "w3", "w4"):
        for entry in ENTRIES:
            samples = [
                [runs.sample(size.name, width, entry.name, f"excess/{text}") for text in TEXTS] for size in runs.sizes
            ]
            if re.split(",| ", entry.name)[0] in methods and any(map(any, samples)):
                name = f"`{entry.name}`" if entry.name in methods else entry.name
                yield [width[1:], name, *map(_both_texts, samples)]


def _both_texts(samples: Sequence[Sample | None]) -> str:
    measured = [sample for sample in samples if sample is not None]
    if not measured:
        return "not run"
    count = "" if measured[0].exact else f" ({len(measured[0].values)})"
    return " / ".join(f"{sample.mean:.3g}" for sample in measured) + count


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
