"""The model as lm-evaluation-harness sees it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lsiq.errors import InputError
from lsiq.evals.likelihood import Likelihoods, Pair

# Window of the rolling likelihood where a model names no limit of its own; as the harness has it.
_WINDOW = 2048


class BlockLM(TemplateLM):
    """Answers the harness' requests with likelihoods that were measured block by block.

    Contexts and continuations are tokenised by the harness' own code, with the special tokens that the tokenizer adds
    by default, so that items are the same as under the harness' `hf` model.
    """

    def __init__(
        self, tokenizer: Any, positions: int | None, likelihoods: Callable[[Sequence[Pair]], Likelihoods]
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._positions, self._likelihoods = positions, likelihoods
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
        found = self._measure([(context, continuation) for _, context, continuation in requests])
        return list(zip(found.log_likelihood.tolist(), found.greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """The log likelihood of whole texts, in windows as long as the model's positions."""
        del disable_tqdm
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._positions or _WINDOW, 1)
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((context, continuation))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, value in zip(owners, self._measure(pairs).log_likelihood.tolist(), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse: `load_tasks` lets only tasks through that rank or score answers."""
        del disable_tqdm
        raise InputError(f"eval.tasks: {len(requests)} requests ask for generated text, which is not measured here")

    def _measure(self, pairs: Sequence[Pair]) -> Likelihoods:
        with contextlib.redirect_stderr(self._stderr):  # the harness is kept quiet, our progress is not
            return self._likelihoods(pairs)
