"""Commands carried out in forks of one process that has imported the command line, which is most of what they cost.

Each line read is a command in JSON; each line written says how it ended. See helpers/commands.py.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
from typing import IO, Any

from helpers.parsed import parse_once
from hydra.core.plugins import Plugins

from lsiq.cli.compose import compose
from lsiq.cli.main import main
from lsiq.experiment.config import parse

# What starts with every command, and what none of them may find imported already.
SECONDS, LATE = 300, {"torch", "transformers", "numpy", "huggingface_hub", "datasets", "wandb"}


def become(command: dict[str, Any], out: IO[bytes], err: IO[bytes]) -> None:
    """Make this process the one that the command would have started."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["environment"])
    sys.path[:0] = command["paths"]
    sys.argv = command["words"]
    signal.alarm(SECONDS)  # ends it if it waits


def serve() -> None:
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                become(json.loads(line), out, err)
                main()
                return  # as a process ends whose program has: with what it raised, or with 0
            _, status, used = os.wait4(child, 0)
            ended = {"code": os.waitstatus_to_exitcode(status), "seconds": used.ru_utime + used.ru_stime}
            for name, file in (("out", out), ("err", err)):
                file.seek(0)
                ended[name] = file.read().decode()
        print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    parse_once()
    Plugins.instance()  # hydra looks for its plug-ins, once for all commands
    parse(compose())  # what is imported late is there, too
    assert not LATE & set(sys.modules), sorted(LATE & set(sys.modules))
    gc.collect()
    gc.freeze()  # a fork would look through all of it and, marking what it sees, copy its memory
    serve()
