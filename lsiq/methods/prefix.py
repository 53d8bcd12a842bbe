"""Prefix: a few outlier tokens in the key-value cache before every sequence; `then` quantises the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from lsiq.errors import InputError
from lsiq.methods.base import Method
from lsiq.methods.wrapper import Wrapper
from lsiq.models.context import Need
from lsiq.settings import settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lsiq.models.loading import Model


@settings
class Prefix(Wrapper):
    """Put the tokens with giant activations in the key-value cache before every sequence, in float.

    A token is an outlier where the largest |input| of some block's last linear is above `threshold` times the median
    of all tokens. The most frequent ones are taken, as many as a sequence has on average and at most `count`; `bos`
    adds the token that texts begin with, at the end. `tokens` names the whole prefix instead. With them in the cache,
    fewer outliers arise among the tokens that are quantised. Where no token is an outlier, `bos` alone remains.

    The prefix is part of the quantised model only: records compare it with the float model without a prefix, and
    `prefixed/…` measures the float model with it. Both streams of the calibration have it.

    Source: PrefixQuant (arXiv 2410.05265, section 4.1 and 4.2).
    Deviation: PrefixQuant keeps the float model's keys and values; here they are made from the float model's states
    by the quantised projections, unrounded, so that scales and rotations folded into these hold for the prefix. The
    first token of a sequence is not counted, for it is an outlier wherever it stands.
    """

    threshold: float = Field(64.0, gt=1, description="times the median from which a token is an outlier, above 1")
    count: int = Field(4, ge=0, le=64, description="outlier tokens at most, without the first one, 0 to 64")
    bos: bool = Field(True, description="true puts the token that texts begin with in the prefix as well")
    samples: int = Field(16, ge=1, description="calibration sequences searched for outlier tokens, at least 1")
    tokens: list[int] | None = Field(
        None, min_length=1, description="token ids to use instead of searching, or null to search"
    )
    then: Method = Field(description="the method that quantises the model after the prefix")
    label, reads, at_inference = "prefix", frozenset[Need]({"inputs"}), "a prefix in its key-value cache"

    def __post_init__(self) -> None:
        if self.tokens is None and not self.count and not self.bos:
            raise ValueError("count=0: without bos no token is left for the prefix; set bos=true or count=1 or more")

    def prepare_model(self, model: Model, tokens: Tensor | None, batch: int, generator: torch.Generator) -> Model:
        """Return the model after its prefix.

        Raises:
            InputError: a token that the model does not have, no token to use, or a prefix before a prefix.
        """
        import torch

        del generator
        if model.prefix is not None:
            raise InputError("method: prefix stands in its own then; one prefix is all there is, leave the other out")
        assert tokens is not None  # the method asks for a stream
        prefix = self.tokens if self.tokens is not None else self._search(model, tokens, batch)
        vocabulary = model.config.vocab_size
        if unknown := [token for token in prefix if not 0 <= token < vocabulary]:
            raise InputError(
                f"method.tokens: {unknown[0]} is not a token of the model; there are 0 to {vocabulary - 1}"
            )
        return model.with_prefix(torch.tensor(prefix))

    def _search(self, model: Model, tokens: Tensor, batch: int) -> list[int]:
        from lsiq.calib.outlier_tokens import outlier_tokens

        prefix = outlier_tokens(model, tokens[: self.samples], batch, self.threshold)[: self.count]
        if self.bos:
            first = model.tokenizer.bos_token_id
            if first is None:
                raise InputError("method.bos=true: the tokenizer has no token that texts begin with; set it to false")
            prefix = [*(token for token in prefix if token != first), first]
        if not prefix:
            raise InputError(
                f"method.threshold={self.threshold}: no token of {min(self.samples, len(tokens))} sequences is an "
                "outlier; lower it, set method.bos=true or name the method.tokens"
            )
        return prefix
