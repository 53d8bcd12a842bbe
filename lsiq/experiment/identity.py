"""What a run is called, and the files whose content is part of its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsiq.errors import InputError
from lsiq.experiment.config import RunConfig
from lsiq.methods.finetune import FineTune
from lsiq.models.chat_template import read_chat_template
from lsiq.models.folder import find_tokenizer, fingerprint, tokenizer_hash
from lsiq.models.gguf_file import is_gguf
from lsiq.models.gguf_tokenizer import find_splitter
from lsiq.models.settings import ModelSettings

# How and where a run is carried out, against what it is.
NOT_IDENTITY = ("tracker", "paths", "force", "trace", "dry_run", "export")
# Of the model: where its files lie, `inputs` having what is in them; and what others measured.
NOT_MODEL = ("path", "tokenizer", "published")
# Settings of methods that came later, at the values which stand for what was done before: runs keep their names.
BEFORE = (
    ("unit", "value"),
    ("travel", 1.0),
    ("span", "present"),
    ("ends", "together"),
    ("latents", False),
    ("trained", "auto"),
    ("window", None),
    ("window_epochs", None),
    ("states", "float32"),
    ("held", None),
    ("relative_to", "stream"),
)
# Settings of methods that say where a run comes from, or how much room it has.
NOT_METHOD = ("run", "memory")
# The same of some classes alone: others had the key from the start, so that it is part of their names.
BEFORE_OF = {
    "lsiq.methods.gptq.": [("kernels", "auto")],
    "lsiq.methods.rotate.": [("steps", 0)],
    "lsiq.parts.dense.": [("hardening", 0.0)],
}


def run_id(config: RunConfig, plain: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Name a run: model, format, method, seed and a hash of all settings and input files that decide its numbers.

    Args:
        config: the checked settings.
        plain: the same configuration as plain data.
        inputs: content hashes of the files it reads, by key, so that a changed text or checkpoint is another run.
    """
    identity = {key: value for key, value in plain.items() if key not in NOT_IDENTITY}
    # Where a checkpoint or an earlier run lies does not matter; `inputs` says which it is.
    identity["model"] = {key: value for key, value in identity["model"].items() if key not in NOT_MODEL}
    identity["calib"] = _calib_identity(identity["calib"])
    identity["eval"] = {key: value for key, value in identity["eval"].items() if (key, value) != ("tf32", False)}
    identity["quant"] = _quant_identity(identity["quant"], config)
    identity["method"] = _as_before({key: value for key, value in identity["method"].items() if key not in NOT_METHOD})
    text = json.dumps({"config": identity, "inputs": dict(inputs)}, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
    return f"{config.model.name}_{config.quant.name}_{config.method.name}_s{config.seed}_{digest}"


def _calib_identity(calib: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the tokens; runs from before there was a choice had these values, and keep their names."""
    settings = dict(calib)
    settings["mix"] = {name: weight for name, weight in (calib.get("mix") or {}).items() if weight}
    settings["paths"] = {name: path for name, path in (calib.get("paths") or {}).items() if path is not None}
    defaults = {"windows": "random", "template": False, "mix": {}, "paths": {}}
    return {key: value for key, value in settings.items() if key not in defaults or value != defaults[key]}


def _quant_identity(quant: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return what decides the formats; runs from before linears could have their own keep their names."""
    ignored = {"plan"}  # `inputs` has its content
    if not config.quant.rules:
        ignored.add("rules")
    if not config.quant.kv.active:
        ignored.add("kv")
    if not config.quant.allocate.active:
        ignored.add("allocate")
    settings = {key: value for key, value in quant.items() if key not in ignored}
    if isinstance(activation := settings.get("activation"), Mapping):  # ranges were kept whole
        settings["activation"] = {key: value for key, value in activation.items() if (key, value) != ("clip", 1)}
    if "kv" in settings:  # caches had no fixed scale, and nothing was clipped
        whole: list[tuple[str, Any]] = [("scale", None), ("clip", None)]
        if config.quant.kv.bits is not None:  # else all of a range stands against a share in `activation`
            whole.append(("clip", 1))
        settings["kv"] = {key: value for key, value in settings["kv"].items() if (key, value) not in whole}
    if "allocate" in settings:  # what came later stands for what was done before
        before = {"rounds": 0, "rounding": "nearest"}
        allocate = settings["allocate"].items()
        settings["allocate"] = {k: v for k, v in allocate if k not in before or v != before[k]}
    return settings


def _as_before(node: Any) -> Any:
    """Return a method's settings without those that change nothing about what was done before they came."""
    if isinstance(node, Mapping):
        target = str(node.get("_target_"))
        own = (settings for module, settings in BEFORE_OF.items() if target.startswith(module))
        before = BEFORE + tuple(setting for settings in own for setting in settings)
        if node.get("trained") == "window":  # windows had a share of the epochs before they had epochs of their own
            before = tuple(setting for setting in before if setting[0] != "window_epochs")
        return {key: _as_before(value) for key, value in node.items() if (key, value) not in before}
    return [_as_before(value) for value in node] if isinstance(node, list) else node


def identify_inputs(config: RunConfig, checkpoint: Path | None) -> dict[str, str]:
    """Return content hashes of everything a run reads from files, by the key that names the file."""
    inputs = model_inputs(config.model, checkpoint)
    paths = {"calib.path": config.calib.path, "eval.path": config.eval.path}
    paths |= {f"calib.paths.{name}": path for name, path in config.calib.paths.items()}
    paths |= {f"eval.local.{name}": path for name, path in config.eval.local.items()}
    paths |= {f"eval.tasks_local.{name}": path for name, path in config.eval.tasks_local.items()}
    if isinstance(config.method, FineTune) and config.method.run is not None:
        inputs["method.run"] = Path(config.method.run).name  # a run's id already stands for all that made it
    tokenizer = find_tokenizer(config.model, checkpoint)
    if config.calib.template and tokenizer is not None and (template := read_chat_template(tokenizer)):
        inputs["calib.template"] = hashlib.blake2b(template.encode(), digest_size=10).hexdigest()
    paths["quant.plan"] = config.quant.plan
    for key, path in paths.items():
        if path is not None:
            inputs[key] = hash_file(key, Path(path).expanduser())
    return inputs


def model_inputs(settings: ModelSettings, checkpoint: Path | None) -> dict[str, str]:
    """Return hashes of a model's weights and of a tokenizer that does not lie with them.

    A GGUF file's way of splitting words goes along where it is not GPT-2's. It once was taken for that where
    transformers does not know it, which gave other tokens.
    """
    inputs = {}
    if checkpoint is not None and settings.weights == "checkpoint":
        inputs["model"] = fingerprint(checkpoint, settings.allow_pickle)
    tokenizer = find_tokenizer(settings, checkpoint)
    if settings.tokenizer is not None and tokenizer is not None:
        inputs["model.tokenizer"] = tokenizer_hash(tokenizer)
    elif tokenizer is not None and is_gguf(tokenizer) and (splitter := find_splitter(tokenizer)) not in (None, "gpt-2"):
        inputs["model.splitter"] = splitter
    return inputs


def hash_file(key: str, path: Path) -> str:
    """Return a hash of the content of `path`; InputError, which names `key`, where it cannot be read."""
    if not path.is_file():
        raise InputError(f"{key}={path}: no such file; give the path of a file, relative to where you run")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=10)).hexdigest()
    except OSError as error:
        raise InputError(f"{key}={path}: cannot be read ({error.strerror}); check its permissions") from error
