"""Exporters by name, and small models for them to write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.configuration import CONF
from helpers.models import load_small
from omegaconf import OmegaConf

from lsiq.calib.cache_range import measure_scales
from lsiq.data.tokens import random_windows
from lsiq.errors import LsiqError
from lsiq.export.base import Exporter
from lsiq.export.source import Source
from lsiq.formats.quant import QuantSettings
from lsiq.models.block import run_stream
from lsiq.models.rounding import round_to_nearest
from lsiq.results.memory_store import MemoryStore
from lsiq.settings import build


def exporter_of(name: str) -> Exporter:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / "export" / f"{name}.yaml"))
    return build(node)


EXPORTERS = sorted(file.stem for file in (CONF / "export").glob("*.yaml"))


def source_of(quant: QuantSettings, checkpoint: Path) -> Source:
    """A small model, rounded to nearest, its keys and values calibrated on a few tokens where a format asks for it."""
    model, store = load_small(checkpoint), MemoryStore()
    hidden, kwargs = model.embed(random_windows(model.config.vocab_size, 2, 32, 0), batch=2)
    for index in range(model.depth if quant.weight.bits < 16 else 0):
        block = model.block(index, kwargs)
        result = round_to_nearest(block, quant)
        if quant.kv.calibrated:
            scales = measure_scales(block, result, hidden, 2, quant.activation, quant.kv)
            result = replace(result, cache_scales=scales)
            hidden = run_stream(block.with_result(result, quant.running), hidden, 2, model.device)
        store.write(index, result)
    return Source(model, store, quant, checkpoint)


def refusal(exporter: Exporter, source: Source) -> str | None:
    """Return what is said before anything is written of numbers or a model that the layout cannot hold."""
    try:
        exporter.check(source.quant)
        exporter.check_model(source)
    except (ValueError, LsiqError) as error:
        return str(error)
    return None
