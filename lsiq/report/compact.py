"""Compact records: what tables need of a run, one line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lsiq.errors import InputError
from lsiq.report.significance import window_means
from lsiq.results.record import Record

# Of the resolved configuration: what decides a number, without where things lie and what is only said.
_KEPT = {
    "model": ("dtype", "outliers", "outlier_strength", "weights"),
    "quant": ("weight", "activation"),
    "calib": ("corpus", "samples", "written", "seqlen", "batch"),
    "eval": ("corpora", "seqlen", "windows", "tasks", "items"),
}
# Fields that lines leave out where they are empty.
_LEFT_OUT = ("weights_from", "window_means")
_MEASURES = ("ppl", "excess", "kl", "top1", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        run_id: names the run's folder; None for runs that were noted before records were collected.
        study: the group that the run was filed under.
        setting: the number formats, such as w3a16g128.
        config: the resolved settings that decide its numbers; what is null is left out.
        metrics: as in the record, to six digits.
        tokens: by metric key, the hash of the tokens that it was measured on.
        macs: multiply-accumulates per token by width.
        seconds: of quantising all blocks, with a start from another method.
        errors: by block, the relative squared error of its output.
        machine: device, GPU, threads and version of torch.
        weights_from: what the float weights were de-quantised from; None, and left out of files, for float ones.
        window_means: by measure, the means of blocks of windows, for paired tests; left out of files where none are.
    """

    run_id: str | None
    study: str | None
    created: str
    model: str
    setting: str
    method: str
    seed: int
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    tokens: Mapping[str, str]
    average_bits: float | None
    relative_area: float | None
    macs: Mapping[str, int]
    seconds: float
    errors: list[float | None]
    machine: Mapping[str, Any]
    commit: str | None
    weights_from: str | None = None
    window_means: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def dtype(self) -> str | None:
        """What the model was measured in, as far as the settings say; auto on a CPU is float32."""
        if self.get("eval.tf32"):
            return "tf32"
        dtype = self.get("model.dtype")
        return "float32" if dtype == "auto" and self.machine.get("device") == "cpu" else dtype

    def get(self, key: str) -> Any:
        """Return the setting with a dotted name, such as `method.training.epochs` or `method.parts.expansion.width`.

        A part is named as its module is, or by its position.
        """
        value: Any = self.config
        for name in key.split("."):
            if isinstance(value, list):
                value = _item(value, name)
            else:
                value = value.get(name) if isinstance(value, Mapping) else None
        return value


def _item(items: Sequence[Any], name: str) -> Any:
    """Return the item of a list at a position, or the part whose module is called `name`; else None."""
    if name.isdigit():
        return items[int(name)] if int(name) < len(items) else None
    return next((item for item in items if isinstance(item, Mapping) and part_name(item) == name), None)


def part_name(item: Mapping[str, Any]) -> str:
    """Return what dotted names call a part of a method: the name of its module."""
    return str(item.get("_target_")).rpartition(".")[0].rpartition(".")[2]


def compact(record: Record, folder: Path | None = None) -> Run:
    """Return what tables need of a finished run's record, its windows in `folder` included where they are wanted."""
    model, setting, method, *_ = record.run_id.rsplit("_", 4)
    groups = {group: {key: record.config[group].get(key) for key in keys} for group, keys in _KEPT.items()}
    groups["eval"]["tf32"] = record.config["eval"].get("tf32") or None
    if groups["quant"]["activation"].get("clip") == 1:  # runs of before had no such setting
        groups["quant"]["activation"] = {**groups["quant"]["activation"], "clip": None}
    config = without_nulls({**groups, "method": _with_precision(record.config["method"], record.training_precision)})
    metrics = {
        key: float(f"{value:.6g}")
        for key, value in record.metrics.items()
        if key.removeprefix("float/").removeprefix("rtn/").split("/")[0] in _MEASURES
    }
    cost, seconds = record.cost, record.seconds
    return Run(
        run_id=record.run_id,
        study=record.config["tracker"].get("group"),
        created=record.created,
        model=model,
        setting=setting,
        method=method,
        seed=record.seed,
        config=config,
        metrics=metrics,
        tokens={key: facts["tokens"] for key, facts in record.protocol.items() if "tokens" in facts},
        average_bits=record.average_bits,
        relative_area=cost.get("relative_area"),
        macs=cost.get("macs_per_token", {}),
        seconds=round(sum(seconds.get(stage, 0.0) for stage in ("prepare", "start", "quantize")), 2),
        errors=[None if row["error"] is None else float(f"{row['error']:.4g}") for row in record.blocks],
        machine={key: record.machine[key] for key in ("device", "gpu", "threads") if key in record.machine}
        | {"torch": record.versions.get("torch")},
        commit=record.commit,
        weights_from=record.weights_from,
        window_means={} if folder is None else window_means(folder, record),
    )


def _with_precision(value: Any, choice: Mapping[str, str]) -> Any:
    """Return a method's settings with what `training.precision=auto` stood for; `precision` elsewhere is left alone."""
    if isinstance(value, list):
        return [_with_precision(inner, choice) for inner in value]
    if not isinstance(value, Mapping):
        return value
    settings = {key: _with_precision(inner, choice) for key, inner in value.items()}
    training = settings.get("training")
    if choice and isinstance(training, Mapping) and training.get("precision") == "auto":
        settings["training"] = {**training, "precision": choice["chosen"]}
    return settings


def without_nulls(value: Any) -> Any:
    """Return nested plain data without keys whose value is None."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def read_runs(file: Path) -> list[Run]:
    """Return the runs of a file of compact records.

    Raises:
        InputError: a line is none.
    """
    names, runs = {field.name for field in fields(Run)}, []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            mismatch = names.symmetric_difference({*_LEFT_OUT, *values})
        except (ValueError, TypeError) as error:
            raise InputError(f"{file}:{number}: not JSON ({error}); collect the records again") from error
        if mismatch:
            raise InputError(
                f"{file}:{number}: not a compact record ({', '.join(sorted(mismatch)[:3])} unknown or missing); "
                "write it with python -m lsiq.tables.collect"
            )
        runs.append(Run(**_named_as_now(values)))
    return runs


def _named_as_now(values: dict[str, Any]) -> dict[str, Any]:
    """Return a run under the name that its method has now: what `lsi-corner` does was called lsi once."""
    method, _, then = values["method"].partition("+")
    parts = values["config"].get("method", {}).get("parts", [])
    kinds = {str(part.get("_target_")).rpartition(".")[2]: part for part in parts}
    if method != "lsi" or "Rounding" in kinds or not kinds.get("Singular", {}).get("corner"):
        return values
    config = {**values["config"], "method": {**values["config"]["method"], "label": "lsi-corner"}}
    return {**values, "method": "lsi-corner" + (f"+{then}" if then else ""), "config": config}


def write_runs(runs: Iterable[Run], file: Path) -> None:
    """Write compact records, sorted, so that the same runs give the same file."""
    ordered = sorted(
        runs, key=lambda run: (run.model, run.setting, run.method, run.seed, run.run_id or "", run.created)
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    values = (asdict(run) for run in ordered)
    rows = ({key: value for key, value in run.items() if key not in _LEFT_OUT or value} for run in values)
    lines = (json.dumps(run, separators=(",", ":"), allow_nan=False) for run in rows)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
