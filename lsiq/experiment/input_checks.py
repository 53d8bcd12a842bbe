"""What is wrong with the inputs of a run, as far as it can be told without torch: answered before that is imported.

Importing torch and transformers takes seconds, on a busy machine half a minute. All that is refused here would be
refused later too, in the same words; what passes may still be refused then.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsiq.allocation.units import budget_of, check_solver, units_of, without
from lsiq.assets import KINDS, bundled_model
from lsiq.data.conversations import no_conversation, no_template, read_conversations
from lsiq.data.corpora import HUB, Split, check_readers, corpus_files
from lsiq.data.documents import read_documents
from lsiq.data.lengths import too_short
from lsiq.errors import ConfigError, InputError
from lsiq.evals.task_names import check_tasks
from lsiq.experiment.config import with_formats
from lsiq.formats.placed import check_widths, fixed, place_or_try
from lsiq.methods.base import chain
from lsiq.methods.lqer import LQER
from lsiq.models.chat_template import read_chat_template
from lsiq.models.families import find_spec, refuse_other_kinds
from lsiq.models.folder import find_tokenizer, read_config, tokenizer_files, weight_files
from lsiq.models.gguf_file import is_gguf
from lsiq.models.spec import ModelSpec
from lsiq.models.widths import check_groups

if TYPE_CHECKING:
    from lsiq.experiment.config import RunConfig


# Characters of a text that are looked at; of a longer one the rest is read when it is wanted.
_LOOKED_AT = 2**22
# No tokenizer needs more characters than this for a token of running text, so longer texts need not be counted.
_PER_TOKEN = 64
# Tokens that transformers may add to a text beyond those that the tokenizer's own file asks for.
_SPECIAL = 4

Shapes = Mapping[str, tuple[int, ...]]


def check_before_torch(config: RunConfig, folder: Path | None, calibrates: bool = True) -> None:
    """Raise what is wrong with device, checkpoint, texts and tasks of a run; nothing large is read.

    Args:
        folder: of the checkpoint, or its GGUF file; None for random weights of a given shape.
        calibrates: whether calibration text will be read.

    Raises:
        ConfigError: a setting does not fit this machine or the checkpoint.
        InputError: a file is missing, damaged or too short.
    """
    check_device(config.device)
    shape = config.model.architecture or {} if folder is None else _read_shape(folder)
    shapes: Shapes = {}
    tokenizer = find_tokenizer(config.model, folder)
    if tokenizer is not None and not is_gguf(tokenizer):  # a GGUF file holds its tokenizer, and its header was read
        _check_tokenizer_files(tokenizer)
    if folder is not None and not is_gguf(folder) and config.model.weights == "checkpoint":
        shapes = _stored_shapes(folder, config.model.allow_pickle)
    check_groups(config.quant, shape, config.model.name)
    if isinstance(head_dim := shape.get("head_dim"), int):  # where it is left out, each family has a rule of its own
        config.quant.kv.check(head_dim)
    if config.quant.mixed:
        check_solver(config.quant)
        spec, depth = find_spec(shape["model_type"], str(folder)), shape["num_hidden_layers"]
        config = with_formats(config, place_or_try(config.quant, depth, spec.linears, config.model.name))
    if shapes:
        _check_linears(config, find_spec(shape["model_type"], str(folder)), shapes, shape)
    config.check_lengths(shape.get("max_position_embeddings"))
    for corpus in config.eval.corpora:
        path = config.eval.path if corpus == "file" else config.eval.local.get(corpus)
        _check_text(corpus, "evaluation", path, tuple(config.eval.fields), config.eval.seqlen, "eval.seqlen", tokenizer)
    calib = config.calib
    for share in calib.shares() if calibrates else []:
        if share.template:
            assert share.path is not None  # the settings see to it
            _check_conversations(share.path, tokenizer)
            continue
        fields = tuple(calib.fields)
        _check_text(share.corpus, "calibration", share.path, fields, calib.seqlen, "calib.seqlen", tokenizer)
    check_tasks(config.eval)


def check_device(name: str) -> None:
    """Raise ConfigError where a GPU is asked for and the system shows no device of that number.

    Where it cannot be told, as under WSL, nothing is raised.
    """
    if not name.startswith("cuda") or any(Path(place).exists() for place in ("/dev/dxg", "/dev/kfd")):
        return
    if os.name != "posix" or not Path("/dev").is_dir():
        return
    count = sum(file.name.removeprefix("nvidia").isdigit() for file in Path("/dev").glob("nvidia*"))
    number = int(name.partition(":")[2] or 0)
    if number >= count:
        raise ConfigError(f"device={name}: this machine has {count} GPUs; use device=cpu or auto")


def _read_shape(folder: Path) -> dict[str, Any]:
    try:
        shape = read_config(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: config.json cannot be used ({error}); fetch it again") from error
    if not isinstance(shape, dict) or not isinstance(shape.get("model_type"), str):
        raise InputError(f"{folder / 'config.json'}: names no model_type; give a checkpoint in the transformers layout")
    refuse_other_kinds(shape, str(folder))
    find_spec(shape["model_type"], str(folder))
    return shape


def _stored_shapes(folder: Path, allow_pickle: bool) -> Shapes:
    """Return the shapes that the headers of safetensors files give; nothing of pickled files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder, allow_pickle):
        if file.suffix == ".safetensors":
            shapes |= _header(file)
    return shapes


def _header(file: Path) -> Shapes:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 100_000_000)))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        size = file.stat().st_size - 8 - length
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise InputError(f"{file}: cannot be read ({type(error).__name__}: {error}); fetch it again") from error
    if end != size:
        raise InputError(f"{file}: cannot be read (it holds {size} bytes of tensors, not {end}); fetch it again")
    return shapes


def _check_linears(config: RunConfig, spec: ModelSpec, shapes: Shapes, shape: Mapping[str, Any]) -> None:
    """Raise ConfigError where a format or rank does not fit the linears of the first block."""
    names = {name: f"{spec.blocks}.0.{name}.weight" for name in spec.linears}
    by_linear = {name: shapes.get(full) or shapes.get(full.removeprefix("model.")) for name, full in names.items()}
    matrices = {name: shape for name, shape in by_linear.items() if shape is not None and len(shape) == 2}
    check_widths(config.quant, {name: shape[1] for name, shape in matrices.items()})
    if config.quant.allocate.active and len(matrices) == len(spec.linears):
        depth, sizes = shape["num_hidden_layers"], {name: (size[0], size[1]) for name, size in matrices.items()}
        fixed_formats = fixed(config.quant, depth, spec.linears)
        free = list(without(units_of(spec, depth, config.quant.allocate.unit), fixed_formats))
        budget_of(config.quant, free, fixed_formats, sizes)
    for link in chain(config.method):
        if isinstance(link, LQER) and config.quant.name != "fp16" and len(matrices) == len(spec.linears):
            link.check_rank(matrices.values())


def _check_tokenizer_files(folder: Path) -> None:
    if not tokenizer_files(folder):
        raise InputError(
            f"{folder}: the tokenizer cannot be loaded (there is no tokenizer.json); put its files beside the weights"
        )
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
    if missing and not any((folder / file).exists() for file in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise InputError(
            f"{folder}: its tokenizer is read with {' and '.join(missing)}, not installed here; pip install 'lsiq[hub]'"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what the name lies in is missing too
        return False


def _check_text(
    corpus: str, split: Split, path: str | None, fields: tuple[str, ...], seqlen: int, key: str, folder: Path | None
) -> None:
    """Raise InputError where the text of a corpus is not there, is damaged near its start, is empty or too short."""
    if corpus in HUB:
        check_readers(corpus, split, path)
        corpus_files(corpus, split, path)
    if corpus != "file" or path is None or corpus in KINDS:
        return
    documents: list[str] = []
    size = 0
    for document in read_documents(path, fields):
        documents.append(document)
        size += len(document)
        if size > _LOOKED_AT:
            return
    if not documents:
        raise InputError(f"{path}: the text is empty; give a file with text in it")
    if size < _PER_TOKEN * seqlen and (tokens := _count("\n\n".join(documents), folder)) + _SPECIAL < seqlen:
        raise InputError(too_short(path, tokens, seqlen, key))


def _check_conversations(path: str, folder: Path | None) -> None:
    """Raise ConfigError where there is no chat template, and InputError where the file begins with no conversations."""
    checkpoint = folder or bundled_model("tiny-llama")  # whose tokenizer a shape without a checkpoint borrows
    if read_chat_template(checkpoint) is None:
        raise ConfigError(no_template(checkpoint))
    size = 0
    for conversation in read_conversations(path):
        size += sum(len(message["content"]) for message in conversation.messages)
        if size > _LOOKED_AT:
            return
    if size == 0:
        raise InputError(no_conversation(path))


def _count(text: str, folder: Path | None) -> int:
    """Return how many tokens a text has; where only transformers could tell, how many bytes, which are no fewer."""
    from tokenizers import Tokenizer

    file = (folder or bundled_model("tiny-llama")) / "tokenizer.json"
    if not file.is_file():
        return len(text.encode())
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(
            f"{file.parent}: the tokenizer cannot be loaded ({error}); put its files beside the weights"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return len(tokenizer.encode(text).ids)
