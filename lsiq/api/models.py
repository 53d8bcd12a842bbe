"""Float models: bundled, from a folder or the hub by name, or a model of transformers that is in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lsiq.cli.compose import compose
from lsiq.errors import ConfigError, InputError
from lsiq.evals.block_pass import run_blocks
from lsiq.experiment.config import parse
from lsiq.models.folder import find_folder
from lsiq.models.loading import Model, load
from lsiq.models.settings import ModelSettings
from lsiq.runtime.device import find_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Tokens per window of a model whose configuration file names none: what most published tables use.
_SEQLEN = 2048


@dataclass(frozen=True)
class FloatModel:
    """A causal language model in float, and where it came from.

    Attributes:
        model: its blocks are read one at a time.
        settings: as in conf/model/.
        folder: of its checkpoint; None for a model in memory.
        module: the model of transformers that it was made of, where it is in memory.
    """

    model: Model
    settings: ModelSettings
    folder: Path | None
    module: PreTrainedModel | None = None

    def __repr__(self) -> str:
        # The fields hold a whole model, which would fill pages of a notebook.
        kind = f"{self.model.spec.model_type}, {self.model.depth} blocks"
        return f"FloatModel({self.name}, {kind}, {self.model.dtype} on {self.model.device})"

    @property
    def name(self) -> str:
        """What records and exports call it."""
        return self.settings.name

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, of transformers."""
        return self.model.tokenizer

    @property
    def seqlen(self) -> int:
        """Tokens per window, unless somebody asks for others."""
        return self.settings.seqlen

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits `(batch, T, vocabulary)`, float32, for token ids `(batch, T)`."""
        outputs = run_blocks(self.model, {"": [ids]}, {"": lambda block: block.with_weights({})}, lambda: None)
        return self.model.logits(outputs[""][0])

    def on_disk(self, folder: Path) -> FloatModel:
        """Return the same model with a checkpoint: its own, or one that is written to `folder` for it."""
        if self.folder is not None:
            return self
        if self.module is None:
            raise InputError(f"{self.name}: has random weights; only a real checkpoint can be exported")
        self.module.save_pretrained(folder)
        if self.tokenizer is None:
            raise InputError(f"{self.name}: has no tokenizer, which an export holds; give load_model one")
        self.tokenizer.save_pretrained(folder)
        return replace(self, folder=folder, settings=replace(self.settings, path=str(folder)))


class MemoryCheckpoint:
    """The tensors of a module in memory, by name."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """Return a tensor on the CPU, in its own dtype; InputError if missing or of another shape."""
        if name not in self._tensors or self._tensors[name].shape != shape:
            raise InputError(f"{name}: the model in memory has no such tensor of shape {tuple(shape)}")
        return self._tensors[name].detach().cpu()

    def check_unchanged(self) -> None:
        """Nothing is checked: who trains the model while it is quantised knows it."""


def load_model(
    source: str | Path | PreTrainedModel, *overrides: str, tokenizer: Any = None, device: str = "auto", seed: int = 0
) -> FloatModel:
    """Return a float model, ready to be quantised or measured.

    Args:
        source: a name of conf/model/ (`tiny-llama`, `opt-125m`), a checkpoint's folder, or a model of transformers in
            memory, which stays as it is.
        overrides: as on the command line: `"model.dtype=bfloat16"`.
        tokenizer: of a model in memory; None where all texts are given as token ids.
        device: auto, cpu, cuda or cuda:N.
        seed: draws random weights where `model.weights=random` asks for them.

    Raises:
        ConfigError: no such name or setting.
        InputError: the checkpoint is missing, damaged or of an unsupported family.
    """
    if isinstance(source, nn.Module):
        return _in_memory(source, overrides, tokenizer, device)
    text = str(source)
    local = isinstance(source, Path) or "/" in text or Path(text).expanduser().exists()
    words = (f"model.path={text}", f"model.name={_safe(Path(text).name)}") if local else (f"model={text}",)
    settings = _settings(*words, *overrides)
    folder = find_folder(settings)
    model = load(settings, folder, find_device(device), seed)
    return FloatModel(model if tokenizer is None else replace(model, tokenizer=tokenizer), settings, folder)


def _in_memory(module: Any, overrides: tuple[str, ...], tokenizer: Any, device: str) -> FloatModel:
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise ConfigError(
            f"{type(module).__name__}: is no model of transformers; give one with a config, such as "
            "AutoModelForCausalLM.from_pretrained(…)"
        )
    longest = min(getattr(config, "max_position_embeddings", None) or _SEQLEN, _SEQLEN)
    name = _safe(Path(getattr(config, "_name_or_path", "") or config.model_type).name)
    settings = _settings("model.weights=random", f"model.name={name}", f"model.seqlen={longest}", *overrides)
    settings = replace(settings, bundled=None, architecture=config.to_dict())
    model = load(settings, None, find_device(device), 0, MemoryCheckpoint(module))
    settings = replace(settings, weights="checkpoint", path="memory")
    return FloatModel(replace(model, tokenizer=tokenizer), settings, None, module)


def _settings(*words: str) -> ModelSettings:
    return parse(compose(*words, "method=rtn", "calib=none", "eval=none", "tracker=none")).model


def _safe(name: str) -> str:
    """Return a name that records allow: letters, digits and . _ + -."""
    letters = "".join(letter if letter.isalnum() or letter in "._+-" else "-" for letter in name).lstrip("._+-")
    return letters or "model"
