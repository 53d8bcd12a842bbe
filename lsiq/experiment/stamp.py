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

_PACKAGE = Path(__file__).parent
# A change of these makes no other blocks: an evaluation may be mended after it failed.
_NO_PART_IN_BLOCKS = ("analysis", "assets", "bench", "evals", "export", "track")
_NO_PART_IN_BLOCKS += ("checks.py", "compare.py", "environment.py", "errors.py", "experiment.py", "identity.py")
_NO_PART_IN_BLOCKS += ("machine.py", "memory.py", "precision.py", "quantize_stage.py", "results.py", "run.py")
_NOT_ASKED = ("wandb", "lm_eval", "datasets", "hydra-core", "safetensors")


def stamp(record: Record) -> str:
    """Name all that decides the blocks of a run: settings, inputs, calibration tokens, versions and sources."""
    kept = {name: version for name, version in versions().items() if name not in _NOT_ASKED}
    precision = record.training_precision.get("chosen")  # two machines may choose differently under one name
    parts = [record.run_id, record.inputs, record.calibration.get("tokens"), kept, precision, source_hash()]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def source_hash() -> str:
    """A hash of the sources that decide what a block becomes."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(_PACKAGE.rglob("*.py")):
        name = file.relative_to(_PACKAGE)
        if name.parts[0] not in _NO_PART_IN_BLOCKS:
            digest.update(str(name).encode() + file.read_bytes())
    return digest.hexdigest()


def check_inputs(config: RunConfig, checkpoint: Path | None, inputs: Mapping[str, str]) -> None:
    """Raise InputError unless the files a run reads are those that gave it its name; `inputs` are their hashes."""
    for key, found in identify_inputs(config, checkpoint).items():
        if found != inputs.get(key):
            raise InputError(
                f"{key}: changed while the run was reading it; give the same command again, which starts a run with "
                "the changed one, or put it back as it was to go on with this one"
            )
