"""A block with its context, and the parts and settings that tests of learning share."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
from helpers.models import load_small
from torch import Tensor

from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.formats.quant import QuantSettings
from lsiq.learning.schedule import Training
from lsiq.models.block import Block, run_stream
from lsiq.models.context import Context
from lsiq.parts.base import Part, PartState
from lsiq.parts.clip import Clip
from lsiq.parts.dense import Dense
from lsiq.parts.equivalent import Equivalent
from lsiq.parts.expansion import Expansion
from lsiq.parts.rounding import Rounding
from lsiq.parts.singular import Singular

CPU = torch.device("cpu")
W2 = QuantSettings(weight=Integer(bits=2, group=32), activation=Activation())
W4A4 = QuantSettings(weight=Integer(bits=4, group=32), activation=Activation(bits=4))
PARTS: dict[str, tuple[Part, ...]] = {
    "clip": (Clip(lr=1e-2),),
    "equivalent": (Equivalent(weight_only_families=None),),
    "singular": (Singular(lr=1e-3, corner=0),),
    "singular-corner": (Singular(corner=8, lr=1e-3),),
    "all": (Singular(corner=8, lr=1e-3), Equivalent(weight_only_families=None), Clip(lr=1e-2)),
    "band": (Expansion(width=3, corner=8, lr=1e-3), Clip(lr=1e-2)),
    "hardened": (Rounding(hardening=0.5), Clip(form="linear", lr=1e-2)),
    "hardened-dense": (Dense(tensors="all", hardening=0.5, lr=1e-3), Clip(search=True, lr=1e-2)),
    "rounding": (Rounding(), Clip(form="linear", lr=1e-2)),
    "dense": (Dense(tensors="all", lr=1e-3), Clip(search=True, lr=1e-2)),
    "dense-steps": (Dense(unit="step", lr=1e-3), Clip(lr=1e-2)),
    "everything": (
        Expansion(lr=1e-3, corner=0),
        Equivalent(search=True, weight_only_families=None),
        Dense(lr=1e-3),
        Clip(search=True, lr=1e-2),
        Rounding(),
    ),
    "fold-first": (Equivalent(weight_only_families=None), Singular(corner=8, lr=1e-3), Clip(lr=1e-2)),
}


def schedule_of(**changes: object) -> Training:
    settings = {"epochs": 2, "batch": 4, "decay": "constant", "precision": "model", "signed": [], "keep": "last"}
    return Training(**(settings | changes))  # type: ignore[arg-type]


def setting(checkpoint: Path, samples: int = 8) -> tuple[Block, Context]:
    """Copies of the first block of a small model and of its streams, for each test to do with as it likes."""
    block, noisy, targets = _read(checkpoint, samples)
    weights = {name: weight.clone() for name, weight in block.weights.items()}
    context = Context(noisy.clone(), targets.clone(), torch.Generator().manual_seed(0), 4, lambda values: None)
    return replace(block, weights=weights), context


@functools.cache
def _read(checkpoint: Path, samples: int) -> tuple[Block, Tensor, Tensor]:
    model = load_small(checkpoint)
    tokens = torch.randint(0, 4096, (samples, 24), generator=torch.Generator().manual_seed(3))
    hidden, kwargs = model.embed(tokens, batch=4)
    block = model.block(0, kwargs)
    targets = run_stream(block.with_weights({}), hidden, 4, CPU)
    noisy = hidden + 0.02 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    return block, noisy, targets


def moved(states: list[PartState], size: float = 0.05) -> list[PartState]:
    """Parameters away from their start, as training leaves them."""
    generator = torch.Generator().manual_seed(5)

    def shake(tensor: Tensor) -> Tensor:
        return tensor + size * torch.randn(tensor.shape, generator=generator)

    return [replace(state, parameters={k: shake(p) for k, p in state.parameters.items()}) for state in states]


def fresh() -> torch.Generator:
    return torch.Generator().manual_seed(0)
