"""Greedy decoding: what a model writes after its prompts, with the keys and values of earlier tokens kept.

A token needs every block, so all of them lie on the device at once, unlike in the other evaluations; which model is too
large for that is said before anything is quantised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lsiq.errors import InputError, ResourceError
from lsiq.evals.block_pass import FunctionOf
from lsiq.evals.windows import Variant
from lsiq.models.entrance import CACHE
from lsiq.models.loading import Model
from lsiq.models.prefix import after_prefix
from lsiq.runtime import processes
from lsiq.runtime.cache import ContentCache
from lsiq.runtime.memory import host_bytes
from lsiq.runtime.micro_batch import MicroBatch

# Of the memory that is free, what the blocks of a model may take; the rest is for keys, values and activations.
_SHARE = 0.8


@dataclass(frozen=True)
class Prompt:
    """What is asked of a model.

    Attributes:
        tokens: what it reads.
        stops: texts that end the answer where they appear in it.
        limit: the number of tokens that it may write.
    """

    tokens: tuple[int, ...]
    stops: tuple[str, ...]
    limit: int


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """A hash of all that is asked, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(f"{prompt.tokens}{prompt.stops}{prompt.limit}".encode())
    return digest.hexdigest()


def check_room(model: Model) -> None:
    """Raise ResourceError where the blocks of the model do not fit the device together."""
    parameters = [parameter.numel() for block in model.blocks for parameter in block.parameters()]
    needed = sum(parameters) * model.dtype.itemsize
    room = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else host_bytes()
    if needed > _SHARE * room:
        raise ResourceError(
            f"eval.tasks: tasks that generate text need all blocks of the model at once, {needed / 2**30:.1f} GiB of "
            f"{room / 2**30:.1f} GiB on {model.device}; leave them out, or use a larger device or model.dtype=bfloat16"
        )


def write_answers(
    model: Model,
    prompts: Sequence[Prompt],
    variant: Variant,
    batch_tokens: int,
    cache: ContentCache,
    progress: Callable[[int], Callable[[], None]],
) -> tuple[list[list[int]], Mapping[str, str] | None]:
    """Return the tokens that one model writes after each prompt, and where they come from if from the cache.

    Args:
        batch_tokens: how many tokens, read and written, the sequences of a batch may have together.
        progress: called with the number of prompts; returns what to call after each.

    Raises:
        InputError: a prompt and its answer have no place in the model's positions.
    """
    name = variant.cache_name
    key = cache.key(kind="answers", prompts=hash_prompts(prompts), reference=name, batch_tokens=batch_tokens)
    private = variant.reference is None
    entry = None if name is None else cache.read(key, private)
    if entry is not None:
        cached_answers = [[token for token in row if token >= 0] for row in entry.tensors["answers"].tolist()]
        return cached_answers, None if private else entry.origin
    answers = _write(variant.prepared or model, prompts, variant.function_of, batch_tokens, progress)
    if name is not None:
        rows = [torch.tensor(answer, dtype=torch.int32) for answer in answers]
        table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        cache.write(key, {"answers": table}, private)
    return answers, None


def _write(
    model: Model,
    prompts: Sequence[Prompt],
    function_of: FunctionOf,
    batch_tokens: int,
    progress: Callable[[int], Callable[[], None]],
) -> list[list[int]]:
    writer = Writer(model, function_of)
    # Longest first, so that little of a batch is padding; prompts with one limit end together.
    order = sorted(range(len(prompts)), key=lambda index: (-prompts[index].limit, -len(prompts[index].tokens)))
    batches = _batches([(index, prompts[index]) for index in order], batch_tokens)
    advance = progress(len(batches))
    indexed_answers: list[tuple[int, list[int]]] = []
    for batch in batches[processes.share(len(batches))]:
        answers = _fitting(writer, [prompt for _, prompt in batch])
        indexed_answers += zip((index for index, _ in batch), answers, strict=True)
        advance()
    by_index = dict(pair for part in processes.gather(indexed_answers) for pair in part)
    return [by_index[index] for index in range(len(prompts))]


def _batches(prompts: Sequence[tuple[int, Prompt]], tokens: int) -> list[list[tuple[int, Prompt]]]:
    batches: list[list[tuple[int, Prompt]]] = []
    widest = 0
    for index, prompt in prompts:
        width = max(widest, len(prompt.tokens) + prompt.limit)
        if not batches or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
            width = len(prompt.tokens) + prompt.limit
        batches[-1].append((index, prompt))
        widest = width
    return batches


def _fitting(writer: Writer, prompts: Sequence[Prompt]) -> list[list[int]]:
    micro = MicroBatch(len(prompts), "writing answers")
    return micro.fitting(
        lambda: [answer for part in micro.parts(len(prompts)) for answer in writer.write(prompts[part])]
    )


class Writer:
    """A whole model on its device: a function for each of its blocks.

    Args:
        model: whose embeddings, norm and head are used, and whose float blocks are given to `function_of`.
        function_of: turns a float block into the one to run.

    Raises:
        InputError: a prefix before blocks with windows, out of whose caches it would fall.
    """

    @torch.no_grad()
    def __init__(self, model: Model, function_of: FunctionOf) -> None:
        if model.prefix is not None and any(DynamicCache(config=model.config).is_sliding):
            raise InputError(
                "eval.tasks: text is not generated after a prefix by a model with windows, out of which the prefix "
                "falls; leave tasks that generate or the prefix out"
            )
        self.model = model
        self.functions = [function_of(model.block(index, {})) for index in range(model.depth)]
        self.ends = _ends(model)

    @torch.no_grad()
    def write(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the likeliest next tokens of each prompt up to its end, one after another.

        An answer ends with a token that ends texts, behind a stop or at its limit; what ended it is part of it.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        open_ = set(range(len(prompts)))
        state = self._read(prompts)
        while open_:
            tokens = state.logits.argmax(-1)
            for row, token in enumerate(tokens.tolist()):
                if row in open_:
                    answers[row].append(token)
                    if self._is_finished(prompts[row], answers[row]):
                        open_.remove(row)
            if open_:
                self._next(state, tokens)
        return answers

    def _is_finished(self, prompt: Prompt, answer: Sequence[int]) -> bool:
        if answer[-1] in self.ends or len(answer) >= prompt.limit:
            return True
        # A token holds a byte at least; some more, since a character may be cut in two where the tail begins.
        tail = answer[-(max((len(stop.encode()) for stop in prompt.stops), default=0) + 4) :]
        return bool(prompt.stops) and any(stop in self.model.tokenizer.decode(tail) for stop in prompt.stops)

    def _read(self, prompts: Sequence[Prompt]) -> _State:
        """Read the prompts, padded on the left, behind the model's prefix."""
        model, device = self.model, self.model.device
        width = max(len(prompt.tokens) for prompt in prompts)
        self._check_rotary(width, max(prompt.limit for prompt in prompts))
        padding = [width - len(prompt.tokens) for prompt in prompts]
        tokens = torch.tensor([[0] * pad + list(p.tokens) for pad, p in zip(padding, prompts, strict=True)])
        mask = (torch.arange(width) >= torch.tensor(padding)[:, None]).long()
        if model.prefix is not None:
            count = len(prompts)
            tokens = torch.cat([model.prefix.tokens.expand(count, -1), tokens], 1)
            mask = torch.cat([mask.new_ones(count, len(model.prefix.tokens)), mask], 1)
        state = _State(DynamicCache(config=model.config), mask.to(device))
        positions = (state.mask.cumsum(1) - 1).clamp(min=0)
        hidden, kwargs = model.enter(input_ids=tokens.to(device), attention_mask=state.mask, position_ids=positions)
        if model.prefix is not None:
            hidden, kwargs = hidden[:, len(model.prefix.tokens) :], after_prefix(kwargs, model.prefix)
        state.logits = self._through(hidden, kwargs, state)
        return state

    def _check_rotary(self, width: int, limit: int) -> None:
        """Raise InputError where LongRoPE would change its frequencies, and with them all keys, within an answer."""
        rotary = getattr(self.model.config, "rope_parameters", None) or {}
        change = rotary.get("original_max_position_embeddings") if rotary.get("rope_type") == "longrope" else None
        before = 0 if self.model.prefix is None else len(self.model.prefix.tokens)
        if change is not None and before + width <= change < before + width + limit:
            raise InputError(
                f"eval.tasks: an answer of {limit} tokens after {before + width} goes beyond {change}, where this "
                "model changes its rotary embedding (LongRoPE); leave the task out"
            )

    def _next(self, state: _State, tokens: Tensor) -> None:
        """Read the tokens `(batch,)` that were chosen."""
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(tokens), 1)], 1)
        positions = state.mask.sum(1, keepdim=True) - 1
        cache: dict[str, Any] = {CACHE: state.cache}
        hidden, kwargs = self.model.enter(
            input_ids=tokens[:, None], attention_mask=state.mask, position_ids=positions, **cache
        )
        state.logits = self._through(hidden, kwargs, state)

    def _through(self, hidden: Tensor, kwargs: Mapping[str, Any], state: _State) -> Tensor:
        arguments = {**kwargs, CACHE: state.cache}
        hidden = self.model.rotated(hidden)
        for function in self.functions:
            hidden = function(hidden, arguments)
        return self.model.logits(hidden[:, -1:])[:, 0]


class _State:
    """Where decoding is: keys and values, the mask `(batch, T)` of tokens that count, the logits of the next ones."""

    logits: Tensor

    def __init__(self, cache: DynamicCache, mask: Tensor) -> None:
        self.cache, self.mask = cache, mask


def _ends(model: Model) -> set[int]:
    """Return the tokens that end texts: of the configuration, the tokenizer and `generation_config.json`."""
    ends = [model.tokenizer.eos_token_id, getattr(model.config, "eos_token_id", None)]
    folder = getattr(model.checkpoint, "folder", None)
    if folder is not None and (file := Path(folder) / "generation_config.json").is_file():
        ends.append(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))
    return {token for entry in ends if entry is not None for token in (entry if isinstance(entry, list) else [entry])}
