"""Head and embeddings that rules round are exported where a layout holds them, and refused in one line elsewhere."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.exports import EXPORTERS, exporter_of, refusal, source_of
from helpers.models import SHAPES, load_small, model_settings, save_model

from lsiq.export.base import TOLERANCE
from lsiq.export.source import Source
from lsiq.export.verify import verify
from lsiq.formats.activation import Activation
from lsiq.formats.base import ActivationFormat, WeightFormat
from lsiq.formats.fp8 import FP8, FP8Activation
from lsiq.formats.integer import Integer
from lsiq.formats.nvfp4 import NVFP4, NVFP4Activation
from lsiq.formats.placed import place
from lsiq.formats.quant import QuantSettings
from lsiq.models.gguf_file import read_header
from lsiq.settings import build, describe_settings, fill

FLOAT, LINEARS_ONLY = Activation(), Activation(bits=8, attention=False)
NIBBLES, BYTES = (Integer(bits=bits, group=32, symmetric=True, scale="float16") for bits in (4, 8))
CHANNELS = Integer(bits=8, scale="float16")
ALL, CT, GGUF, PLAIN = {"compressed-tensors", "gguf", "plain"}, {"compressed-tensors"}, {"gguf"}, {"plain"}
HEAD, EMBEDDING = "lm_head", "embed_tokens"
# Formats of blocks, of what enters their linears, and by rules of head and embeddings; and the layouts that hold them.
UNTIED: dict[str, tuple[WeightFormat, ActivationFormat, dict[str, str], set[str]]] = {
    "as blocks": (NIBBLES, FLOAT, {HEAD: "w4g32-sym"}, ALL),
    "wider than blocks": (NIBBLES, FLOAT, {HEAD: "w8g32-sym"}, ALL),
    "asymmetric": (NIBBLES, FLOAT, {HEAD: "w3g32"}, ALL),
    "floating point": (NIBBLES, FLOAT, {HEAD: "fp8"}, CT | PLAIN),
    "powers of two": (NIBBLES, FLOAT, {HEAD: "mxfp4"}, ALL),
    "no type": (NIBBLES, FLOAT, {HEAD: "w8g32"}, CT | PLAIN),
    "integers beside activations": (CHANNELS, LINEARS_ONLY, {HEAD: "w4g32-sym"}, CT),
    "channels beside activations": (CHANNELS, LINEARS_ONLY, {HEAD: "w8"}, CT),
    "the same beside activations": (FP8(), FP8Activation(), {HEAD: "fp8"}, CT),
    "two levels of scales": (NVFP4(), NVFP4Activation(above=1.0), {HEAD: "fp8"}, CT),
    "embeddings": (NIBBLES, FLOAT, {EMBEDDING: "w8g32-sym"}, GGUF | PLAIN),
    "both": (BYTES, FLOAT, {EMBEDDING: "w4g32-sym", HEAD: "w3g32"}, GGUF | PLAIN),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of LLaMA's shape with a vocabulary that fills no word of codes, and one whose head is its embeddings."""
    root, odd = tmp_path_factory.mktemp("heads"), {**SHAPES["llama"], "vocab_size": 4101}
    shapes: dict[str, dict[str, Any]] = {"untied": odd, "tied": {**odd, "tie_word_embeddings": True}}
    return {name: save_model(shape, root / name) for name, shape in shapes.items()}


def source(folder: Path, weight: WeightFormat, activation: ActivationFormat, rules: dict[str, str]) -> Source:
    model = load_small(folder)
    given = [{"match": match, "format": fmt} for match, fmt in rules.items()]
    quant = fill(QuantSettings, {"weight": weight, "activation": activation, "rules": given})
    return source_of(place(quant, model.depth, model.spec.linears, "llama"), folder)


@functools.cache
def untied(case: str, folder: Path) -> Source:
    """Of each of `UNTIED`, made once for all exporters, which only read it."""
    return source(folder, *UNTIED[case][:3])


def check_logits(name: str, exported: Source, folder: Path, out: Path) -> None:
    exporter = exporter_of(name)
    exporter.write(exported, out)
    (found,) = verify(exporter, exported, model_settings(folder), 0, out)
    assert found["status"] == "read"
    assert found["difference"] <= TOLERANCE / 100  # measured: 0.0
    assert (found["rounding"] > 0) == (exported.quant.weight.family == "nvfp")  # which is read in bfloat16


@pytest.mark.parametrize("case", UNTIED)
@pytest.mark.parametrize("name", EXPORTERS)
def test_what_holds_a_rounded_head_reads_it_back(
    name: str, case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    exported, held = untied(case, folders["untied"]), UNTIED[case][-1]
    refused = refusal(exporter_of(name), exported)
    assert (refused is None) == (name in held), refused
    if refused is not None:
        assert "\n" not in refused
        assert name in refused
        return
    check_logits(name, exported, folders["untied"], tmp_path)


@pytest.mark.parametrize("match", [HEAD, EMBEDDING])
@pytest.mark.parametrize("name", EXPORTERS)
def test_a_head_that_is_the_embeddings_is_one_tensor_or_refused(
    name: str, match: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    exported = source(folders["tied"], NIBBLES, FLOAT, {match: "w8g32-sym"})
    refused = refusal(exporter_of(name), exported)
    if name in CT:
        assert refused is not None
        assert "transformers builds no model whose embeddings are packed; use export=gguf or plain" in refused
    elif name == "gptq":
        assert refused is not None
        assert "keeps embeddings and head as they are" in refused
    else:
        assert refused is None
        check_logits(name, exported, folders["tied"], tmp_path)


def test_compressed_tensors_names_the_head_as_a_linear_whose_inputs_stay_in_float(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    exported = source(folders["untied"], CHANNELS, LINEARS_ONLY, {HEAD: "w4g32-sym"})
    exporter_of("compressed-tensors").write(exported, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == []
    assert config["format"] == "mixed-precision"
    (head,) = [group for group in config["config_groups"].values() if group["targets"] == [HEAD]]
    assert (head["format"], head["input_activations"]) == ("pack-quantized", None)
    exporter_of("compressed-tensors").write(source(folders["untied"], NIBBLES, FLOAT, {HEAD: "w4g32-sym"}), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["ignore"], [group["targets"] for group in config["config_groups"].values()]) == ([], [["Linear"]])


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_gguf_writes_head_and_embeddings_in_the_type_that_is_asked_for(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    rules = {HEAD: "w8g32-sym", EMBEDDING: "w4g32-sym"}
    exported = source(folders["untied"], NIBBLES, FLOAT, rules)
    exporter = build({**describe_settings(exporter_of("gguf")), "type": kind})
    exporter.write(exported, tmp_path)
    tensors = read_header(tmp_path / "model.gguf").tensors
    names = ("token_embd.weight", "output.weight", "blk.0.ffn_up.weight")
    assert {gguf.GGMLQuantizationType(tensors[name].kind).name for name in names} == {kind}
    (found,) = verify(exporter, exported, model_settings(folders["untied"]), 0, tmp_path)
    assert found["difference"] <= TOLERANCE / 100  # measured: 0.0
    assert (found["rounding"] > 0) == (kind == "F16")
