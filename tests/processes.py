"""Carries out runs as one of several processes: `torchrun … processes.py FILE`, a JSON list of lists of overrides."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conftest import compose_run

from lsiq.distributed import together
from lsiq.run import run

if __name__ == "__main__":
    with together("cpu"):
        for overrides in json.loads(Path(sys.argv[1]).read_text()):
            run(compose_run(*overrides))
