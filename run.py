"""Run, compare and reproduce post-training quantisation: `python run.py --help`."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lsiq.distributed import together
from lsiq.errors import one_line, reporting
from lsiq.run import run


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    with one_line(multirun), together(cfg.device, multirun):
        return run(cfg, HydraConfig.get().overrides.task).objective


if __name__ == "__main__":
    with reporting(Path(__file__).parent / "conf"):
        main()
