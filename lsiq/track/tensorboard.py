"""TensorBoard."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.track.panels import Histograms, Lines, Panel, markdown

if TYPE_CHECKING:
    from lsiq.results.record import Record
    from lsiq.track.settings import TrackerSettings


class TensorBoard:
    """Event files below the run's folder. Tables are texts; a family of lines is a chart of its own.

    The steps of a chart's lines are the values of its axis; those of histograms are 0 before and 1 after.
    """

    def __init__(self, settings: TrackerSettings, plain: Mapping[str, Any], record: Record, folder: Path) -> None:
        self._folder, self._id = folder / "tensorboard", record.run_id
        words = {"group": settings.group, "tags": settings.tags, "model": record.model, "setting": record.setting}
        self._about = {**words, "method": record.method, "config": plain}
        self._charts: dict[str, dict[str, list[str | Sequence[str]]]] = {}
        self._writer: Any = None

    def open(self, resumed: bool) -> None:
        del resumed  # event files of one folder are one run
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder))
        about = json.dumps(self._about, indent=2, default=str)
        self._writer.add_text("run", f"**{self._id}**\n\n```json\n{about}\n```", 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, panel: Panel, step: int) -> None:
        if isinstance(panel, Lines):
            self._show_lines(panel)
        elif isinstance(panel, Histograms):
            for moment, counts in enumerate((panel.before, panel.after)):
                self._show_counts(panel.name, panel.edges, counts, moment)
        else:
            self._writer.add_text(panel.name, markdown(panel), step)

    def finish(self, record: Record) -> None:
        numbers = {"record/average_bits": record.average_bits}
        numbers |= {f"record/{name}": value for name, value in record.metrics.items() if name.startswith("ppl/")}
        for name, value in numbers.items():
            if value is not None:
                self._writer.add_scalar(name, value, 0)

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.add_text("status", "failed" if failed else "finished", 0)
            self._writer.add_custom_scalars(self._charts)
            self._writer.close()

    def _show_lines(self, panel: Lines) -> None:
        section, _, title = panel.name.partition("/")
        tags = [f"{panel.name}/{line}" for line in panel.lines]
        # A chart names its lines by regular expressions, and `block 1` would otherwise find `block 10` as well.
        lines = [f"{re.escape(tag)}$" for tag in tags]
        self._charts.setdefault(section, {})[f"{title} over {panel.axis}"] = ["Multiline", lines]
        for tag, line in zip(tags, panel.lines.values(), strict=True):
            for x, y in zip(panel.x, line, strict=True):
                if y is not None:
                    self._writer.add_scalar(tag, y, int(x))

    def _show_counts(self, name: str, edges: Sequence[float], counts: Sequence[float], moment: int) -> None:
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        total = sum(count * middle for count, middle in zip(counts, middles, strict=True))
        squares = sum(count * middle**2 for count, middle in zip(counts, middles, strict=True))
        self._writer.add_histogram_raw(
            name, edges[0], edges[-1], sum(counts), total, squares, list(edges[1:]), list(counts), moment
        )
