"""The program: `lsiq` where the package is installed, `python run.py` in a checkout.

lsiq model=tiny-llama method=lsi        one run; -m for several (lsiq --help lists groups and settings)
lsiq report …                           lists, shows and compares finished runs; --html writes a page
lsiq compare RUN RUN …                  the same as: lsiq report compare RUN RUN …
lsiq tables [collect|agree] …           draws tables and figures from records
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lsiq.cli.messages import one_line, reporting, while_read
from lsiq.experiment.run import run
from lsiq.runtime.folders import conf_folder, user_folder
from lsiq.runtime.hydra_entry import version_base
from lsiq.runtime.plugins import find_in
from lsiq.runtime.processes import together
from lsiq.runtime.signals import terminable
from lsiq.runtime.terminal import be_brief
from lsiq.sweeps.jobs import refuse_engines
from lsiq.sweeps.ledger import Ledger

# First words that are no setting: the module whose `main` reads the rest, and words put before the rest.
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "report": ("lsiq.report.__main__", []),
    "compare": ("lsiq.report.__main__", ["compare"]),
    "tables": ("lsiq.tables.render", []),
    "tables collect": ("lsiq.tables.collect", []),
    "tables agree": ("lsiq.tables.agree", []),
}


@hydra.main(config_path=str(conf_folder()), config_name="config", **version_base())
def carry_out(cfg: DictConfig) -> float | None:
    """Carry out the job that hydra composed; return what a search minimises."""
    hydra_config = HydraConfig.get()
    job, multirun = hydra_config.overrides.task, hydra_config.mode == RunMode.MULTIRUN
    with terminable(), one_line(multirun), together(cfg.device, multirun):
        if not multirun:
            refuse_engines(hydra_config.runtime.choices)
        elif hydra_config.runtime.choices["hydra/launcher"] == "processes":
            be_brief()
        record = run(cfg, job)
        if multirun:
            Ledger(hydra_config, cfg.paths.cache).remember(job, cfg, record)
        return record.objective


def main() -> None:
    """Do what the words on the command line say, as long as somebody reads the answer."""
    with while_read():
        _answer()


def _answer() -> None:
    # Torch's threads spin while they wait for each other; beside other work on the same cores that takes ten times as
    # long as sleeping does. Read when torch is imported, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for words in (2, 1):
        if command := COMMANDS.get(" ".join(sys.argv[1 : 1 + words])):
            module, before = command
            sys.argv[1 : 1 + words] = before
            importlib.import_module(module).main()
            return
    find_in(Path.cwd())
    folder = user_folder()
    if folder is not None and not any(word.split("=")[0] in ("--config-dir", "-cd") for word in sys.argv):
        sys.argv += ["--config-dir", str(folder)]
    with reporting(conf_folder()):
        carry_out()
