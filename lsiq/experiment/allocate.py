"""The formats of a run's linears: by rules, from a plan, or shared out by sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lsiq.allocation.figure import draw_plan
from lsiq.allocation.plan import FILE, Plan, read_plan, write_plan
from lsiq.allocation.units import Shapes
from lsiq.data.token_cache import token_cache
from lsiq.experiment.calibrate import calibration_tokens
from lsiq.experiment.checks import check_formats
from lsiq.experiment.evaluate import open_cache
from lsiq.experiment.sharing import Sharing, shapes_of
from lsiq.formats.mixed import OUTSIDE
from lsiq.formats.names import as_format, format_name
from lsiq.formats.placed import PlacedQuant, place
from lsiq.models.loading import Model
from lsiq.results.record import Record
from lsiq.runtime import processes
from lsiq.runtime.terminal import say

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig
    from lsiq.formats.quant import QuantSettings


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
    allocation = config.quant.allocate
    tokens = processes.from_first(_tokens(config, model, record, allocation.samples))
    method_tokens = None
    if allocation.rounding == "method":
        method_tokens = processes.from_first(_tokens(config, model, record, None))
    sharing = Sharing(
        config.quant,
        model,
        config.model.name,
        config.method,
        tokens,
        method_tokens,
        config.calib.batch,
        config.seed,
        open_cache(config, model, record),
    )
    stored_plan = processes.from_first(read_plan(folder) if processes.first() and not config.force else None)
    if stored_plan is not None and dict(stored_plan.request) == sharing.request():
        return stored_plan
    return sharing.plan()


def average_bits(quant: PlacedQuant, shapes: Shapes) -> float:
    """Return the bits per weight of the linears in blocks, all that decodes them counted; nothing is rounded yet."""
    shapes_by_name = {name: shapes[name.partition(".")[2]] for name in quant.layers if name not in OUTSIDE}
    bits = sum(quant.layers[name].stored_bits(*shape) for name, shape in shapes_by_name.items())
    return bits / sum(out * width for out, width in shapes_by_name.values())


def _tokens(config: RunConfig, model: Model, record: Record, count: int | None) -> Tensor:
    """Return the first `count` calibration sequences; None for all."""
    cache = token_cache(config.paths.cache, record.versions, {"run": record.run_id, "created": record.created})
    references = open_cache(config, model, record)
    tokens = calibration_tokens(config.calib, model, config.seed, count, cache, references)
    assert tokens is not None  # the settings see to it
    return tokens
