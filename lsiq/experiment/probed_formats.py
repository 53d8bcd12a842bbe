"""The number formats with which a dry run tries out one block, and what sharing bits out would take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lsiq.allocation.divergence import passes
from lsiq.allocation.units import units_of
from lsiq.data.tokens import random_windows
from lsiq.evals.perplexity import score_tokens
from lsiq.experiment.config import with_formats
from lsiq.experiment.sharing import ROOM
from lsiq.formats.placed import PlacedQuant, place
from lsiq.models.block import run_stream
from lsiq.models.families import find_spec
from lsiq.models.loading import Model

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig


def with_probed_formats(config: RunConfig, architecture: Mapping[str, Any]) -> RunConfig:
    """Return the settings in which every block has the formats of that block which has the most to quantise.

    Where bits are to be shared out, all linears have the first choice: what a method costs hardly depends on it.

    Raises:
        ConfigError: a rule matches nothing, or a plan is of another model.
    """
    quant = config.quant
    if not quant.mixed:
        return config
    spec, depth = find_spec(architecture["model_type"], config.model.name), int(architecture["num_hidden_layers"])
    layers = None
    if quant.allocate.active:
        layers = {f"{index}.{name}": quant.allocate.formats[0] for index in range(depth) for name in spec.linears}
    placed = place(quant, depth, spec.linears, config.model.name, layers)
    assert isinstance(placed, PlacedQuant)
    rounded = [sum(placed.layers[f"{index}.{name}"].bits < 16 for name in spec.linears) for index in range(depth)]
    most = rounded.index(max(rounded))
    alike = {f"{index}.{name}": placed.layers[f"{most}.{name}"] for index in range(depth) for name in spec.linears}
    return with_formats(config, replace(placed, layers={**placed.layers, **alike}))


def allocation_steps(config: RunConfig, model: Model, depth: int) -> tuple[float, float, float]:
    """Return what measuring sensitivities takes: runs of one sequence through a block and through the head, and passes.

    Args:
        depth: blocks of the true model.
    """
    allocation = config.quant.allocate
    units = units_of(model.spec, depth, allocation.unit)
    drawn = random_windows(model.config.vocab_size, allocation.samples, config.calib.seqlen, 0)
    if allocation.measure == "fisher":
        return 4.0 * depth * allocation.samples, 3.0 * allocation.samples, 2.0  # the way back costs twice the way there
    blocks = heads = through = 0.0
    # Around a plan each unit is tried with two other choices, and the plan and some others are tried as a whole.
    for choices, whole in ((len(allocation.choices), 0), *[(2, 8)] * allocation.rounds):
        count = choices * len(units) + whole
        rounds = passes(model, drawn, count, ROOM)
        through += rounds
        blocks += choices * sum(depth - unit.block for unit in units) + (whole + rounds) * depth
        heads += count + rounds
    return allocation.samples * blocks, allocation.samples * heads, through


def allocation_costs(config: RunConfig, model: Model) -> tuple[float, float]:
    """Return the seconds of one sequence through a block of `model`, and through its head."""
    batch = config.calib.batch
    drawn = random_windows(model.config.vocab_size, batch, config.calib.seqlen, config.seed)
    hidden, kwargs = model.embed(drawn, batch)
    function = model.block(0, kwargs).with_weights({})
    took = []
    for _ in range(2):  # the first sets up
        start = time.perf_counter()
        out = run_stream(function, hidden, batch, model.device)
        middle = time.perf_counter()
        score_tokens(model, [drawn], {"float": [out], "tried": [out]}, "float")
        took.append(((middle - start) / batch, (time.perf_counter() - middle) / (2 * batch)))
    return took[-1]
