"""A plan: a format for each linear, and what it was chosen by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lsiq.errors import InputError
from lsiq.runtime.files import write_text

FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """A format for each linear of a model.

    Attributes:
        layers: by number of the block and name of the linear, a format: its name, or its settings as plain data.
        average_bits: bits per weight of the linears, all that decodes them counted.
        divergence: the sum of the sensitivities chosen first, nats per token; None where nothing was measured.
        sensitivities: by unit and name of the choice, nats per token.
        request: what the plan was asked for and measured on; empty where it came from rules or a file.
        measured: the divergence of the whole model as planned, first without and then after each round of measuring
            around the plan; empty where there was none.
    """

    layers: Mapping[str, Any]
    average_bits: float | None = None
    divergence: float | None = None
    sensitivities: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    measured: Sequence[float] = ()

    @property
    def digest(self) -> str:
        """A hash of the formats."""
        return hashlib.blake2b(json.dumps(self.layers, sort_keys=True).encode(), digest_size=10).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """How many linears have each format, the most frequent first."""
        names = [name if isinstance(name, str) else json.dumps(name, sort_keys=True) for name in self.layers.values()]
        return {name: names.count(name) for name in sorted(set(names), key=lambda name: (-names.count(name), name))}


def write_plan(plan: Plan, folder: Path) -> Path:
    """Write `folder/plan.json`; the file appears whole or not at all."""
    file = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(asdict(plan), indent=1) + "\n")
    return file


def read_plan(folder: Path) -> Plan | None:
    """Return the plan of a run's folder; None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / FILE
    try:
        return Plan(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file}: cannot be used ({error}); run again with force=true") from error
