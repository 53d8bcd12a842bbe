"""A tracker that can neither fail nor hold up the run: its backend works in a thread of its own."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lsiq.runtime.terminal import warn
from lsiq.track.base import Backend
from lsiq.track.run_panels import record_panels

if TYPE_CHECKING:
    from lsiq.results.record import Record
    from lsiq.track.panels import Panel
    from lsiq.track.settings import TrackerSettings


class BackgroundTracker:
    """Hands a run's story to a backend, in order, without waiting for it.

    The first failure is reported in one line, and nothing is told afterwards. At the end the run waits for the backend
    as long as `tracker.patience` allows, then goes on without it; the thread ends with the process.

    Args:
        folder: of the run; the number of rows told so far stands below it, so that a resumed run goes on there.
        anew: the run starts from nothing although it ran before: what was told then is removed.
    """

    def __init__(self, backend: Backend, settings: TrackerSettings, folder: Path, anew: bool) -> None:
        self._backend, self._settings, self._anew = backend, settings, anew
        self._folder = folder / settings.kind
        self._count = self._folder / "rows"
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._broken = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {settings.kind}", daemon=True)
        self._step, self._failed = 0, False

    def __enter__(self) -> BackgroundTracker:
        self._thread.start()
        self._tasks.put(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del error, trace
        self._failed = kind is not None
        self._tasks.put(None)
        self._thread.join(self._settings.patience)
        if self._thread.is_alive():
            self._give_up(f"did not answer within tracker.patience={self._settings.patience:g} s")

    def log(self, values: Mapping[str, float]) -> None:
        row = dict(values)
        self._tasks.put(lambda: self._backend.log(row, self._next()))

    def show(self, panels: Iterable[Panel]) -> None:
        def show_all() -> None:
            for panel in panels:
                self._backend.show(panel, self._next())

        self._tasks.put(show_all)

    def finish(self, record: Record) -> None:
        self.show(record_panels(record))
        self._tasks.put(lambda: self._backend.finish(record))

    def _open(self) -> None:
        if self._anew:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        resumed = self._count.exists()
        self._step = int(self._count.read_text()) if resumed else 0
        self._count.write_text(str(self._step))  # fails where nothing can be written, before the backend has a say
        self._backend.open(resumed)

    def _next(self) -> int:
        """The step of the next row; it is on disk before the row is told, so that none is ever used twice."""
        step, self._step = self._step, self._step + 1
        self._count.write_text(str(self._step))
        return step

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if not self._broken.is_set():
                self._attempt(task)
        self._attempt(lambda: self._backend.close(self._failed))

    def _attempt(self, task: Callable[[], object]) -> None:
        try:
            task()
        except ImportError as error:
            self._give_up(f"cannot be imported ({error}; install lsiq[{self._settings.kind}])")
        except Exception as error:  # whatever a tracker does, the run goes on  # noqa: BLE001
            self._give_up(f"failed ({type(error).__name__}: {' '.join(str(error).split())})")

    def _give_up(self, reason: str) -> None:
        if not self._broken.is_set():  # one line is enough
            self._broken.set()
            warn(f"tracker={self._settings.kind} {reason}; the run goes on without it")
