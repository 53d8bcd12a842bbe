"""The configuration of one run, as checked settings."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from omegaconf import DictConfig
from pydantic import AfterValidator, Field

from lsiq.calib.corpora import CORPORA
from lsiq.composed import named_config, recipe_family
from lsiq.errors import ConfigError
from lsiq.export.base import Exporter, refuse_method
from lsiq.formats import ActivationFormat, WeightFormat
from lsiq.formats.integer import Integer
from lsiq.formats.mxint import MXActivation, MXInt
from lsiq.methods.base import Method, WholeMethod
from lsiq.methods.finetune import FineTune
from lsiq.settings import build, fill, settings

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", description="letters, digits and . _ + -")]


def _corpus(name: str) -> str:
    if name not in CORPORA:
        raise ValueError(f"no such corpus (there are {', '.join(CORPORA)})")
    return name


def _task_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise ValueError("not the name of a task (letters, digits and . _ + -)")
    return name


TaskName = Annotated[str, AfterValidator(_task_name), Field(description="a task of lm-evaluation-harness by name")]
Corpus = Annotated[str, AfterValidator(_corpus), Field(description="a corpus by name; file reads a path of yours")]


@settings
class ModelSettings:
    """Which weights a run quantises. `path` wins over `bundled`, then `package`, then `hub`."""

    name: Name = Field(description="how records and tables call the model")
    path: str | None = Field(None, description="a folder with config.json and safetensors weights, or a GGUF file")
    bundled: Literal["tiny-llama", "tiny-opt"] | None = Field(None, description="tiny-llama or tiny-opt")
    package: str | None = Field(None, description="an installed Python package that holds the model as a GGUF file")
    hub: str | None = Field(None, description="a repository of the Hugging Face hub, owner/name")
    revision: str = Field("main", description="a branch, tag or commit of the hub repository")
    weights: Literal["checkpoint", "random"] = Field(
        "checkpoint", description="checkpoint, or random: the true shape without a download, for speed and memory"
    )
    architecture: dict[str, Any] | None = Field(None, description="transformers configuration used by weights=random")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto (float32 on a CPU, half precision on a GPU), float32, bfloat16 or float16"
    )
    seqlen: int = Field(ge=8, description="tokens per window for calibration and evaluation, at least 8")
    allow_pickle: bool = Field(False, description="true reads .bin files (weights only) where no safetensors exist")
    outliers: int = Field(
        0, ge=0, description="giant channels planted between linears without changing the function; 0 for none"
    )
    outlier_strength: float = Field(30.0, gt=0, description="how many times as large planted channels are, above 0")
    published: dict[str, float] = Field(default_factory=dict, description="float perplexities by corpus@seqlen")

    def __post_init__(self) -> None:
        if self.weights == "random" and self.architecture is None and self.path is None and self.bundled is None:
            raise ValueError(
                "weights=random: needs model.architecture or a model.path whose config.json gives the shape"
            )
        if self.weights == "checkpoint" and not (self.path or self.bundled or self.package or self.hub):
            raise ValueError("path=null: no checkpoint is named; set model.path, or choose a model with a hub entry")


@settings
class QuantSettings:
    """The number formats of the linears in every block."""

    weight: WeightFormat = Field(description="a _target_ under lsiq.formats with its settings: Integer or MXInt")
    activation: ActivationFormat = Field(
        description="a _target_ under lsiq.formats with its settings: Activation or MXActivation"
    )

    def __post_init__(self) -> None:
        if self.weight.bits == 16 and self.activation.active:
            raise ValueError(
                f"weight.bits=16: float weights with activations of {self.activation.bits} bits are no setting here; "
                "use quant.weight.bits=8 or less, or quant=fp16"
            )

    @property
    def name(self) -> str:
        """The field's name of the setting, such as w4a16g128; made from the formats, so an override cannot belie it.

        Blocks say -mxint; activations in another format than the weights add theirs.
        """
        if self.weight.bits == 16 and self.activation.bits == 16:
            return "fp16"
        blocks = isinstance(self.weight, MXInt)
        name = f"w{self.weight.bits}a{self.activation.bits}{'-' if blocks else ''}{self.weight.suffix}"
        if not self.activation.active:
            return name
        if isinstance(self.activation, MXActivation):
            return name if self.activation.suffix == self.weight.suffix else f"{name}-a{self.activation.suffix}"
        return f"{name}-aint" if blocks else name


@settings
class CalibSettings:
    """The tokens that methods learn from."""

    corpus: Corpus | None = Field(description="a corpus by name, or null for methods that need no data")
    path: str | None = Field(None, description="the text to read for corpus=file, or a local copy of a hub corpus")
    fields: list[str] = Field(["text"], min_length=1, description="the fields of a jsonl line that hold text")
    samples: int = Field(128, ge=1, le=1_000_000, description="sequences drawn, at least 1")
    written: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="sequences that the float model writes itself, besides those drawn; 0 for none",
    )
    seqlen: int = Field(ge=8, description="tokens per sequence, at least 8")
    batch: int = Field(8, ge=1, description="sequences that pass through a block at once, at least 1")
    windows: Literal["disjoint", "random"] = Field(
        "random", description="disjoint (no token is drawn twice) or random (windows may overlap)"
    )

    def __post_init__(self) -> None:
        if self.corpus == "file" and self.path is None:
            raise ValueError("path=null: corpus=file reads a text of yours; give calib.path=FILE (txt, txt.xz, jsonl)")


@settings
class EvalSettings:
    """What is measured on the float and the quantised model."""

    corpora: list[Corpus] = Field(description="corpora by name, or an empty list to measure nothing")
    path: str | None = Field(None, description="the text to read for the corpus named file")
    local: dict[str, str | None] = Field(default_factory=dict, description="local copies of hub corpora, by name")
    fields: list[str] = Field(["text"], min_length=1, description="the fields of a jsonl line that hold text")
    seqlen: int = Field(ge=8, description="tokens per window, at least 8")
    batch: int = Field(8, ge=1, description="windows that pass through a block at once, at least 1")
    rtn: bool = Field(True, description="true measures round-to-nearest beside the method")
    windows: int | None = Field(None, ge=1, description="measure only the first windows; null measures all")
    divergence: bool = Field(True, description="true compares with the float model token by token")
    tasks: list[TaskName] = Field(default_factory=list, description="tasks of lm-evaluation-harness by name, or empty")
    tasks_local: dict[str, str | None] = Field(
        default_factory=dict, description="by task, a jsonl file of its items instead of the hub's data"
    )
    items: int | None = Field(None, ge=1, description="measure only the first items of each task; null measures all")

    def __post_init__(self) -> None:
        if "file" in self.corpora and self.path is None:
            raise ValueError("path=null: eval=file reads a text of yours; give eval.path=FILE (txt, txt.xz, jsonl)")
        for name, path in self.local.items():
            if path is not None and name not in self.corpora:
                raise ValueError(f"local.{name}={path}: {name} is not among eval.corpora={self.corpora}")
        for name, path in self.tasks_local.items():
            if path is not None and name not in self.tasks:
                raise ValueError(f"tasks_local.{name}={path}: {name} is not among eval.tasks={self.tasks}")


@settings
class TrackerSettings:
    """Where the story of a run is told besides its record."""

    kind: Literal["wandb", "tensorboard", "none"] = Field("wandb", description="wandb, tensorboard or none")
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto (online when logged in, else offline), online, offline or disabled"
    )
    project: str = Field("lsiq", min_length=1, description="the project that runs are filed under")
    group: str | None = Field(None, description="the study a run belongs to")
    tags: list[str] = Field(default_factory=list, description="a list of words, besides the model's and the format's")
    panels: int = Field(
        4, ge=0, description="linears, evenly spread over the network, that get panels of their own, at least 0"
    )
    patience: float = Field(
        60.0, gt=0, description="seconds that the end of a run waits for a tracker before it goes on without it"
    )
    upload: float = Field(
        256.0, ge=0, description="MiB of quantised blocks that are kept as an artifact; more are named by their path"
    )

    def __post_init__(self) -> None:
        if self.kind != "wandb" and self.mode in ("online", "offline"):
            raise ValueError(f"mode={self.mode}: tracker={self.kind} knows no network; use mode=auto or mode=disabled")


@settings
class PathSettings:
    runs: str = Field("runs", min_length=1, description="the folder that holds one folder per run")
    streams: Literal["memory", "disk"] = Field(
        "memory", description="memory, or disk: in files of the run's folder while it lasts, for large models"
    )
    cache: str | None = Field("runs/cache", description="the folder of what runs share; null keeps nothing")
    locks: str | None = Field(
        "runs/locks", description="the folder of the locks that keep two processes from one run; null for none"
    )


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
        if isinstance(self.method, FineTune) and self.method.scales and not isinstance(self.quant.weight, Integer):
            raise ValueError(
                f"method.scales={self.method.scales}: step sizes of quant={self.quant.name} are powers of two and "
                "cannot be trained; use method.scales=null or an integer format"
            )
        calib = self.calib
        if calib.corpus is None and not calib.written and self.method.needs and self.quant.name != "fp16":
            raise ValueError(
                f"calib.corpus=null: method {self.method.name} needs calibration tokens; "
                "choose calib=bundled, calib=written or calib=file"
            )


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
    family = recipe_family(cfg.get("method"), plain.get("quant"))
    method_key = "method" if family is None else f"method.{family}"
    for key, node in plain.items():
        built = build(node, method_key if key == "method" else key)
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
        raise ConfigError(str(error).replace("method.", f"{method_key}.")) from error
