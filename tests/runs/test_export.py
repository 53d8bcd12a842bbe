"""An export is the run: what other programs read back has its weights, its logits and its size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.configuration import ROOT, compose_run
from helpers.families import FAMILIES as TINY
from helpers.gguf_files import SHAPES_OF_FILES, WIDE_GEMMA, write_gguf
from helpers.marks import slow
from helpers.models import SHAPES, save_model
from omegaconf import DictConfig
from torch import Tensor

from lsiq.errors import ConfigError, InputError, LsiqError, OutputError
from lsiq.experiment.config import RunConfig, parse
from lsiq.experiment.run import run
from lsiq.export.gguf import exact_type
from lsiq.export.packing import pack
from lsiq.export.source import Source
from lsiq.export.verify import verify
from lsiq.formats.integer import Integer
from lsiq.formats.tensor import QuantizedTensor
from lsiq.models.gguf_file import read_header
from lsiq.models.loading import load
from lsiq.results.record import Record, read_record
from lsiq.results.store import BlockStore

SmallRun = Callable[..., DictConfig]
W8A8 = ("quant=w8a8", "quant.weight.group=null", "quant.activation.attention=false")
QUICK = ("calib=none", "eval=none", "quant.weight.scale=float16")
FAMILIES = {
    **SHAPES,
    **SHAPES_OF_FILES,
    "phi4-mini": TINY["phi4-mini"],
    "llama-biases": TINY["llama-biases"],
    "gemma3-scalar": TINY["gemma3"] | {"num_hidden_layers": 6, "sliding_window_pattern": 6},
    "gemma2-caps": TINY["gemma2"] | WIDE_GEMMA,
}


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Read `count` numbers of `bits` bits from each row of 32-bit words, one bit at a time."""
    stream = np.unpackbits(np.ascontiguousarray(words).astype("<i4").view(np.uint8), axis=1, bitorder="little")
    return (stream[:, : count * bits].reshape(len(words), count, bits) << np.arange(bits)).sum(-1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [32, 33, 96])
def test_packing_is_one_stream_of_bits(bits: int, width: int) -> None:
    codes = torch.randint(0, 2**bits, (5, width), generator=torch.Generator().manual_seed(bits))
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-width * bits // 32))
    assert (unpack(words.numpy(), bits, width) == codes.numpy()).all()


def random_weight(fmt: Integer) -> QuantizedTensor:
    """Every code with every zero point that the format knows, in groups that change from one to the next."""
    generator = torch.Generator().manual_seed(fmt.bits)
    codes = torch.randint(0, fmt.levels + 1, (64, 256), generator=generator).byte()
    zero = torch.arange(256).view(64, 4, 1) % (fmt.levels + 1)
    zero = torch.full_like(zero, 2 ** (fmt.bits - 1)) if fmt.symmetric else zero
    scale = torch.rand(64, 4, 1, generator=generator).half().float()
    return QuantizedTensor(codes, scale, zero.float(), fmt)


@pytest.mark.parametrize(("bits", "symmetric", "kind"), [
    (2, False, "Q4_0"), (3, False, "Q4_0"), (4, False, "Q5_0"), (7, False, "Q8_0"),
    (4, True, "Q4_0"), (5, True, "Q5_0"), (8, True, "Q8_0"),
])  # fmt: skip
def test_a_gguf_type_holds_the_grid_bit_for_bit(bits: int, symmetric: bool, kind: str) -> None:
    from gguf import GGMLQuantizationType, quants

    from lsiq.export.gguf_file import encode

    fmt = Integer(bits=bits, group=64, symmetric=symmetric, scale="float16")
    assert exact_type(fmt) == kind
    weight = random_weight(fmt)
    read = quants.dequantize(encode(weight, kind), GGMLQuantizationType[kind])
    assert np.array_equal(read, weight.decode().numpy())


# Both families of the bundled models, with grouped queries and biases; widths and a group that are no powers of two.
EXPORTS = [
    ("llama", "export=compressed-tensors", "quant.weight.bits=3"),
    ("opt", "export=compressed-tensors", *W8A8, "quant.weight.symmetric=true"),
    ("opt", "export=plain", "quant.weight.scale=float32"),
    ("llama", "export=gguf", "quant.weight.bits=4"),
    ("qwen3", "export=gguf"),
    ("gemma3", "export=gguf"),
]  # fmt: skip
MORE_EXPORTS = [
    ("llama", "export=compressed-tensors", "quant.weight.bits=2", "quant.weight.symmetric=true"),
    ("llama", "export=compressed-tensors", "quant.weight.bits=5", "quant.weight.group=null"),
    ("llama", "export=compressed-tensors", *W8A8),
    ("opt", "export=compressed-tensors", "quant.weight.bits=7"),
    ("llama", "export=gguf", "quant.weight.bits=2"),
    ("llama", "export=gguf", "export.type=F32", "quant.weight.bits=8", "quant.weight.scale=float32"),
    ("mistral", "export=gguf"),
    ("qwen2", "export=gguf"),
    ("gemma2", "export=gguf", "quant.weight.bits=4"),
    ("phi3", "export=gguf"),
]  # fmt: skip


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder per supported family."""
    root = tmp_path_factory.mktemp("families")
    return {family: save_model(shape, root / family) for family, shape in FAMILIES.items()}


def named(case: tuple[str, ...], *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(case, id="-".join(word.split("=")[-1] for word in case), marks=marks)


@pytest.mark.parametrize("case", [*map(named, EXPORTS), *(named(case, pytest.mark.slow) for case in MORE_EXPORTS)])
def test_the_foreign_loader_reads_back_the_logits_of_the_run(
    case: tuple[str, ...], families: dict[str, Path], small_run: SmallRun
) -> None:
    family, *overrides = case
    record = run(small_run(families[family], *QUICK, "quant.weight.group=32", *overrides))
    (entry,) = record.exports.values()
    (check,) = entry["checks"]
    assert (entry["status"], check["status"]) == ("finished", "read")
    assert check["difference"] <= 1e-5  # measured: 0.0 in every case; the mark is 1e-3
    assert check["rounding"] == 0.0
    assert check["largest_logit"] > 1


@pytest.mark.parametrize(
    ("family", "method"), [slow("opt", "omniquant"), ("llama", "awq"), slow("llama", "smoothquant")]
)
def test_what_a_method_folded_into_norms_and_biases_goes_along(
    family: str, method: str, families: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    epochs = ["method.training.epochs=2", "method.training.batch=2"] if method == "omniquant" else []
    record = run(small_run(families[family], "eval=none", "export=compressed-tensors", f"method={method}", *epochs))
    folded = BlockStore(tmp_path / "runs" / record.run_id / "blocks").read(0).floats
    assert folded
    (check,) = record.exports["compressed-tensors"]["checks"]
    assert check["difference"] <= 1e-5  # measured: 0.0


def test_a_plain_export_adds_low_rank_products_to_the_weights(families: dict[str, Path], small_run: SmallRun) -> None:
    record = run(small_run(families["llama"], "eval=none", "export=plain", "method=qera-exact", "method.rank=4"))
    (check,) = record.exports["plain"]["checks"]
    assert check["difference"] <= 1e-4  # measured: 4.1e-6; the sum is rounded once more than the two products
    assert check["status"] == "read"


@pytest.mark.parametrize("bits", [slow(2), 3, slow(4), slow(8)])
def test_the_gptq_layout_holds_codes_zero_points_and_scales(
    bits: int, families: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    record = run(
        small_run(families["llama"], *QUICK, f"quant.weight.bits={bits}", "export=gptq", "export.verify=false")
    )
    folder = Path(record.exports["gptq"]["folder"])
    tensors = load_file(folder / "model.safetensors")
    kept = BlockStore(tmp_path / "runs" / record.run_id / "blocks").read(1).weights["mlp.down_proj.weight"]
    rows, columns = kept.codes.shape
    part = "model.layers.1.mlp.down_proj"
    codes = unpack(tensors[f"{part}.qweight"].T, bits, columns)
    zeros = unpack(tensors[f"{part}.qzeros"], bits, rows)
    groups = tensors[f"{part}.g_idx"]
    weight = (codes - zeros[groups].T) * tensors[f"{part}.scales"][groups].T.astype(np.float32)
    assert tensors[f"{part}.scales"].dtype == np.float16
    assert np.array_equal(weight.astype(np.float32), kept.decode().numpy())
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings == json.loads((folder / "quantize_config.json").read_text())
    assert (settings["checkpoint_format"], settings["bits"], settings["group_size"]) == ("gptq_v2", bits, 32)


@pytest.mark.parametrize(("model", "quant", "form"), [
    slow("tiny-llama", "w2a16g128", "compressed-tensors"),
    ("tiny-opt", "w3a16g128", "gptq"),
])  # fmt: skip
def test_an_export_is_as_large_as_its_average_bits_say(model: str, quant: str, form: str, tmp_path: Path) -> None:
    record = run(
        compose_run(
            f"model={model}",
            f"quant={quant}",
            "method=rtn",
            *QUICK,
            "tracker=none",
            f"paths.runs={tmp_path}",
            f"export={form}",
            "export.verify=false",
        )
    )
    source = source_of(record, tmp_path)
    floats = sum(tensor.numel() * tensor.element_size() for _, tensor in source.outside())
    weights = 0
    for index in range(source.model.depth):
        result = source.block(index)
        floats += sum(tensor.numel() * tensor.element_size() for tensor in result.floats.values())
        weights += sum(weight.codes.numel() for weight in result.weights.values())
    assert record.average_bits is not None
    expected = record.average_bits * weights / 8 + floats
    assert record.exports[form]["weight_bytes"] == pytest.approx(expected, rel=0.02)  # measured: +0.4 % and +1.3 %


def source_of(record: Record, runs: Path) -> Source:
    config = config_of(record)
    checkpoint = ROOT / "lsiq" / "assets" / str(config.model.bundled)
    if config.model.path is not None:
        checkpoint = Path(config.model.path)
    model = load(config.model, checkpoint, torch.device("cpu"), 0)
    return Source(model, BlockStore(runs / record.run_id / "blocks"), config.quant, checkpoint)


def config_of(record: Record) -> RunConfig:
    return parse(DictConfig(record.config))


def test_an_export_that_reads_back_as_another_model_is_not_accepted(
    families: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    record = run(small_run(families["llama"], *QUICK, "export=compressed-tensors"))
    folder = Path(record.exports["compressed-tensors"]["folder"])
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_packed"] ^= 1  # one code in ten, by one step
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_of(record)
    assert config.export is not None
    with pytest.raises(OutputError, match=r"its logits differ by .* from those written \(at most 0\.001\)"):
        verify(config.export, source_of(record, tmp_path / "runs"), config.model, config.seed, folder)


def test_scales_are_rounded_only_where_that_was_asked_for(families: dict[str, Path], small_run: SmallRun) -> None:
    wide = ("calib=none", "eval=none")
    with pytest.raises(ConfigError, match=r"quant\.weight\.scale=float16, or let export\.round_scales=true"):
        run(small_run(families["llama"], *wide, "export=gguf"))
    record = run(small_run(families["llama"], *wide, "export=gguf", "export.round_scales=true"))
    (check,) = record.exports["gguf"]["checks"]
    assert check["difference"] <= 1e-5
    assert 1e-5 < check["rounding"] < 0.1  # measured: 0.0061


def test_a_gguf_file_brings_its_tokenizer(families: dict[str, Path], small_run: SmallRun) -> None:
    from transformers import AutoTokenizer

    record = run(small_run(families["llama"], *QUICK, "export=gguf", "export.verify=false"))
    text = "The harbour was quiet; it's 1984, and the lathé turned 12,345 times.\n\n  Then?"
    read = AutoTokenizer.from_pretrained(record.exports["gguf"]["folder"], gguf_file="model.gguf")
    own = AutoTokenizer.from_pretrained(families["llama"])
    assert read(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("family", [slow("gemma3"), "phi3"])
def test_pieces_of_sentencepiece_come_back_in_the_order_in_which_they_are_joined(
    family: str, families: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    pieces = ["▁", *"aboth", "▁b", "oa", "▁boa", "▁boat", "▁▁"]
    path = write_gguf(families[family], tmp_path / "m.gguf", "F32", pieces=pieces)
    record = run(small_run(path, *QUICK, "quant.weight.group=32", "export=gguf", "export.verify=false"))
    folder = Path(record.exports["gguf"]["folder"])
    own = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    read = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    for text in ("a boat 7", "  a  boat", "boat<eos>b"):
        assert read(text)["input_ids"] == own(text)["input_ids"]
    metadata = read_header(folder / "model.gguf").metadata
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    assert sorted(["▁b", "oa", "▁boa", "▁boat"], key=scores.__getitem__) == ["▁boat", "▁boa", "oa", "▁b"]
    assert metadata.get("tokenizer.ggml.add_space_prefix") == (False if family == "gemma3" else None)


DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def splitting(folder: Path, checkpoint: Path, *steps: dict[str, Any]) -> Path:
    """A copy of a checkpoint whose tokenizer splits words by these steps."""
    shutil.copytree(checkpoint, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(("steps", "name"), [([BYTES], "gpt-2"), ([DIGITS, BYTES], "smollm")])
def test_a_gguf_file_names_the_way_words_are_split(
    steps: list[dict[str, Any]], name: str, families: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    checkpoint = splitting(tmp_path / "model", families["llama"], *steps)
    record = run(small_run(checkpoint, *QUICK, "export=gguf", "export.verify=false"))
    header = read_header(Path(record.exports["gguf"]["folder"]) / "model.gguf")
    assert header.metadata["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("step", [{**DIGITS, "individual_digits": False}, {"type": "Punctuation"}], ids=str)
def test_a_split_that_llama_cpp_has_no_name_for_is_refused(
    step: dict[str, Any], families: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    checkpoint = splitting(tmp_path / "model", families["llama"], step, BYTES)
    with pytest.raises(InputError, match="splits words in a way"):
        run(small_run(checkpoint, *QUICK, "export=gguf"))


def test_the_card_says_what_it_is_and_how_it_was_made(families: dict[str, Path], small_run: SmallRun) -> None:
    record = run(small_run(families["llama"], "export=plain"))
    card = (Path(record.exports["plain"]["folder"]) / "README.md").read_text()
    assert record.run_id in card
    assert f"{record.metrics['ppl/file@64']:.4f}" in card
    assert "3 bits, asymmetric, groups of 32 inputs" in card
    assert record.command in card
    assert "AutoModelForCausalLM" in card


def test_large_checkpoints_are_cut_into_shards(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lsiq.export.shards import ShardWriter

    folder = save_model(SHAPES["llama"], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    writer = ShardWriter(folder, limit=2**20)
    for name, tensor in model.state_dict().items():
        writer.add(name, tensor)
    writer.finish()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "gguf-opt": ("opt", ["export=gguf"], r"writes llama, mistral, .*, phi3 models, not opt; use export="),
    "gguf-rope": ("phi4-mini", ["export=gguf"], r"rotary embeddings of type longrope are not written yet"),
    "gguf-scalar": ("gemma3-scalar", ["export=gguf"], r"gemma3_text to have query_pre_attn_scalar=256, not 20"),
    "gguf-biases": ("llama-biases", ["export=gguf"], r"llama to have attention_bias=False, not True"),
    "gguf-caps": ("gemma2-caps", ["export=gguf"], r"gemma2 to have attn_logit_softcapping=50\.0, not 2\.0"),
    "gguf-group": ("llama", ["export=gguf", "quant.weight.group=16"], r"quant\.weight\.group=16; use a multiple of 32"),
    "gguf-bits": ("llama", ["export=gguf", "quant.weight.bits=8"], r"the nearest is Q8_0 with quant\.weight\.bits=7"),
    "gguf-type": ("llama", ["export=gguf", "quant.weight.bits=4", "export.type=Q4_0"], r"smallest type .* is Q5_0"),
    "gptq-bits": (
        "llama",
        ["export=gptq", "quant.weight.bits=5"],
        r"quant\.weight\.bits=5; use one of them, or export=",
    ),
    "gptq-group": ("llama", ["export=gptq", "quant.weight.group=16"], r"multiples of 32"),
    "plain-activations": ("llama", ["export=plain", "quant=w6a6"], r"rounds them to 6 bits; use export=compressed"),
    "low-activations": ("llama", ["export=compressed-tensors", "quant=w4a4"], r"use quant=w8a8"),
    "attention": (
        "llama",
        ["export=compressed-tensors", "quant=w8a8", "quant.weight.group=null"],
        r"quant\.activation\.attention=false",
    ),
    "per-tensor": (
        "llama",
        ["export=compressed-tensors", *W8A8, "quant.activation.per=tensor"],
        r"quant\.activation\.per=token",
    ),
    "clipped-activations": (
        "llama",
        ["export=compressed-tensors", *W8A8, "quant.activation.clip=0.9"],
        r"quant\.activation\.clip=0\.9: loaders of .* quantise with quant\.activation\.clip=1",
    ),
    "clipped-cache": (
        "llama",
        ["export=compressed-tensors", "quant.kv.bits=8", "quant.kv.clip=0.9"],
        r"kv8-clip0\.9, whose ranges no loader finds",
    ),
    "float": ("llama", ["export=plain", "quant=fp16"], r"quantises none; choose another quant"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_a_format_cannot_hold_is_refused_before_anything_is_quantised(
    name: str, families: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    family, overrides, message = REFUSED[name]
    with pytest.raises(LsiqError, match=message):
        run(small_run(families[family], *QUICK, *overrides))
    assert not list(tmp_path.glob("runs/*/blocks/*"))


def test_a_tensor_that_the_architecture_lacks_is_refused(
    families: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    from dataclasses import replace

    record = run(small_run(families["llama"], *QUICK))
    store = BlockStore(tmp_path / "runs" / record.run_id / "blocks")
    strange = replace(store.read(1), floats={"mlp.up_proj.bias": torch.ones(160)})
    store.write(1, strange, before=store.finished_blocks(2)[0].digest)
    with pytest.raises(InputError, match=r"mlp\.up_proj\.bias, which LlamaDecoderLayer of transformers does not have"):
        run(small_run(families["llama"], *QUICK, "export=plain"))


def test_pushing_without_a_hub_leaves_the_export(
    families: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=r"export\.push=someone/model: .*hf auth login"):
        run(small_run(families["llama"], *QUICK, "export=plain", "export.push=someone/model"))
    (file,) = tmp_path.glob("runs/*/record.json")
    record = read_record(file.parent)
    assert record is not None
    assert record.status == "finished"
    entry: dict[str, Any] = record.exports["plain"]
    assert entry["status"] == "failed"
    assert (Path(entry["folder"]) / "README.md").is_file()
