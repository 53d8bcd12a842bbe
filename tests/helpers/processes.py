"""Carries out runs as one of several processes: `torchrun … processes.py FILE`, a JSON list of lists of overrides.

With `--break` the second process fails in the middle of its work.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lsiq.cli.compose import compose
from lsiq.cli.messages import one_line
from lsiq.errors import InputError
from lsiq.experiment.run import run
from lsiq.pipeline import block_loop
from lsiq.runtime import processes


def broken(*_: Any) -> float:
    raise InputError("the second process cannot go on")


if __name__ == "__main__":
    with one_line(multirun=False), processes.together("cpu"):
        if "--break" in sys.argv and not processes.first():
            block_loop._relative_error = broken
        for overrides in json.loads(Path(sys.argv[1]).read_text()):
            run(compose(*overrides))
