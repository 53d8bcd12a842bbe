"""Bits shared out among the linears of a model: sensitivities measured, or taken from the cache, and a plan made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsiq.allocation.divergence import Rounding, Trials, passes, to_nearest
from lsiq.allocation.fisher import estimated_divergences
from lsiq.allocation.plan import Plan
from lsiq.allocation.refine import Refined, refined
from lsiq.allocation.solve import choose
from lsiq.allocation.units import Shapes, Unit, budget_of, units_of, without
from lsiq.data.tokens import token_hash
from lsiq.experiment.rounded_choices import by_method
from lsiq.formats.names import format_name
from lsiq.formats.placed import fixed
from lsiq.methods.base import Method, WholeMethod
from lsiq.models.loading import Model
from lsiq.runtime import processes
from lsiq.runtime.cache import ContentCache
from lsiq.runtime.sources import source_hash
from lsiq.runtime.terminal import show_progress

if TYPE_CHECKING:
    from lsiq.formats.base import WeightFormat
    from lsiq.formats.quant import QuantSettings
    from lsiq.models.block import Block

# Bytes that the streams of trials may take at once.
ROOM = 2**31


@dataclass(frozen=True)
class Sharing:
    """What bits are shared out with.

    Attributes:
        name: of the model.
        method: what rounds the model in the end.
        tokens: `(samples, T)`, on which divergences are measured.
        method_tokens: all that the method gets; None where it plays no part in what is measured.
        batch: sequences that pass through a block at once.
        cache: keeps sensitivities, choice by choice.
    """

    quant: QuantSettings
    model: Model
    name: str
    method: Method | WholeMethod
    tokens: Tensor
    method_tokens: Tensor | None
    batch: int
    seed: int
    cache: ContentCache

    @property
    def formats(self) -> list[WeightFormat]:
        """What is chosen among, scales as wide as those of `quant.weight`."""
        return choices_of(self.quant)

    def request(self) -> dict[str, Any]:
        """Return what a plan depends on, as plain data."""
        allocation = self.quant.allocate
        return {
            "model": self.name,
            "bits": allocation.bits,
            "bytes": allocation.bytes,
            "choices": list(allocation.choices),
            "formats": [str(fmt) for fmt in self.formats],
            "rules": [str(rule) for rule in self.quant.rules],
            "unit": allocation.unit,
            "measure": allocation.measure,
            "samples": len(self.tokens),
            "seqlen": self.tokens.shape[1],
            "tokens": token_hash(self.tokens),
            "seed": self.seed,
            "dtype": str(self.model.dtype),
            "sources": source_hash("allocation", "evals", "formats", "models"),
            **({"rounds": allocation.rounds} if allocation.rounds else {}),
            **({"rounding": self._method_request()} if allocation.rounding == "method" else {}),
        }

    def plan(self) -> Plan:
        """Return the plan; of several processes the first measures, and all return the same."""
        allocation, model, shapes = self.quant.allocate, self.model, shapes_of(self.model)
        rounded = self._rounding()
        fixed_formats = fixed(self.quant, model.depth, model.spec.linears)
        units = units_of(model.spec, model.depth, allocation.unit)
        free = list(without(units, fixed_formats))
        budget, _ = budget_of(self.quant, free, fixed_formats, shapes)
        sensitivity = processes.from_first(self._sensitivities(units, rounded) if processes.first() else None)
        assert sensitivity is not None
        rows = {unit.name: row for unit, row in zip(units, sensitivity.tolist(), strict=True)}
        sizes = [[unit.bits(fmt, shapes) for fmt in self.formats] for unit in free]
        selection = choose([rows[unit.name] for unit in free], sizes, budget) if free else []
        divergence = sum(rows[unit.name][index] for unit, index in zip(free, selection, strict=True))
        measured: list[float] = []
        if allocation.rounds and free:
            better = self._refined(free, rounded, selection, sizes, budget) if processes.first() else None
            better = processes.from_first(better)
            assert better is not None
            selection, measured = better.plan, better.divergences
        layers: dict[str, Any] = {name: format_name(fmt) for name, fmt in fixed_formats.items()}
        for unit, index in zip(free, selection, strict=True):
            layers |= {f"{unit.block}.{name}": format_name(self.formats[index]) for name in unit.linears}
        sensitivities = {name: dict(zip(allocation.choices, row, strict=True)) for name, row in rows.items()}
        return Plan(layers, None, divergence, sensitivities, self.request(), measured)

    def _method_request(self) -> dict[str, Any]:
        return {
            "method": self.method.name,
            "settings": {key: str(value) for key, value in asdict(self.method).items()},  # type: ignore[call-overload]
            "activation": str(self.quant.activation),
            "tokens": None if self.method_tokens is None else token_hash(self.method_tokens),
            "seed": self.seed,
            "sources": source_hash("methods", "calib", "pipeline"),
        }

    def _rounding(self) -> Rounding:
        """Return what each choice makes of a linear: rounding to nearest, or what the method makes of it."""
        if self.quant.allocate.rounding == "nearest":
            return to_nearest(self.formats)
        return by_method(self.method, self.model, self.quant, self.formats, self.method_tokens, self.batch, self.seed)

    def _sensitivities(self, units: list[Unit], rounded: Rounding) -> Tensor:
        """Return the sensitivities `(units, choices)`; what was measured before is taken from the cache."""
        request = self.request()
        columns: dict[str, Tensor] = {}
        keys = {}
        for fmt in self.formats:
            request_keys = {key: request[key] for key in ("unit", "measure", "samples", "seqlen", "tokens", "sources")}
            request_keys |= {"seed": self.seed} if self.quant.allocate.measure == "fisher" else {}
            request_keys |= {"rounding": request["rounding"]} if "rounding" in request else {}
            keys[str(fmt)] = self.cache.key(kind="sensitivity", format=str(fmt), **request_keys)
            if (entry := self.cache.read(keys[str(fmt)])) is not None:
                columns[str(fmt)] = entry.tensors["sensitivity"]
        places = [place for place, fmt in enumerate(self.formats) if str(fmt) not in columns]
        if places:
            for place, column in zip(places, measure(self, units, places, rounded).T, strict=True):
                fmt = str(self.formats[place])
                columns[fmt] = column.contiguous()
                self.cache.write(keys[fmt], {"sensitivity": columns[fmt]})
        return torch.stack([columns[str(fmt)] for fmt in self.formats], 1)

    def _refined(
        self, units: list[Unit], rounded: Rounding, selection: list[int], sizes: list[list[int]], budget: int
    ) -> Refined:
        """Return a plan that is better when measured as a whole; linears that rules decide are in float meanwhile."""
        rounds = self.quant.allocate.rounds
        steps = self.model.depth * (1 + rounds * (1 + passes(self.model, self.tokens, 2 * len(units), ROOM)))
        with show_progress("allocate", steps) as progress:
            trials = Trials(self.model, self.tokens, units, self.formats, rounded, self.batch, ROOM, progress.advance)
            return refined(selection, sizes, budget, trials.divergences, rounds)


def measure(sharing: Sharing, units: list[Unit], places: list[int], rounded: Rounding) -> Tensor:
    """Return the sensitivities of the choices at `places`, `(units, places)`."""
    model, tokens = sharing.model, sharing.tokens
    formats = [sharing.formats[place] for place in places]
    if sharing.quant.allocate.measure == "fisher":
        generator = torch.Generator().manual_seed(sharing.seed * 100_003 + 70_001)
        with show_progress("allocate", model.depth) as progress:
            return estimated_divergences(model, tokens, units, formats, generator, progress.advance)

    def at_places(block: Block, name: str, choice: int) -> Tensor:
        return rounded(block, name, places[choice])

    steps = model.depth * passes(model, tokens, len(units) * len(formats), ROOM)
    with show_progress("allocate", steps) as progress:
        return Trials(model, tokens, units, formats, at_places, sharing.batch, ROOM, progress.advance).single()


def choices_of(quant: QuantSettings) -> list[WeightFormat]:
    """Return the formats that are chosen among, scales as wide as those of `quant.weight`."""
    return [fmt.like(quant.weight) for fmt in quant.allocate.formats]


def shapes_of(model: Model) -> Shapes:
    """Return `(out, in)` of the linears of a block, by name."""
    linears = {name: model.blocks[0].get_submodule(name) for name in model.spec.linears}
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}  # type: ignore[misc]
