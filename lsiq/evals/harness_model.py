"""The model as lm-evaluation-harness sees it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lsiq.errors import InputError
from lsiq.evals.generation import Prompt
from lsiq.evals.likelihood import Likelihoods, Pair

# Window of the rolling likelihood where a model names no limit of its own; as the harness has it.
_WINDOW = 2048
# Tokens that an answer may have where its task does not say; as the harness has it.
_LIMIT = 256
Write = Callable[[Sequence[Prompt]], Sequence[Sequence[int]]]


def limit_of(settings: Mapping[str, Any]) -> int:
    """Return how many tokens an answer may have by a task's settings of generation."""
    options: Mapping[str, Any] = dict(normalize_gen_kwargs(dict(settings), _LIMIT))
    return options["max_gen_toks"]


def no_place(limit: int, positions: int, task: str = "its task") -> str:
    return f"eval.tasks: an answer of {limit} tokens has no place in a model of {positions} positions; leave out {task}"


class BlockLM(TemplateLM):
    """Answers the harness' requests with likelihoods that were measured block by block, or with what a model writes.

    Contexts and continuations are tokenised by the harness' own code, with the special tokens that the tokenizer adds
    by default, so that items are the same as under the harness' `hf` model.
    """

    def __init__(
        self,
        tokenizer: Any,
        positions: int | None,
        likelihoods: Callable[[Sequence[Pair]], Likelihoods],
        write: Write,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._positions, self._likelihoods, self._write = positions, likelihoods, write
        self._stderr = sys.stderr

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context stands for."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        del kwargs
        if add_special_tokens is None:
            # A text that begins with the special token already does not get a second one.
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(list(requests), disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        likelihoods = self._measure([(context, continuation) for _, context, continuation in requests])
        return list(zip(likelihoods.log_likelihood.tolist(), likelihoods.greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        """The log likelihood of whole texts, in windows as long as the model's positions.

        lm-eval 0.4 asks with `(text,)` and takes a number. 0.5 asks with `("", text)` and takes it beside a False, as
        it takes likelihoods of answers beside whether they are the greedy ones.
        """
        del disable_tqdm
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[-1])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._positions or _WINDOW, 1)
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((context, continuation))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, value in zip(owners, self._measure(pairs).log_likelihood.tolist(), strict=True):
            sums[owner] += value
        return [
            (value, False) if len(request.args) > 1 else value for request, value in zip(requests, sums, strict=True)
        ]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """The likeliest texts after the requests' contexts, token by token, cut where a stop appears.

        A context that leaves no place for the answer loses its beginning, as in the harness' `hf` model.
        """
        del disable_tqdm
        prompts = [self._prompt(*request.args) for request in requests]
        with contextlib.redirect_stderr(self._stderr):
            answers = self._write(prompts)
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        return [
            postprocess_generated_text(text, list(prompt.stops), None)
            for text, prompt in zip(texts, prompts, strict=True)
        ]

    def _prompt(self, context: str, settings: Mapping[str, Any]) -> Prompt:
        options: Mapping[str, Any] = dict(normalize_gen_kwargs(dict(settings), _LIMIT))
        stops = options["until"]
        end = self.tokenizer.decode([self.eot_token_id])
        limit = options["max_gen_toks"]
        if self._positions is not None and limit >= self._positions:
            raise InputError(no_place(limit, self._positions))
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        prompt_tokens = tokens if self._positions is None else tokens[-(self._positions - limit) :]
        return Prompt(tuple(prompt_tokens), tuple(dict.fromkeys([*filter(None, stops), end])), limit)

    def _measure(self, pairs: Sequence[Pair]) -> Likelihoods:
        with contextlib.redirect_stderr(self._stderr):  # the harness is kept quiet, our progress is not
            return self._likelihoods(pairs)
