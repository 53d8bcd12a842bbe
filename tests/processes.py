"""Carries out runs as one of several processes: `torchrun … processes.py FILE`, a JSON list of lists of overrides.

With `--break` the second process fails in the middle of its work.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from conftest import compose_run

from lsiq import distributed, quantize
from lsiq.errors import InputError, one_line
from lsiq.run import run


def broken(*_: Any) -> float:
    raise InputError("the second process cannot go on")


if __name__ == "__main__":
    with one_line(multirun=False), distributed.together("cpu"):
        if "--break" in sys.argv and not distributed.first():
            quantize._relative_error = broken
        for overrides in json.loads(Path(sys.argv[1]).read_text()):
            run(compose_run(*overrides))
