"""`lsiq.json`: what leads from an exported checkpoint back to the record of the run that made it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq import __version__
from lsiq.formats.names import format_name
from lsiq.formats.placed import PlacedQuant

if TYPE_CHECKING:
    from lsiq.formats.quant import QuantSettings
    from lsiq.results.record import Record

FILE = "lsiq.json"


def write_origin(record: Record, quant: QuantSettings, method: str, folder: Path) -> None:
    """Write `folder/lsiq.json`, when all other files of weights and settings are there.

    Keys: lsiq (version), run_id (empty for a model of `lsiq.quantize`), setting, method, seed, commit, clean and
    average_bits; inputs and calibration, content hashes as in the record; plan, the format of each linear by name, or
    the one format of all; plan_digest, as in the record; files, a hash of each file of weights and of config.json.
    """
    names = {file.name: _hash(file) for file in sorted(folder.iterdir()) if _counts(file)}
    values: dict[str, Any] = {
        "lsiq": __version__,
        "run_id": record.run_id,
        "setting": quant.name,
        "method": method,
        "seed": record.seed,
        "commit": record.commit,
        "clean": record.clean,
        "average_bits": record.average_bits,
        "inputs": dict(record.inputs),
        "calibration": dict(record.calibration),
        "plan": _plan(quant),
        "plan_digest": record.plan.get("digest"),
        "files": names,
    }
    (folder / FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _plan(quant: QuantSettings) -> Any:
    if isinstance(quant, PlacedQuant):
        return {name: format_name(fmt) for name, fmt in quant.layers.items()}
    return format_name(quant.weight)


def _counts(file: Path) -> bool:
    return file.suffix in (".safetensors", ".gguf") or file.name == "config.json"


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
