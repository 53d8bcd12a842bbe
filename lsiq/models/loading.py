"""Loading: from the settings of a model to its skeleton, its lazily read weights and its tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lsiq.assets import bundled_model
from lsiq.errors import InputError
from lsiq.formats.cache_scales import CacheScales
from lsiq.models.attention import NAME
from lsiq.models.block import Block
from lsiq.models.checkpoint import Checkpoint, RandomCheckpoint, open_checkpoint
from lsiq.models.entrance import enter, for_kind, kinds_of_blocks
from lsiq.models.families import find_spec, refuse_other_kinds
from lsiq.models.folder import find_tokenizer, read_config
from lsiq.models.gguf_file import is_gguf
from lsiq.models.gguf_tokenizer import read_tokenizer
from lsiq.models.outliers import PlantedOutliers
from lsiq.models.prefix import BlockPrefix, ModelPrefix, after_prefix
from lsiq.models.residual import rotate_block
from lsiq.models.spec import ModelSpec, check_supported
from lsiq.runtime import streams

if TYPE_CHECKING:
    from lsiq.models.settings import ModelSettings


@dataclass(frozen=True)
class Model:
    """A causal language model whose blocks are read from the checkpoint one at a time.

    Attributes:
        config: the transformers configuration.
        spec: what is known of the family.
        skeleton: the transformers model; embeddings, final norm and head are real, the blocks stay on the meta device.
        checkpoint: where weights are read from.
        tokenizer: of transformers.
        device, dtype: where and in which precision blocks run.
        planting: outliers that the float model is given on purpose; None for the model as it is.
        residual: `(d, d)`, what rotates the residual stream between embeddings and final norm; None for nothing.
        prefix: tokens whose keys and values stand before those of every sequence; None for none.
        float_skeleton: the skeleton with embeddings and head as they were, where those of `skeleton` are rounded.
        cache_scales: by block, those of the float model's keys and values, where scales are calibrated; else None.
    """

    config: Any
    spec: ModelSpec
    skeleton: nn.Module
    checkpoint: Checkpoint
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    planting: PlantedOutliers | None = None
    residual: Tensor | None = None
    prefix: ModelPrefix | None = None
    float_skeleton: nn.Module | None = None
    cache_scales: tuple[CacheScales, ...] | None = None

    @property
    def as_float(self) -> Model:
        """The model with embeddings and head as the checkpoint has them."""
        return self if self.float_skeleton is None else replace(self, skeleton=self.float_skeleton, float_skeleton=None)

    @property
    def limit(self) -> int | None:
        """How many tokens a sequence may have, those of a prefix counted; None where nothing limits it."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def positions(self) -> int | None:
        """How many tokens a sequence may have after the prefix; None where nothing limits it."""
        return self.limit if self.limit is None or self.prefix is None else self.limit - len(self.prefix.tokens)

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """How each block attends; empty where all attend alike."""
        return kinds_of_blocks(self.config)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers of transformers, on the meta device."""
        return self.skeleton.get_submodule(self.spec.blocks)  # type: ignore[return-value]

    def block(self, index: int, kwargs: Mapping[str, Any]) -> Block:
        """Read one block's weights onto the device; `kwargs` come from `embed`."""
        module = self.blocks[index]
        weights = {
            # Moved first, widened there: half as many bytes travel to a GPU.
            name: self.checkpoint.read(f"{self.spec.blocks}.{index}.{name}", parameter.shape)
            .to(self.device)
            .to(torch.float32)
            for name, parameter in module.named_parameters()
        }
        unfoldable = self.spec.why_not_foldable(self.config)
        kind = self.kinds[index] if self.kinds else ""
        block = Block(module, self.spec, index, weights, for_kind(kwargs, kind), self.dtype, unfoldable, kind=kind)
        if self.planting is not None:
            block = replace(block, weights=self.planting.apply(block.weights, self.spec, block.head_dim))
        if self.residual is not None:
            block = replace(block, weights=rotate_block(block.weights, self.spec, self.residual))
        if self.prefix is not None:
            hidden = self.rotated(self.prefix.hidden[index].to(self.device)[None])
            block = replace(block, prefix=BlockPrefix(hidden, for_kind(self.prefix.kwargs, block.kind)))
        return block if self.cache_scales is None else replace(block, cache_scales=self.cache_scales[index])

    def rotated(self, hidden: Tensor) -> Tensor:
        """Return what enters the first block `(…, d)` in the coordinates of this model's residual stream."""
        return hidden if self.residual is None else (hidden.float() @ self.residual).to(hidden.dtype)

    def rotated_back(self, hidden: Tensor) -> Tensor:
        """Return what left the last block `(…, d)` in the coordinates of the float model, on the device it is on."""
        if self.residual is None:
            return hidden
        return (hidden.to(self.device).float() @ self.residual.t()).to(hidden.device, hidden.dtype)

    @torch.no_grad()
    def with_prefix(self, tokens: Tensor) -> Model:
        """Return the model with `tokens (P,)` before every sequence, read once by the float model."""
        plain = replace(self, residual=None, prefix=None)
        hidden, kwargs = plain.enter(input_ids=tokens[None].to(self.device))
        states = []
        for index in range(self.depth):
            states.append(hidden[0].float().cpu())
            hidden = plain.block(index, kwargs).with_weights({})(hidden)
        return replace(self, prefix=ModelPrefix(tokens, torch.stack(states), kwargs))

    @torch.no_grad()
    def embed(self, tokens: Tensor, batch: int) -> tuple[Tensor, dict[str, Any]]:
        """Return what enters the first block, `(N, T, d)` on the CPU, and the blocks' keyword arguments at batch 1.

        Args:
            tokens: `(N, T)` token ids.
            batch: sequences embedded at once.
        """
        before = 0 if self.prefix is None else len(self.prefix.tokens)
        if self.prefix is not None:
            tokens = torch.cat([self.prefix.tokens.expand(len(tokens), -1), tokens], 1)
        _, kwargs = self.enter(input_ids=tokens[:1].to(self.device))
        if self.prefix is not None:
            kwargs = after_prefix(kwargs, self.prefix)
        hidden: Tensor | None = None
        for start in range(0, len(tokens), batch):
            entered, _ = self.enter(False, input_ids=tokens[start : start + batch].to(self.device))
            part = self.rotated(entered[:, before:])
            if hidden is None:
                # Pinned memory is dear to ask for (0.15 s on a machine with an H200): not for one batch.
                pinned = self.device.type == "cuda" and len(tokens) > batch
                hidden = streams.empty((len(tokens), *part.shape[1:]), part.dtype, pinned)
            hidden[start : start + batch] = part
            streams.release(hidden)
        assert hidden is not None  # there are tokens
        return hidden, kwargs

    def enter(self, every_kind: bool = True, **inputs: Any) -> tuple[Tensor, dict[str, Any]]:
        """Return what enters the first block, and the blocks' keyword arguments, for inputs of the skeleton.

        Args:
            every_kind: false gives the arguments of the first block's kind only.
        """
        return enter(self.skeleton, list(self.blocks), self.kinds if every_kind else (), inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `(batch, T, vocabulary)` in float32 of what left the last block; differentiable."""
        base = self.skeleton.get_submodule(self.spec.blocks.rpartition(".")[0])
        hidden = self.rotated_back(hidden.to(self.device))
        for name in ("norm", "final_layer_norm", "project_out"):
            if isinstance(module := getattr(base, name, None), nn.Module):
                hidden = module(hidden)
        logits = self.skeleton.get_output_embeddings()(hidden)  # type: ignore[operator]
        return (logits if self.spec.logits is None else self.spec.logits(logits, self.config)).float()


def load(
    settings: ModelSettings,
    folder: Path | None,
    device: torch.device,
    seed: int,
    checkpoint: Checkpoint | None = None,
    tokenizer: Any = None,
) -> Model:
    """Return the model of `settings` with its blocks still on disk.

    Args:
        checkpoint: where weights are read from; None for what the settings name.
        tokenizer: None for what the settings name.

    Raises:
        InputError: an unsupported family, a damaged or incomplete checkpoint, a tokenizer that does not load.
    """
    config = _config(settings, folder)
    where = str(folder or settings.name)
    spec = find_spec(config.model_type, where)
    check_supported(config, where)
    if checkpoint is None:
        if settings.weights == "random" or folder is None:
            checkpoint = RandomCheckpoint(seed)
        else:
            checkpoint = open_checkpoint(folder, settings.allow_pickle)
    dtype = _dtype(settings.dtype, device, config)
    planting = _planting(settings, config, spec)
    try:
        skeleton = _skeleton(config, spec, checkpoint, device, dtype)
    except InputError:
        raise
    except Exception as error:  # transformers meets some of what is wrong only while it builds
        kind = type(error).__name__
        raise InputError(f"{where}: config.json makes no model ({kind}: {error}); fetch it again") from error
    if tokenizer is None:
        tokenizer = load_tokenizer(find_tokenizer(settings, folder))
    return Model(config, spec, skeleton, checkpoint, tokenizer, device, dtype, planting)


def _planting(settings: ModelSettings, config: Any, spec: ModelSpec) -> PlantedOutliers | None:
    if not settings.outliers:
        return None
    if (reason := spec.why_not_foldable(config)) is not None:
        raise InputError(f"model.outliers={settings.outliers}: none can be planted in this model, for {reason}")
    channels = config.num_key_value_heads if hasattr(config, "num_key_value_heads") else config.num_attention_heads
    channels *= getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if settings.outliers > channels:
        raise InputError(f"model.outliers={settings.outliers}: this model's values have {channels} channels; use fewer")
    return PlantedOutliers(settings.outliers, settings.outlier_strength)


def _dtype(name: str, device: torch.device, config: Any) -> torch.dtype:
    """`auto`: float32 on a CPU; on a GPU bfloat16 for models trained in it (float16 may overflow), else float16."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if config.dtype == torch.bfloat16 else torch.float16


def _config(settings: ModelSettings, folder: Path | None) -> Any:
    from transformers import AutoConfig

    try:
        if folder is not None:
            raw = read_config(folder)
            refuse_other_kinds(raw, str(folder))
            find_spec(raw["model_type"], str(folder))  # before transformers, whose message lists every architecture
        else:
            raw = dict(settings.architecture or {})
        return AutoConfig.for_model(**raw)
    except InputError:
        raise
    except Exception as error:  # transformers checks configurations with errors of many kinds
        raise InputError(f"{folder or settings.name}: config.json cannot be used ({error}); fetch it again") from error


def load_tokenizer(folder: Path | None) -> Any:
    """Load the tokenizer of a folder or a GGUF file; `folder=None` stands for the bundled one, which shapes borrow.

    Raises:
        InputError: it does not load.
    """
    from transformers import AutoTokenizer

    where = folder or bundled_model("tiny-llama")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on other classes of tokenizer
            if is_gguf(where):
                return read_tokenizer(where)
            return AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(
            f"{where}: the tokenizer cannot be loaded ({error}); put its files beside the weights"
        ) from error


def _skeleton(
    config: Any, spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Build the model without weights, then give real ones to all that lies outside the blocks."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=NAME).eval()
    _fill_buffers(skeleton, device)
    state = {
        name: checkpoint.read(name, parameter.shape).to(device, dtype)
        for name, parameter in skeleton.named_parameters()  # tied parameters appear once, under their first name
        if not name.startswith(f"{spec.blocks}.")
    }
    skeleton.load_state_dict(state, strict=False, assign=True)
    skeleton.tie_weights()
    for parameter in skeleton.parameters():
        parameter.requires_grad_(False)
    return skeleton


def _fill_buffers(skeleton: nn.Module, device: torch.device) -> None:
    """Compute rotary frequencies and embedding scales, which are in no checkpoint, as transformers does.

    Parameters are on the meta device still, so initialising the modules leaves them alone.
    """
    for module in skeleton.modules():
        meta = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in meta.items():
            setattr(module, name, torch.empty_like(buffer, device=device))
        if meta:
            skeleton._init_weights(module)  # type: ignore[operator]
