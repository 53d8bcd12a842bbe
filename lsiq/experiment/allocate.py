"""The formats of a run's linears: by rules, from a plan, or shared out by sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq.allocation.divergence import Rounding, Trials, passes, to_nearest
from lsiq.allocation.figure import draw_plan
from lsiq.allocation.fisher import estimated_divergences
from lsiq.allocation.plan import FILE, Plan, read_plan, write_plan
from lsiq.allocation.refine import Refined, refined
from lsiq.allocation.solve import choose
from lsiq.allocation.units import Shapes, Unit, budget_of, units_of, without
from lsiq.data.token_cache import token_cache
from lsiq.data.tokens import token_hash
from lsiq.errors import ConfigError
from lsiq.experiment.calibrate import calibration_tokens
from lsiq.experiment.checks import check_formats
from lsiq.experiment.evaluate import open_cache
from lsiq.experiment.rounded_choices import by_method, method_request
from lsiq.formats.mixed import OUTSIDE
from lsiq.formats.names import as_format, format_name
from lsiq.formats.placed import PlacedQuant, fixed, place
from lsiq.models.loading import Model
from lsiq.results.record import Record
from lsiq.runtime import processes
from lsiq.runtime.sources import source_hash
from lsiq.runtime.terminal import say, show_progress

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block

# Bytes that the streams of trials may take at once.
ROOM = 2**31


def placed_formats(config: RunConfig, model: Model, folder: Path, record: Record) -> QuantSettings:
    """Return the run's number formats with one for each linear, and write the plan beside the record.

    Raises:
        LsiqError: a rule matches nothing, a format does not fit, or no choice is small enough.
    """
    quant, allocation = config.quant, None
    if not quant.mixed:
        return quant
    layers = None
    if quant.allocate.active:
        check_formats(model, quant)
        allocation = record.timed("allocate", lambda: allocated(config, model, folder, record))
        layers = {name: as_format(value) for name, value in allocation.layers.items()}
    quant = place(quant, model.depth, model.spec.linears, config.model.name, layers)
    assert isinstance(quant, PlacedQuant)
    check_formats(model, quant)
    plan = Plan(
        {name: format_name(fmt) for name, fmt in quant.layers.items()},
        average_bits(quant, shapes_of(model)),
        None if allocation is None else allocation.divergence,
        {} if allocation is None else allocation.sensitivities,
        {} if allocation is None else allocation.request,
        [] if allocation is None else allocation.measured,
    )
    record.plan = {
        "file": FILE,
        "digest": plan.digest,
        "average_bits": plan.average_bits,
        "divergence": plan.divergence,
        **({"measured": list(plan.measured)} if plan.measured else {}),
        "counts": plan.counts,
    }
    if processes.first():
        write_plan(plan, folder)
        draw_plan(plan, model.depth, model.spec.linears, folder)
    counts = ", ".join(f"{count} {name}" for name, count in plan.counts.items())
    say(f"formats of linears: {counts}; {plan.average_bits:.4f} bits on average ({folder / FILE})")
    return quant


def allocated(config: RunConfig, model: Model, folder: Path, record: Record) -> Plan:
    """Return the plan that an earlier try of this run made, or make one."""
    tokens = processes.from_first(_tokens(config, model, record, config.quant.allocate.samples))
    by_method = config.quant.allocate.rounding == "method"
    method_tokens = processes.from_first(_tokens(config, model, record, None)) if by_method else None
    request = _request(config, model, tokens, method_tokens)
    stored_plan = processes.from_first(read_plan(folder) if processes.first() and not config.force else None)
    if stored_plan is not None and dict(stored_plan.request) == request:
        return stored_plan
    allocation, shapes = config.quant.allocate, shapes_of(model)
    rounded = _rounding(config, model, method_tokens)
    fixed_formats = fixed(config.quant, model.depth, model.spec.linears)
    units = units_of(model.spec, model.depth, allocation.unit)
    free = list(without(units, fixed_formats))
    budget, _ = budget_of(config.quant, free, fixed_formats, shapes)
    sensitivity = processes.from_first(
        _sensitivities(config, model, units, tokens, rounded, request, record) if processes.first() else None
    )
    assert sensitivity is not None
    rows = {unit.name: row for unit, row in zip(units, sensitivity.tolist(), strict=True)}
    formats = choices_of(config.quant)
    sizes = [[unit.bits(fmt, shapes) for fmt in formats] for unit in free]
    selection = choose([rows[unit.name] for unit in free], sizes, budget) if free else []
    divergence = sum(rows[unit.name][index] for unit, index in zip(free, selection, strict=True))
    measured: list[float] = []
    if allocation.rounds and free:
        better = processes.from_first(
            _refined(config, model, free, tokens, rounded, selection, sizes, budget) if processes.first() else None
        )
        assert better is not None
        selection, measured = better.plan, better.divergences
    names = dict(zip(allocation.choices, formats, strict=True))
    layers: dict[str, Any] = {name: format_name(fmt) for name, fmt in fixed_formats.items()}
    for unit, index in zip(free, selection, strict=True):
        layers |= {f"{unit.block}.{name}": format_name(formats[index]) for name in unit.linears}
    sensitivities = {name: dict(zip(names, row, strict=True)) for name, row in rows.items()}
    return Plan(layers, None, divergence, sensitivities, request, measured)


def choices_of(quant: QuantSettings) -> list[Any]:
    """Return the formats that are chosen among, scales as wide as those of `quant.weight`."""
    return [fmt.like(quant.weight) for fmt in quant.allocate.formats]


def shapes_of(model: Model) -> Shapes:
    """Return `(out, in)` of the linears of a block, by name."""
    linears = {name: model.blocks[0].get_submodule(name) for name in model.spec.linears}
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}  # type: ignore[misc]


def average_bits(quant: PlacedQuant, shapes: Shapes) -> float:
    """Return the bits per weight of the linears in blocks, all that decodes them counted; nothing is rounded yet."""
    shapes_by_name = {name: shapes[name.partition(".")[2]] for name in quant.layers if name not in OUTSIDE}
    bits = sum(quant.layers[name].stored_bits(*shape) for name, shape in shapes_by_name.items())
    return bits / sum(out * width for out, width in shapes_by_name.values())


def _tokens(config: RunConfig, model: Model, record: Record, count: int | None) -> Tensor:
    cache = token_cache(config.paths.cache, record.versions, {"run": record.run_id, "created": record.created})
    references = open_cache(config, model, record)
    tokens = calibration_tokens(config.calib, model, config.seed, count, cache, references)
    if tokens is None:
        raise ConfigError(
            "calib.corpus=null: quant.allocate measures sensitivities on calibration text; choose calib=bundled, "
            "calib=written or calib=file"
        )
    return tokens


def _request(config: RunConfig, model: Model, tokens: Tensor, method_tokens: Tensor | None) -> dict[str, Any]:
    """Return what a plan depends on, as plain data; `method_tokens` are those that the method itself gets."""
    allocation = config.quant.allocate
    return {
        "model": config.model.name,
        "bits": allocation.bits,
        "bytes": allocation.bytes,
        "choices": list(allocation.choices),
        "formats": [str(fmt) for fmt in choices_of(config.quant)],
        "rules": [str(rule) for rule in config.quant.rules],
        "unit": allocation.unit,
        "measure": allocation.measure,
        "samples": len(tokens),
        "seqlen": tokens.shape[1],
        "tokens": token_hash(tokens),
        "seed": config.seed,
        "dtype": str(model.dtype),
        "sources": source_hash("allocation", "evals", "formats", "models"),
        **({"rounds": allocation.rounds} if allocation.rounds else {}),
        **({"rounding": method_request(config, method_tokens)} if allocation.rounding == "method" else {}),
    }


def _rounding(config: RunConfig, model: Model, tokens: Tensor | None) -> Rounding:
    """Return what each choice makes of a linear: rounding to nearest, or what the run's method makes of it."""
    formats = choices_of(config.quant)
    if config.quant.allocate.rounding == "nearest":
        return to_nearest(formats)
    return by_method(config, model, formats, tokens)


def _sensitivities(
    config: RunConfig,
    model: Model,
    units: list[Unit],
    tokens: Tensor,
    rounded: Rounding,
    request: Mapping[str, Any],
    record: Record,
) -> Tensor:
    """Return the sensitivities `(units, choices)`; what was measured before, choice by choice, is taken from there."""
    allocation, cache = config.quant.allocate, open_cache(config, model, record)
    formats = choices_of(config.quant)
    columns: dict[str, Tensor] = {}
    keys = {}
    for fmt in formats:
        request_keys = {key: request[key] for key in ("unit", "measure", "samples", "seqlen", "tokens", "sources")}
        request_keys |= {"seed": config.seed} if allocation.measure == "fisher" else {}
        request_keys |= {"rounding": request["rounding"]} if "rounding" in request else {}
        keys[str(fmt)] = cache.key(kind="sensitivity", format=str(fmt), **request_keys)
        if (entry := cache.read(keys[str(fmt)])) is not None:
            columns[str(fmt)] = entry.tensors["sensitivity"]
    places = [place for place, fmt in enumerate(formats) if str(fmt) not in columns]
    if places:
        for place, column in zip(places, _measure(config, model, units, places, tokens, rounded).T, strict=True):
            fmt = str(formats[place])
            columns[fmt] = column.contiguous()
            cache.write(keys[fmt], {"sensitivity": columns[fmt]})
    return torch.stack([columns[str(fmt)] for fmt in formats], 1)


def _measure(
    config: RunConfig, model: Model, units: list[Unit], places: list[int], tokens: Tensor, rounded: Rounding
) -> Tensor:
    """Return the sensitivities of the choices at `places`."""
    formats = [choices_of(config.quant)[place] for place in places]
    if config.quant.allocate.measure == "fisher":
        generator = torch.Generator().manual_seed(config.seed * 100_003 + 70_001)
        with show_progress("allocate", model.depth) as progress:
            return estimated_divergences(model, tokens, units, formats, generator, progress.advance)
    steps = model.depth * passes(model, tokens, len(units) * len(formats), ROOM)
    with show_progress("allocate", steps) as progress:

        def at_places(block: Block, name: str, choice: int) -> Tensor:
            return rounded(block, name, places[choice])

        return Trials(model, tokens, units, formats, at_places, config.calib.batch, ROOM, progress.advance).single()


def _refined(
    config: RunConfig,
    model: Model,
    units: list[Unit],
    tokens: Tensor,
    rounded: Rounding,
    selection: list[int],
    sizes: list[list[int]],
    budget: int,
) -> Refined:
    """Return a plan that is better when measured as a whole; linears that rules decide are in float meanwhile."""
    formats, rounds = choices_of(config.quant), config.quant.allocate.rounds
    steps = model.depth * (1 + rounds * (1 + passes(model, tokens, 2 * len(units), ROOM)))
    with show_progress("allocate", steps) as progress:
        trials = Trials(model, tokens, units, formats, rounded, config.calib.batch, ROOM, progress.advance)
        return refined(selection, sizes, budget, trials.divergences, rounds)
