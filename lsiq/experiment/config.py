"""The configuration of one run, as checked settings."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Annotated, Any

from omegaconf import DictConfig
from pydantic import AfterValidator, Field

from lsiq.data.settings import CalibSettings
from lsiq.errors import ConfigError
from lsiq.evals.settings import EvalSettings
from lsiq.experiment.composed import method_key, named_config
from lsiq.experiment.rounded_choices import check_rounding
from lsiq.export.base import Exporter, refuse_method
from lsiq.formats.key_value import refuse_padded
from lsiq.formats.quant import QuantSettings
from lsiq.methods.base import Method, WholeMethod
from lsiq.methods.finetune import FineTune
from lsiq.models.settings import ModelSettings
from lsiq.runtime.settings import PathSettings
from lsiq.settings import build, fill, settings
from lsiq.track.settings import TrackerSettings


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("no such device")
    return value


@settings
class RunConfig:
    """Everything that decides what one run does."""

    model: ModelSettings
    quant: QuantSettings
    method: Method | WholeMethod
    calib: CalibSettings
    eval: EvalSettings
    tracker: TrackerSettings
    paths: PathSettings
    seed: int = Field(0, ge=0, lt=2**63, description="a whole number from 0")
    device: Annotated[str, AfterValidator(_device)] = Field("auto", description="auto, cpu, cuda or cuda:N")
    force: bool = Field(False, description="true or false")
    trace: bool = Field(False, description="true or false")
    dry_run: bool = Field(False, description="true estimates memory and time, and stops there")
    export: Exporter | None = Field(None, description="a format of conf/export/, or null")

    def __post_init__(self) -> None:
        if self.export is not None:
            self.export.check(self.quant)
            if self.model.weights == "random":
                raise ValueError("model.weights=random: there is nothing to export; give a checkpoint")
            if self.model.outliers:
                raise ValueError(
                    f"model.outliers={self.model.outliers}: is an exercise that is not exported; use model.outliers=0"
                )
            refuse_method(self.method, self.export)
        if (
            isinstance(self.method, FineTune)
            and self.method.scales
            and not all(fmt.trains_steps or fmt.bits == 16 for fmt in self.quant.formats)
        ):
            raise ValueError(
                f"method.scales={self.method.scales}: step sizes of quant={self.quant.name} are stored in a few "
                "bits and cannot be trained; use method.scales=null or an integer format"
            )
        check_rounding(self.quant, self.method)
        if (rounded := list(self.quant.outside())) and (reason := self._why_outside_stays()):
            raise ValueError(f"quant.rules: {rounded[0]} cannot be rounded {reason}; leave that rule out")
        refuse_padded(self.quant.kv, self.eval.tasks)
        who = "quant.allocate" if self.quant.allocate.active else self._who_calibrates()
        if self.calib.corpus is None and not self.calib.written and who is not None:
            raise ValueError(
                f"calib.corpus=null: {who} needs calibration tokens; choose calib=bundled, calib=written or calib=file"
            )

    @property
    def calibrates(self) -> bool:
        """Whether numbers depend on calibration tokens; otherwise a few serve to measure the error of each block."""
        return self._who_calibrates() is not None

    def _who_calibrates(self) -> str | None:
        """What needs calibration tokens, or None."""
        if self.quant.name == "fp16":
            return None
        if self.method.needs:
            return f"method {self.method.name}"
        return "quant.kv.scale=calibrated" if self.quant.kv.calibrated else None

    def _why_outside_stays(self) -> str | None:
        """Why embeddings and head have to stay as they are, or None."""
        if self.eval.tasks:
            return "where tasks are measured, whose answers are scored with the float head"
        if isinstance(self.method, WholeMethod):
            return f"by method={self.method.name}, which compares outputs of the float head"
        return None

    def check_lengths(self, limit: int | None, prefix: int = 0) -> None:
        """Raise ConfigError where a window, after `prefix` tokens, is longer than the `limit` positions of a model."""
        calibrates = self.calib.corpus is not None or self.calib.written
        lengths = {"calib.seqlen": self.calib.seqlen} if calibrates else {}
        lengths |= {"eval.seqlen": self.eval.seqlen} if self.eval.corpora else {}
        if limit is None:
            return
        most = limit - prefix
        if long := [f"{key}={seqlen}" for key, seqlen in lengths.items() if seqlen > most]:
            after = f" and the prefix takes {prefix}" if prefix else ""
            raise ConfigError(
                f"{' and '.join(long)}: the model has {limit} positions{after}; use at most {most} "
                f"(model.seqlen={most} sets both where neither is given)"
            )


def with_formats(config: RunConfig, quant: QuantSettings) -> RunConfig:
    """Return the settings with other number formats, all rules checked again.

    Raises:
        ConfigError: they do not fit the rest.
    """
    return fill(RunConfig, {field.name: getattr(config, field.name) for field in fields(config)} | {"quant": quant})


_PARTS: dict[str, type] = {
    "model": ModelSettings,
    "quant": QuantSettings,
    "calib": CalibSettings,
    "eval": EvalSettings,
    "tracker": TrackerSettings,
    "paths": PathSettings,
}


def parse(cfg: DictConfig) -> RunConfig:
    """Check a composed configuration and return it as settings.

    Raises:
        ConfigError: a key, value or combination that cannot run; the message names it by its full path.
    """
    plain = named_config(cfg)
    values: dict[str, Any] = {}
    place = method_key(cfg, plain.get("quant"))
    for key, node in plain.items():
        built = build(node, place if key == "method" else key)
        if key in _PARTS and not isinstance(built, dict):
            raise ConfigError(f"{key}={built}: a group of settings is expected; choose a file of conf/{key}/")
        values[key] = fill(_PARTS[key], built, key) if key in _PARTS else built
    if not isinstance(values.get("method"), (Method, WholeMethod)):
        raise ConfigError(f"method={plain.get('method')}: not a method; choose a file of conf/method/")
    if not isinstance(values.get("export"), Exporter | None):
        raise ConfigError(f"export={plain.get('export')}: not an export; choose a file of conf/export/")
    try:
        return fill(RunConfig, values)
    except ConfigError as error:  # of a recipe the keys are those of its family
        raise ConfigError(str(error).replace("method.", f"{place}.")) from error
