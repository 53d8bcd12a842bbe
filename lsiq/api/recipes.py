"""Number formats, methods and calibration texts by the names that the command line has for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lsiq.cli.compose import compose
from lsiq.data.settings import CalibSettings
from lsiq.errors import ConfigError
from lsiq.experiment.composed import method_key, plain_config
from lsiq.experiment.config import parse
from lsiq.experiment.training_length import gives_tokens, refuse_epochs_with_tokens, with_epochs
from lsiq.formats.quant import QuantSettings
from lsiq.methods.base import Method, WholeMethod
from lsiq.settings import describe_settings

# Groups that the composed configuration of a single part leaves at their plainest.
_ASIDE = ("eval=none", "tracker=none")


def format(name: str, *overrides: str) -> QuantSettings:
    """Return the number formats of a file of conf/quant/, such as `w3a16g128`.

    Args:
        overrides: as on the command line: `"quant.weight.symmetric=true"`.

    Raises:
        ConfigError: no such file, or a setting that it does not have or allow.
    """
    return parse(compose(f"quant={name}", "method=rtn", *_ASIDE, *overrides)).quant


@dataclass(frozen=True)
class Recipe:
    """A method of conf/method/ that is not built yet: some methods depend on the number formats.

    Attributes:
        name: of the file.
        overrides: words as on the command line.
        values: settings of the method or of its training, by name.
    """

    name: str
    overrides: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    def method(self, quant: QuantSettings, shape: tuple[int, int] | None = None) -> Method | WholeMethod:
        """Return the method's settings for models quantised to `quant`.

        Args:
            shape: of the calibration tokens, `(N, T)`, from which epochs follow where `tokens` to train on are given.

        Raises:
            ConfigError: as for `recipe`, or tokens are given and no shape.
        """
        cfg = compose(f"method={self.name}", "eval=none", "tracker=none", *self.overrides)
        cfg.quant = {"weight": describe_settings(quant.weight), "activation": describe_settings(quant.activation)}
        key = method_key(cfg, plain_config(cfg)["quant"])
        node = OmegaConf.select(cfg, key)
        refuse_epochs_with_tokens([*self.overrides, *_as_words(self.values, key)])
        for name, value in self.values.items():
            _set(node, self.name, name, value)
        plain = OmegaConf.to_container(node, resolve=True)
        if gives_tokens(plain):
            if shape is None:
                raise ConfigError(
                    "tokens: epochs follow from them and the calibration tokens; hand the recipe to lsiq.quantize, or "
                    "give epochs"
                )
            OmegaConf.update(cfg, key, with_epochs(plain, *shape), merge=False)
        return parse(cfg).method


def recipe(name: str, *overrides: str, **values: Any) -> Recipe:
    """Return a method of conf/method/ with some of its settings changed.

    Args:
        overrides: as on the command line: `"method.training.batch=4"`.
        values: settings of the method, or else of its training: `epochs=5`.

    Raises:
        ConfigError: no such method or setting, or a value that it does not allow. Of methods whose recipe depends on
            the number formats, values are checked once these are known.
    """
    refuse_epochs_with_tokens([*overrides, *_as_words(values, "method")])
    compose(f"method={name}", *_ASIDE, *overrides)  # so that a wrong name is said at once
    return Recipe(name, overrides, values)


def _as_words(values: Mapping[str, Any], key: str) -> list[str]:
    """Return settings of the training of the method at `key` as the command line would have them."""
    return [f"{key}.training.{name}={value}" for name, value in values.items()]


def _set(node: DictConfig, method: str, name: str, value: Any) -> None:
    """Set a setting of a composed method or of its training."""
    for place in (node, node.get("training")):
        if place is not None and name in place:
            place[name] = value
            return
    keys = [str(key) for key in node if key not in ("_target_", "training")]
    keys += [str(key) for key in node.get("training") or () if key != "_target_"]
    raise ConfigError(f"{name}={value}: method {method} has no such setting; it has {', '.join(keys)}")


@dataclass(frozen=True)
class Calibration:
    """A calibration text of conf/calib/ whose tokens are not drawn yet: that takes a model's tokenizer.

    Attributes:
        name: of the file.
        overrides: words as on the command line.
        values: settings of the group by name.
        seed: draws the sequences.
    """

    name: str
    overrides: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def settings(self, seqlen: int) -> CalibSettings:
        """Return the settings for a model whose windows are `seqlen` tokens long, unless the values say otherwise."""
        cfg = compose(f"calib={self.name}", f"model.seqlen={seqlen}", *_ASIDE, *self.overrides)
        for name, value in self.values.items():
            if name not in cfg.calib:
                keys = ", ".join(str(key) for key in cfg.calib)
                raise ConfigError(f"{name}={value}: calib={self.name} has no such setting; it has {keys}")
            OmegaConf.update(cfg.calib, name, value)
        return parse(cfg).calib


def tokens(name: str, *overrides: str, seed: int = 0, **values: Any) -> Calibration:
    """Return a calibration text of conf/calib/, such as `bundled` or `file`, to be drawn with `seed`.

    Args:
        overrides: as on the command line: `"calib.batch=4"`.
        values: settings of the group: `samples=32`, `seqlen=512`, `path="train.txt"`.

    Raises:
        ConfigError: no such text or setting, or a value that it does not allow.
    """
    calibration = Calibration(name, overrides, values, seed)
    calibration.settings(512)  # so that a wrong name is said at once
    return calibration
