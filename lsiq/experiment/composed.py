"""What hydra composed, as the plain data that is checked, named and recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from lsiq.errors import ConfigError
from lsiq.experiment.training_length import with_epochs

INTEGERS = "lsiq.formats.activation.Activation"
FAMILIES = {"weight_only", "weight_activation", "wide_blocks", "narrow_blocks"}
WIDE = 32  # channels under a scale; where there are fewer, rotating them does harm (docs/formats.md)


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Return `cfg` as plain data, interpolations resolved.

    A local checkpoint takes its folder's name unless it was given one, so that records do not carry the name of the
    model whose group file happened to be the default. A model with planted outliers says so in its name. Of a method
    that has a recipe for each family of formats only the one that is carried out remains. Parts stand in a list, in the
    order in which they act: this is what records hold and what names a run.
    """
    return listed_parts(named_config(cfg))


def named_config(cfg: DictConfig) -> dict[str, Any]:
    """Return the same as `plain_config`, but with the parts of learned methods by their names in the files."""
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; give it as {error.full_key}=…") from error
    assert isinstance(plain, dict)
    plain.pop("from", None)  # says whose settings these are, and is none of them
    plain["method"] = recipe_for(method_in_epochs(plain), plain.get("quant"))
    model = plain.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        model.update(bundled=None, hub=None, published={})
        model.pop("package", None)
        last = model["path"].rstrip("/").rpartition("/")[2].removesuffix(".gguf")
        model["name"] = re.sub(r"[^A-Za-z0-9._+-]+", "-", last).lstrip("-._+") or "local"
    if isinstance(model, dict) and isinstance(count := model.get("outliers"), int) and count > 0:
        model["name"] = f"{model.get('name')}+{count}outliersx{model.get('outlier_strength')}"
    return {str(key): value for key, value in plain.items()}


def method_in_epochs(plain: Mapping[Any, Any]) -> Any:
    """Return the method of a composed configuration, with epochs in place of tokens to train on."""
    calib = plain.get("calib")
    calib = calib if isinstance(calib, Mapping) else {}
    # As CalibSettings.sequences counts them: plain data have not been checked yet.
    drawn = calib.get("samples") if calib.get("corpus") is not None else 0
    numbers = [drawn, calib.get("written", 0), calib.get("seqlen")]
    if all(isinstance(number, int) and number >= 0 for number in numbers):
        return with_epochs(plain.get("method"), numbers[0] + numbers[1], numbers[2])
    return with_epochs(plain.get("method"), 0, 0)  # which is refused when calib is checked


def listed_parts(node: Any) -> Any:
    """Return plain data in which the named parts of every method are a list."""
    if isinstance(node, list):
        return [listed_parts(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    mapping = {str(key): listed_parts(value) for key, value in node.items()}
    if "_target_" in mapping and isinstance(parts := mapping.get("parts"), dict):
        mapping["parts"] = list(parts.values())
    return mapping


def recipe_for(method: Any, quant: Any) -> Any:
    """Return the recipe for this format, where a method's file has one for each family of formats."""
    family = recipe_family(method, quant)
    return method if family is None else method[family]


def method_key(cfg: DictConfig, quant: Any) -> str:
    """Return where the method that is carried out stands in the configuration: `method`, or the recipe of a family."""
    family = recipe_family(cfg.get("method"), quant)
    return "method" if family is None else f"method.{family}"


def recipe_family(method: Any, quant: Any) -> str | None:
    """Return which of a method's recipes is for this format; None where its file has but one.

    What counts is how activations are rounded: not at all, under a scale of a token or tensor, or in blocks with a
    scale each, wide or narrow ones.
    """
    if not isinstance(method, Mapping) or set(method) != FAMILIES:
        return None
    activation = quant.get("activation") if isinstance(quant, Mapping) else None
    if not isinstance(activation, Mapping):
        return "weight_only"
    if isinstance(block := activation.get("block"), int):
        return "wide_blocks" if block >= WIDE else "narrow_blocks"
    # Integers leave activations in float at 16 bits, which is their default; floating-point formats state no bits.
    integers = activation.get("_target_", INTEGERS) == INTEGERS
    return "weight_only" if activation.get("bits", 16 if integers else None) == 16 else "weight_activation"
