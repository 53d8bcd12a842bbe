"""The blocks of a run as a table that grows while they are quantised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from lsiq.runtime.terminal import StageProgress, new_table, number, show_progress

# Blocks that stay on the screen.
SHOWN = 8


class BlockTable:
    """Loss, error and seconds of each block; on a terminal a live table, elsewhere a line from time to time."""

    def __init__(self) -> None:
        self.stage: StageProgress
        self._rows: list[tuple[str, ...]] = []
        self._now: tuple[str, ...] = ()
        self._losses: list[float] = []

    def log(self, values: Mapping[str, float]) -> None:
        """Show how far the training of a block is, from what a method logs after an epoch."""
        for part in ("learn", "finetune"):
            if (loss := values.get(f"{part}/loss")) is not None:
                if values[f"{part}/epoch"] == 0:
                    self._losses.clear()
                self._losses.append(loss)
                epoch = f"epoch {values[f'{part}/epoch'] + 1:g}"
                self._now = (f"{values[f'{part}/block']:g}", self._course, "", epoch)
                if part == "finetune":  # of all blocks, before the first of them is done
                    self.stage.prepare(f"{epoch}  loss {self._course}")

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a finished block, as the record has it."""
        loss, error = self._course, row["error"]
        self._rows.append((str(row["index"]), loss, number(error), f"{row['seconds']:.1f} s"))
        self._losses.clear()
        self._now = ()
        self.stage.advance("  ".join([f"loss {loss}"] * bool(loss) + [f"error {number(error)}"] * (error is not None)))

    @property
    def _course(self) -> str:
        ends = dict.fromkeys([*self._losses[:1], *self._losses[-1:]])
        return " → ".join(number(loss) for loss in ends)

    def render(self) -> Table:
        table = new_table("", "block", "loss", "error", "time")
        for row in [*self._rows, *([self._now] if self._now else [])][-SHOWN:]:
            table.add_row(*row)
        return table


@contextlib.contextmanager
def block_table(depth: int, name: str = "quantize") -> Iterator[BlockTable]:
    """Show `depth` blocks as the stage `name` quantises them, with the time left and the peak memory."""
    table = BlockTable()
    with show_progress(name, depth, table.render) as table.stage:
        yield table
