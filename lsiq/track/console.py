"""The terminal: a line that moves while a run lasts, and the table it ends with."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lsiq.memory import peak_bytes
from lsiq.secrets import redacted

if TYPE_CHECKING:
    from lsiq.dryrun import Stage as PlannedStage
    from lsiq.results import Record

# Results go to stdout, the story to stderr, so that a table can be piped.
OUT = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
STORY = Console(stderr=True, highlight=False)
_BRIEF = False
_TOLD: set[str] = set()


def be_brief() -> None:
    """Tell of a run in one line, when it is done, beside warnings: several runs share the terminal."""
    global _BRIEF
    _BRIEF = True


def hush() -> None:
    """Say nothing from here on: of several processes that carry out one run, one speaks."""
    OUT.quiet = STORY.quiet = True


def warn(message: str) -> None:
    STORY.print(
        f"[yellow]warning:[/] {escape(redacted(message))}", soft_wrap=True
    )  # unescaped, lsiq[wandb] loses its bracket


def say(message: str, of_all: str | None = None) -> None:
    """Tell something of the run.

    Args:
        of_all: what is told in its place where several runs share the terminal, once by each process; None: nothing is.
    """
    if _BRIEF:
        if of_all is None or of_all in _TOLD:
            return
        _TOLD.add(of_all)
        message = of_all
    STORY.print(redacted(message), soft_wrap=True)


class Stage:
    """The progress of one stage; on a terminal a moving bar, elsewhere a line from time to time."""

    def __init__(self, progress: Progress, task: TaskID, name: str, total: int, brief: bool) -> None:
        self._progress, self._task, self._name, self._total, self._brief = progress, task, name, total, brief
        self._done, self._start, self._said = 0, time.perf_counter(), time.perf_counter()

    def advance(self, note: str = "") -> None:
        """One more step is done; `note` says what came of it."""
        self._done += 1
        peak = f"peak {gib(max(peak_bytes().values()))}"
        note = f"{note}  {peak}".strip()
        self._progress.update(self._task, advance=1, note=peak if self._brief else note)
        now = time.perf_counter()
        # Logs of batch jobs: the first and last step, and at most one line in ten seconds between.
        if not (STORY.is_terminal or _BRIEF) and (self._done in (1, self._total) or now - self._said > 10):
            self._said = now
            left = (now - self._start) / self._done * (self._total - self._done)
            STORY.print(f"{self._name} {self._done}/{self._total}  {note}  {left:.0f} s left", soft_wrap=True)


class _Shown(Progress):
    """A moving bar with something above it."""

    def __init__(self, *columns: ProgressColumn, above: Callable[[], RenderableType] | None) -> None:
        self._above = above
        super().__init__(*columns, console=STORY, transient=False, disable=_BRIEF or not STORY.is_terminal)

    def get_renderables(self) -> Iterable[RenderableType]:
        if self._above is not None:
            yield self._above()
        yield from super().get_renderables()


@contextlib.contextmanager
def stage(name: str, total: int, above: Callable[[], RenderableType] | None = None) -> Iterator[Stage]:
    """Show the progress of `total` steps under `name`; on a terminal with what `above` returns above the bar."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with _Shown(*columns, above=above) as progress:
        yield Stage(progress, progress.add_task(name, total=total, note=""), name, total, brief=above is not None)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def show_record(record: Record) -> None:
    """Print the tables a run ends with: perplexities with bits, seconds and peak memory, and accuracies.

    One line of it after `be_brief`.
    """
    model, method = record.model, record.method
    title = f"{model}  {record.setting}  {method}  seed {record.seed}"
    if _BRIEF:
        found = "".join(f"  {key} {number(record.metrics[key])}" for key in record.metrics if key.startswith("excess/"))
        OUT.print(f"{title}{found}  {record.seconds['total']:.0f} s", soft_wrap=True)
        return
    prefixes = {"float/": "float", "rtn/": "rtn", "": method}
    if not any(key.startswith("rtn/") for key in record.metrics):
        del prefixes["rtn/"]
    keys = [key.removeprefix("ppl/") for key in record.metrics if key.startswith("ppl/")]
    table = new_table(title, "corpus", *prefixes.values(), "excess", "kl", "avg bits", "seconds", "peak memory")
    bits = "—" if record.average_bits is None else f"{record.average_bits:.3f}"
    cost = (bits, f"{record.seconds['total']:.1f}", gib(max(record.peak_bytes.values())))
    for key in keys or ["(no text)"]:
        measured = [f"{prefix}ppl/{key}" for prefix in prefixes] + [f"excess/{key}", f"kl/{key}"]
        table.add_row(key, *(number(record.metrics.get(name)) for name in measured), *cost)
        cost = ("", "", "")
    OUT.print(table)
    _show_tasks(record, prefixes)
    for note in record.notes:
        OUT.print(note, soft_wrap=True)
    for key, value in record.config["model"]["published"].items():
        if key in keys:
            OUT.print(f"published float perplexity of {model}, {key}: {value}")


def show_plan(title: str, stages: Sequence[PlannedStage], record: Record, notes: Sequence[str]) -> None:
    """Print what a run would take by stage, and what that rests on."""
    places = list(record.peak_bytes)
    table = new_table(f"{title}  (estimated)", "stage", "seconds", *(f"{place} peak" for place in places))
    for stage in stages:
        peaks = (gib(stage.peaks[place]) if place in stage.peaks else "—" for place in places)
        table.add_row(stage.name, f"{stage.seconds:.1f}", *peaks)
    table.add_row("all", f"{record.seconds['total']:.1f}", *(gib(peak) for peak in record.peak_bytes.values()))
    OUT.print(table)
    for note in notes:
        OUT.print(f"assumed: {note}", soft_wrap=True)


def _show_tasks(record: Record, prefixes: dict[str, str]) -> None:
    keys = [key for key, facts in record.protocol.items() if "task_version" in facts]
    if not keys:
        return
    table = new_table("", "task", *prefixes.values())
    for key in keys:
        metric, _, task = key.partition("/")
        cells = []
        for prefix in prefixes:
            error = record.metrics.get(f"{prefix}{metric}_stderr/{task}")
            cells.append(number(record.metrics.get(f"{prefix}{key}")) + ("" if error is None else f" ± {error:.4f}"))
        table.add_row(key, *cells)
    OUT.print(table)


def new_table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left")
    for column in (first, *columns):
        table.add_column(column, justify="left" if column == first else "right", no_wrap=True)
    return table


def number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"
