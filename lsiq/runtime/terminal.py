"""The terminal: a line that moves while a run lasts, and plain words beside it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator

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

from lsiq.runtime.memory import peak_bytes
from lsiq.runtime.redaction import redacted

# Results go to stdout, the story to stderr, so that a table can be piped.
OUT = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
STORY = Console(stderr=True, highlight=False)
_BRIEF = False
_TOLD: set[str] = set()


def be_brief() -> None:
    """Tell of a run in one line, when it is done, beside warnings: several runs share the terminal."""
    global _BRIEF
    _BRIEF = True


def is_brief() -> bool:
    """Whether several runs share the terminal."""
    return _BRIEF


def hush() -> None:
    """Say nothing from here on: of several processes that carry out one run, one speaks."""
    OUT.quiet = STORY.quiet = True


def warn(message: str) -> None:
    # Unescaped, "install lsiq[wandb]" would lose its brackets.
    STORY.print(f"[yellow]warning:[/] {escape(redacted(message))}", soft_wrap=True)


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


class StageProgress:
    """The progress of one stage; on a terminal a moving bar, elsewhere a line from time to time."""

    def __init__(self, progress: Progress, task: TaskID, name: str, total: int, brief: bool) -> None:
        self._progress, self._task, self._name, self._total, self._brief = progress, task, name, total, brief
        self._count, self._start, self._last_print = 0, time.perf_counter(), time.perf_counter()

    def prepare(self, note: str) -> None:
        """Something is done that all steps wait for, such as training the whole model; no step takes that time."""
        now = time.perf_counter()
        if self._count == 0:
            self._start = now
        self._log(f"{self._name}  {note}", now)

    def advance(self, note: str = "") -> None:
        """One more step is done; `note` says what came of it."""
        self._count += 1
        peak = f"peak {gib(max(peak_bytes().values()))}"
        note = f"{note}  {peak}".strip()
        self._progress.update(self._task, advance=1, note=peak if self._brief else note)
        now = time.perf_counter()
        remaining = (now - self._start) / self._count * (self._total - self._count)
        told = f"{self._name} {self._count}/{self._total}  {note}  {remaining:.0f} s left"
        self._log(told, now, at_once=self._count in (1, self._total))

    def _log(self, line: str, now: float, at_once: bool = False) -> None:
        """Print a line in the log of a batch job; at most one in ten seconds but for those `at_once`."""
        if not (STORY.is_terminal or _BRIEF) and (at_once or now - self._last_print > 10):
            self._last_print = now
            STORY.print(line, soft_wrap=True)


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
def show_progress(name: str, total: int, above: Callable[[], RenderableType] | None = None) -> Iterator[StageProgress]:
    """Show the progress of `total` steps under `name`; on a terminal with what `above` returns above the bar."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with _Shown(*columns, above=above) as progress:
        yield StageProgress(
            progress, progress.add_task(name, total=total, note=""), name, total, brief=above is not None
        )


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def new_table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left")
    for column in (first, *columns):
        table.add_column(column, justify="left" if column == first else "right", no_wrap=True)
    return table


def number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"
