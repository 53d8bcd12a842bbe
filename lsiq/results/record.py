"""Records: one small JSON file per run, the truth that tables, notebooks and trackers are drawn from."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lsiq import __version__
from lsiq.errors import OutputError
from lsiq.runtime import processes
from lsiq.runtime.files import write_text
from lsiq.runtime.memory import highest, peak_bytes
from lsiq.runtime.redaction import redacted

T = TypeVar("T")
SCHEMA = 1
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "hydra-core",
    "datasets",
    "lm_eval",
    "wandb",
    "tensorboard",
)


@dataclass
class Record:
    """What one run did and found.

    Attributes:
        run_id: also the name of its folder.
        status: running, finished, failed, evaluation failed or interrupted.
        created: start, UTC, ISO 8601.
        config: the resolved configuration.
        inputs: content hashes of checkpoint and texts, by key.
        metrics: numbers by key, such as `ppl/bundled@512` and, of the float model, `float/ppl/bundled@512`.
        protocol: by metric key, how it was measured: windows, tokens, hash of the tokens.
        cached: by metric key, the run that measured it and when, where a number was taken from the cache.
        calibration: samples, sequence length and token hash.
        plan: of runs whose linears have formats of their own: the file beside the record that says which, its digest,
            the average bits and the divergence that it foresees, and how many linears have each format.
        prefix: ids of the tokens that stand in the cache before every sequence of the quantised model.
        average_bits: bits per original weight of the quantised linears, with all that decodes, rotates, repairs them.
        cost: bits, bytes, multiply-accumulates and circuit area; see `lsiq.pipeline.cost.model_cost`.
        seconds: wall time by stage and in all.
        peak_bytes: of host and device memory.
        stage_peaks: the same by stage, from the start of the run until the end of the stage.
        blocks: one entry per block.
        training_precision: what `precision=auto` stood for and why; empty where nothing was left to the machine.
        training_form: of runs that fine-tune, what is trained at once and why; see `FineTune`.
        versions, commit, clean, command, machine: where the numbers come from; `clean` is None outside a checkout.
        weights_from: what the float weights were de-quantised from, such as `GGUF Q4_1`; None for float ones.
        error: why it did not finish.
        quantised: whether all blocks are on disk; the same command then goes on from there.
        exports: by format, where the last export of it lies, its status, and what reading it back found.
    """

    run_id: str
    status: str
    created: str
    config: dict[str, Any]
    seed: int
    inputs: dict[str, str]
    schema: int = SCHEMA
    metrics: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, dict[str, Any]] = field(default_factory=dict)
    cached: dict[str, dict[str, str]] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    prefix: list[int] = field(default_factory=list)
    average_bits: float | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    stage_peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    training_precision: dict[str, str] = field(default_factory=dict)
    training_form: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    clean: bool | None = None
    weights_from: str | None = None
    command: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    quantised: bool = False
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)

    def timed(self, stage: str, action: Callable[[], T]) -> T:
        """Carry out `action`, note its wall time and the peak memory so far under a stage, return what it returns."""
        start = time.perf_counter()
        try:
            return action()
        finally:
            self.took(stage, self.seconds.get(stage, 0.0) + time.perf_counter() - start)

    def took(self, stage: str, seconds: float) -> None:
        """Note the wall time of a stage until now, and the peak memory until now."""
        self.seconds[stage], self.stage_peaks[stage] = seconds, peak_bytes()

    def note_peaks(self) -> None:
        """Note the peak memory of the whole run: of all stages, of which a process before may have made some."""
        self.peak_bytes = highest([peak_bytes(), *self.stage_peaks.values()])

    @property
    def model(self) -> str:
        """The model's name."""
        return self.run_id.rsplit("_", 4)[0]

    @property
    def setting(self) -> str:
        """The number format's name, such as w4a16g128."""
        return self.run_id.rsplit("_", 4)[1]

    @property
    def method(self) -> str:
        """The method's name."""
        return self.run_id.rsplit("_", 4)[2]

    @property
    def notes(self) -> list[str]:
        """What must be said wherever the run's numbers stand."""
        return [] if self.weights_from is None else [origin_note(self.model, self.weights_from)]

    @property
    def objective(self) -> float | None:
        """The number that a search minimises: the first perplexity of the quantised model."""
        return next((value for key, value in self.metrics.items() if key.startswith("ppl/")), None)


def origin_note(model: str, weights_from: str) -> str:
    """What is said of numbers of a model whose float weights were made of quantised ones."""
    return (
        f"The float weights of {model} were de-quantised from {weights_from}: results at about as many bits flatter, "
        "those at fewer bits are fair."
    )


def write_record(record: Record, folder: Path) -> Path:
    """Write `folder/record.json`; the file appears whole or not at all. Of several processes the first writes it.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = folder / "record.json"
    if not processes.first():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(redacted(asdict(record)), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise OutputError(f"paths.runs: {folder} cannot be written ({error.strerror}); set paths.runs=DIR") from error
    return path


def read_record(folder: Path) -> Record | None:
    """Return the record in `folder`, or None where there is none that this version can read."""
    try:
        values = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        return Record(**values) if values.get("schema") == SCHEMA else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that numbers depend on."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    """What is installed does not change while a process runs, and to look it up is a tenth of a small run."""
    by_package = {"python": platform.python_version(), "lsiq": __version__}
    for package in _PACKAGES:
        try:
            by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return by_package


def source_state() -> tuple[str | None, bool | None]:
    """The commit of the checkout that this package lies in, and whether its tracked files are unchanged."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None  # installed as a wheel, perhaps into somebody else's checkout
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit.stdout.strip(), not status.stdout.strip()


def command_line(overrides: Sequence[str] = ()) -> str:
    """The command as it can be given again, without the folder that the program lies in.

    Args:
        overrides: what hydra says of one job. It stands in place of the command where there is any: a sweep's command
            names many jobs, and what a launcher starts elsewhere is not what anybody typed.
    """
    typed = ["run.py", *overrides] if overrides else [Path(sys.argv[0]).name, *sys.argv[1:]]
    return redacted(shlex.join(["python", *typed]))
