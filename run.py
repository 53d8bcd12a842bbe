"""Run, compare and reproduce post-training quantisation: `python run.py --help`."""

import os
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lsiq.distributed import together
from lsiq.errors import one_line, reporting
from lsiq.interrupt import terminable
from lsiq.run import run
from lsiq.sweeps.jobs import refuse_engines
from lsiq.sweeps.ledger import Ledger
from lsiq.track.console import be_brief


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
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


if __name__ == "__main__":
    # Torch's threads spin while they wait for each other; beside other work on the same cores that takes several
    # times as long as sleeping does. Read when torch is imported, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with reporting(Path(__file__).parent / "conf"):
        main()
