"""Puts a page together and writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq import __version__
from lsiq.report.page import several, story
from lsiq.report.page.content import Page
from lsiq.report.page.sources import Source, gather
from lsiq.report.runs import notes
from lsiq.results.record import origin_note
from lsiq.runtime.files import write_text
from lsiq.track.panels import Table, cell_text, right_aligned

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATE = "page.html"
# Characters of a cell that stand in one line.
_LONG = 48
# Models that the title names.
_NAMED = 3


def write_page(runs: Path, named: Sequence[str], out: Path | None, level: float = 0.95) -> Path:
    """Write the page of the runs that are meant, and return where it lies.

    Args:
        runs: the folder that ids and studies are looked up in.
        named: see `lsiq.report.page.sources.gather`.
        out: the file; by default `report.html` in the folder of a single run, or here for several.
    """
    sources = gather(runs, named)
    page = make_page(sources, level)
    if out is None:
        folder = sources[0].folder if len(sources) == 1 else None
        out = (folder or Path()) / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(page))
    return out


def make_page(sources: Sequence[Source], level: float) -> Page:
    """Return the page of one run, or of several."""
    remarks = notes(source.record for source in sources if source.record)
    remarks += [
        origin_note(source.run.model, source.run.weights_from)
        for source in sources
        if source.record is None and source.run.weights_from
    ]
    if len(sources) == 1 and sources[0].record is not None and sources[0].folder is not None:
        record, folder = sources[0].record, sources[0].folder
        sections, omitted = story.story(record, folder, level)
        title = f"{record.model} · {record.setting} · {record.method} · seed {record.seed}"
        lead = [f"{record.run_id}, {record.status}, {record.created[:16].replace('T', ' ')} UTC"]
        lead += [record.error] if record.error else []
        return Page(title, [*lead, *remarks], story.figures(record), sections, omitted)
    sections, omitted = several.comparison(sources, level)
    models = list(dict.fromkeys(source.run.model for source in sources))
    title = f"{len(sources)} runs of {', '.join(models) if len(models) <= _NAMED else f'{len(models)} models'}"
    return Page(title, list(dict.fromkeys(remarks)), several.figures(sources), sections, omitted)


def render(page: Page) -> str:
    """Return the page as HTML."""
    return _environment().get_template(_TEMPLATE).render(page=page, version=__version__)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader

    places = resources.files("lsiq.report.page") / "template"

    def source(name: str) -> str:
        return (places / name).read_text(encoding="utf-8")

    environment = Environment(loader=FunctionLoader(source), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"json": _json, "cell": cell_text, "kinds": _kinds}
    environment.globals |= {"asset": _asset, "ids": _Ids}
    return environment


def _kinds(table: Table) -> list[str]:
    """The class of each column's cells: `n` for numbers, `w` for text that is too long for one line."""
    kinds = []
    for place, number in enumerate(right_aligned(table)):
        longest = max((len(cell_text(row[place])) for row in table.rows), default=0)
        kinds.append("n" if number else "w" * (longest > _LONG))
    return kinds


def _json(value: Any) -> Any:
    """Return plain data as JSON that can stand in a script element."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _asset(name: str) -> Any:
    """Return one of the package's own files as it is."""
    from markupsafe import Markup

    text = (resources.files("lsiq.report.page") / "template" / name).read_text(encoding="utf-8")
    assert "</script" not in text.lower()
    return Markup(text)


class _Ids:
    """Numbers for the ids of elements, unique on a page."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        self._last += 1
        return self._last
