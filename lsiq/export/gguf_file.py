"""Writing a model the way llama.cpp expects it: names, order of the rotated rows, blocks of 32, vocabulary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsiq.errors import InputError
from lsiq.export.gguf_families import add_family, check_family, norm_offset, positions, rotary_base
from lsiq.export.gguf_types import ARCHITECTURES, BLOCK, RANGES
from lsiq.export.shards import tokenizer_folder
from lsiq.export.source import Source
from lsiq.formats.base import WeightFormat
from lsiq.formats.tensor import QuantizedTensor
from lsiq.models.splitters import find_name, is_byte_level


def check_architecture(source: Source) -> None:
    """Raise where llama.cpp has no place for the model."""
    check_family(source.model.config)
    _pre_tokenizer(source)


def write_file(source: Source, path: Path, type_of: Callable[[WeightFormat], str]) -> None:
    """Write everything to `path`, quantised linears as the type of their format; one block in memory at a time."""
    import gguf

    architecture = ARCHITECTURES[source.model.config.model_type]
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)
    _add_settings(writer, source, _prevailing(source, type_of))
    with tokenizer_folder(source) as folder:
        _add_vocabulary(writer, source, folder)
    names = gguf.get_tensor_name_map(
        next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), source.model.depth
    )

    def add(name: str, data: np.ndarray, kind: str) -> None:
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise InputError(f"export=gguf: llama.cpp's {architecture} has no place for {name}; use another export")
        writer.add_tensor(stored, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    for name, tensor in source.outside():
        add(name, *_float(_with_offset(name, tensor, source)))
    for name, weight in source.outside_result().weights.items():
        kind = type_of(weight.format)
        add(name, encode(weight, kind), kind)
    for index in range(source.model.depth):
        result, prefix = source.block(index), source.prefix(index)
        for name, tensor in result.floats.items():
            add(prefix + name, *_float(_order_rows(name, _with_offset(name, tensor, source), source)))
        for name, weight in result.weights.items():
            parts = (weight.codes, weight.scale, weight.zero)
            codes, scale, zero = (_order_rows(name, part, source) for part in parts)
            kind = type_of(weight.format)
            add(prefix + name, encode(replace(weight, codes=codes, scale=scale, zero=zero), kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _prevailing(source: Source, type_of: Callable[[WeightFormat], str]) -> str:
    """Return the type of the most weights, by which the file is called."""
    weights: Counter[str] = Counter()
    for index in range(source.model.depth):
        block_formats = source.quant.in_block(index)
        for name, (rows, columns) in source.shapes.items():
            fmt = block_formats.of(name)
            weights["F16" if fmt.bits == 16 else type_of(fmt)] += rows * columns
    return weights.most_common(1)[0][0]


def encode(weight: QuantizedTensor, kind: str) -> np.ndarray:
    """Return `weight (out, in)` as rows of bytes in the layout of `kind`; floats as an array of numbers.

    A block of Q8_0 is the scale and 32 signed bytes. Q4_0 and Q5_0 hold 32 numbers, counted from the least they can
    hold, as 16 bytes: number `i` in the low half of byte `i`, number `i + 16` in its high half. Q5_0 has the fifth
    bits in four bytes before them. MXFP4 holds codes in the same order behind the biased exponent of their scale.
    """
    if kind in ("F16", "F32"):
        return weight.decode().numpy().astype(np.float16 if kind == "F16" else np.float32)
    rows = len(weight.codes)
    if kind == "MXFP4":
        numbers = weight.codes.reshape(-1, BLOCK).numpy()
        return np.concatenate([_exponents(weight.scale), _halves(numbers)], axis=1).reshape(rows, -1)
    groups = weight.format.grouped(weight.codes).to(torch.int16)
    numbers = (groups - weight.zero.to(torch.int16)).reshape(-1, BLOCK).numpy()
    repeats = groups.shape[2] // BLOCK
    scale = weight.scale.reshape(-1).repeat_interleave(repeats).numpy().astype("<f2")
    parts: list[np.ndarray] = [scale[:, None].view(np.uint8)]
    if kind == "Q8_0":
        parts.append(numbers.astype(np.int8).view(np.uint8))
    else:
        unsigned = (numbers - RANGES[kind][0]).astype(np.uint32)
        if kind == "Q5_0":
            fifth = ((unsigned >> 4) << np.arange(BLOCK, dtype=np.uint32)).sum(1, dtype=np.uint32)
            parts.append(fifth.astype("<u4")[:, None].view(np.uint8))
        parts.append(_halves((unsigned & 15).astype(np.uint8)))
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _halves(numbers: np.ndarray) -> np.ndarray:
    """Return 32 numbers below 16 as 16 bytes."""
    return numbers[:, : BLOCK // 2] | numbers[:, BLOCK // 2 :] << 4


def _exponents(scale: Tensor) -> np.ndarray:
    """Return powers of two as biased exponents, a byte each: the exponent's bits of the float32 number."""
    return (scale.reshape(-1, 1).view(torch.int32) >> 23).to(torch.uint8).numpy()


def _float(tensor: Tensor) -> tuple[np.ndarray, str]:
    """The tensor as bytes or numbers, and its type; vectors are float32, as llama.cpp wants them."""
    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        return tensor.float().numpy(), "F32"
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint8).numpy(), "BF16"
    return tensor.half().numpy(), "F16"


def _with_offset(name: str, tensor: Tensor, source: Source) -> Tensor:
    """Norms as llama.cpp has them; float32, in which the sum of a weight and 1 is what the model multiplies by."""
    offset = norm_offset(source.model.config)
    return tensor.float() + offset if offset and name.endswith("norm.weight") else tensor


def _order_rows(name: str, rows: Tensor, source: Source) -> Tensor:
    """llama.cpp's llama rotates channels 2i and 2i + 1 of a head together, transformers i and i + head_dim / 2."""
    config = source.model.config
    if ARCHITECTURES[config.model_type] != "llama":
        return rows
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return rows
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _add_settings(writer: Any, source: Source, kind: str) -> None:
    import gguf

    config = source.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}  # the only name that there is for MXFP4
    writer.add_file_type(gguf.LlamaFileType[names.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(positions(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(source.model.depth)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rotary_base(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_family(writer, config)


def _add_vocabulary(writer: Any, source: Source, folder: Path) -> None:
    """Pieces, their kinds and merges; ids without a piece are padding."""
    import gguf

    size = source.model.config.vocab_size
    splitter = _pre_tokenizer(source)
    if splitter is None:
        own = (folder / "tokenizer.model").is_file()
        vocabulary = gguf.SentencePieceVocab(folder) if own else gguf.LlamaHfVocab(folder)
        pieces, scores, kinds = (list(column) for column in zip(*vocabulary.all_tokens(), strict=True))
        if not own:
            scores = _scores(folder, pieces)
        writer.add_tokenizer_model("llama")
        if norm_offset(source.model.config):  # Gemma's texts get no blank in front
            writer.add_add_space_prefix(False)
        missing = size - len(pieces)
        writer.add_token_scores(scores + [-1000.0] * missing)
    else:
        pieces, kinds = _byte_level(folder, size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitter)
        missing = size - len(pieces)
    writer.add_token_list(pieces + [f"[PAD{number}]" for number in range(len(pieces), size)])
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * missing)
    gguf.SpecialVocab(folder, load_merges=splitter is not None, n_vocab=size).add_to_gguf(writer, quiet=True)


def _scores(folder: Path, pieces: list[bytes]) -> list[float]:
    """Scores by which llama.cpp, which joins two pieces if their whole has the best one, follows the merges' order."""
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    ranks: dict[bytes, int] = {}
    for rank, merge in enumerate(merges):
        whole = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        ranks.setdefault(whole.encode(), rank)
    return [-float(ranks.get(piece, len(merges))) for piece in pieces]


def _byte_level(folder: Path, size: int) -> tuple[list[str], list[Any]]:
    from gguf import TokenType

    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    places = {number: (piece, TokenType.NORMAL) for piece, number in tokenizer["model"]["vocab"].items()}
    for token in tokenizer.get("added_tokens", []):
        places[token["id"]] = (token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    tokens = [places.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(min(size, max(places) + 1))]
    return [piece for piece, _ in tokens], [kind for _, kind in tokens]


def _pre_tokenizer(source: Source) -> str | None:
    """llama.cpp's name for how the run's tokenizer splits words; None for a SentencePiece vocabulary.

    transformers has classes that split otherwise than the tokenizer.json they are made from says.

    Raises:
        InputError: llama.cpp would split words otherwise than the tokenizer does.
    """
    backend = getattr(source.model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None  # then there is a tokenizer.model: the tokenizer loaded
    tokenizer = json.loads(backend.to_str())
    if not is_byte_level(tokenizer) and tokenizer["model"].get("byte_fallback"):
        return None
    name = find_name(tokenizer)
    if is_byte_level(tokenizer) and name is not None:
        return name
    raise InputError(
        f"export=gguf: the tokenizer of {source.tokenizer_place or source.checkpoint} splits words in a way that "
        "llama.cpp is not known to have a name for; use export=compressed-tensors, gptq or plain"
    )
