"""What must be the same for a run to go on from the blocks it left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from lsiq.errors import InputError
from lsiq.experiment.config import RunConfig
from lsiq.experiment.identity import identify_inputs
from lsiq.results.record import Record, versions
from lsiq.runtime.plugins import plugins_hash
from lsiq.runtime.sources import source_hash

# Whose code decides what a block becomes, and whose does not: an evaluation may be mended after it failed.
DECIDES_BLOCKS = (
    *("runtime", "settings", "formats", "linalg", "kernels", "models", "calib", "results", "parts", "learning"),
    *("methods", "pipeline", "allocation"),
)
# Tokens are in the stamp themselves, and so is the configuration, by the run's id.
DECIDES_NO_BLOCK = (
    *("errors", "assets", "data", "bundle", "evals", "track", "report", "export", "experiment", "sweeps", "bench"),
    *("tables", "cli", "api"),
)
_NOT_ASKED = ("wandb", "lm_eval", "datasets", "hydra-core", "safetensors")


def stamp(record: Record) -> str:
    """Name all that decides the blocks of a run: settings, inputs, calibration tokens, versions and sources."""
    packages = {name: version for name, version in versions().items() if name not in _NOT_ASKED}
    precision = record.training_precision.get("chosen")  # two machines may choose differently under one name
    parts = [
        record.run_id,
        record.inputs,
        record.calibration.get("tokens"),
        record.plan.get("digest"),
        packages,
        precision,
        source_hash(*DECIDES_BLOCKS),
        *filter(None, [plugins_hash()]),
    ]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_inputs(config: RunConfig, checkpoint: Path | None, inputs: Mapping[str, str]) -> None:
    """Raise InputError unless the files a run reads are those that gave it its name; `inputs` are their hashes."""
    for key, digest in identify_inputs(config, checkpoint).items():
        if digest != inputs.get(key):
            raise InputError(
                f"{key}: changed while the run was reading it; give the same command again, which starts a run with "
                "the changed one, or put it back as it was to go on with this one"
            )
