"""`training.tokens` in place of `training.epochs`, and sequences that training holds back: how long a method trains."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lsiq.errors import ConfigError
from lsiq.learning.schedule import TrainingSchedule, held_count
from lsiq.methods.base import chain

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig

TOKENS = "tokens for each block to train on, in place of epochs: as many whole epochs as come nearest to it, at least 1"
# What tells the settings of a training from others.
_KEYS = {"_target_", "epochs", "tokens", "batch"}
_WORD = re.compile(r"^\+{0,2}(?P<training>[\w.]+\.training)\.(?P<name>epochs|tokens)=")


def refuse_epochs_with_tokens(words: Sequence[str]) -> None:
    """Raise ConfigError where overrides give epochs and tokens of one training."""
    given: dict[str, dict[str, str]] = {}
    for word in words:
        if match := _WORD.match(word):
            value = word.partition("=")[2]
            if value not in ("null", "None"):
                given.setdefault(match["training"], {})[match["name"]] = value
    for training, values in given.items():
        if len(values) == 2:
            raise ConfigError(
                f"{training}.tokens={values['tokens']}: epochs={values['epochs']} is given as well; give one of them"
            )


def gives_tokens(method: Any) -> bool:
    """Whether something in a method's settings, as plain data, is trained for a number of tokens."""
    if isinstance(method, list):
        return any(map(gives_tokens, method))
    if not isinstance(method, Mapping):
        return False
    given = set(method) >= _KEYS and method["tokens"] is not None
    return given or any(map(gives_tokens, method.values()))


def with_epochs(method: Any, samples: int, seqlen: int, key: str = "method") -> Any:
    """Return a method's settings, as plain data, with epochs in place of `tokens` wherever something is trained.

    So a run is named and recorded by its epochs, however they were given.

    Args:
        samples: sequences that the method calibrates on; where there are none, epochs stay as they are.
        seqlen: tokens of each.

    Raises:
        ConfigError: tokens are no number above 0.
    """
    if isinstance(method, list):
        return [with_epochs(item, samples, seqlen, f"{key}[{position}]") for position, item in enumerate(method)]
    if not isinstance(method, Mapping):
        return method
    node = {name: with_epochs(value, samples, seqlen, f"{key}.{name}") for name, value in method.items()}
    if not set(node) >= _KEYS:
        return node
    tokens = node.pop("tokens")
    if tokens is not None:
        if isinstance(tokens, bool) or not isinstance(tokens, int | float) or not 0 < tokens < math.inf:
            raise ConfigError(f"{key}.tokens={tokens}: is no number above 0; expected: {TOKENS}")
        if samples and seqlen:
            node["epochs"] = max(1, math.floor(tokens / (_trained(node, samples, key) * seqlen) + 0.5))
    return node


def _trained(training: Mapping[str, Any], samples: int, key: str) -> int:
    """Return how many of the sequences are trained on."""
    if training.get("keep") != "held":
        return samples
    try:
        return samples - held_count(samples, training.get("held"))
    except ValueError as error:
        raise ConfigError(f"{key}.{error}") from error


def check_held(config: RunConfig, method_key: str) -> None:
    """Raise ConfigError where a training would hold no sequence back, or leave none to train on.

    Args:
        method_key: where the method stands in the configuration.
    """
    if config.quant.name == "fp16" or not config.calib.sequences:
        return
    for key, training in _trainings(config.method, method_key):
        try:
            training.held_back(config.calib.sequences)
        except ValueError as error:
            raise ConfigError(f"{key}.{error}") from error


def _trainings(method: Any, key: str) -> Iterator[tuple[str, TrainingSchedule]]:
    """Yield all that trains in a method and in those that it starts from or hands on to, by its key."""
    for link in chain(method):
        if isinstance(link.training, TrainingSchedule):
            yield f"{key}.training", link.training
        if (start := getattr(link, "start", None)) is not None:
            yield from _trainings(start, f"{key}.start")
        key += ".then"
