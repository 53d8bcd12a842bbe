"""`import lsiq`: the same as the command line, without it."""

import subprocess
import sys

import pytest
import torch
from helpers.marks import slow
from transformers import AutoModelForCausalLM, AutoTokenizer

import lsiq
from lsiq.errors import ConfigError

SMALL = {"samples": 4, "seqlen": 64}


def test_importing_lsiq_imports_no_torch():
    code = "import sys, lsiq; lsiq.LsiqError; dir(lsiq); sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_lsiq_imports_is_out_of_the_collectors_sight():
    code = "import gc, sys, lsiq; lsiq.load_model; sys.exit(gc.get_freeze_count() < 100_000 or not gc.isenabled())"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_name_that_lsiq_offers_is_there():
    assert all(getattr(lsiq, name) is not None for name in lsiq.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        lsiq.quantise  # noqa: B018


@pytest.mark.parametrize("method", ["gptq", slow("lsi"), slow("rotate"), slow("best")])
def test_quantize_makes_the_blocks_that_a_run_makes_bit_for_bit(method, tmp_path, checkpoints):
    words = ("quant=w3a16", "quant.weight.group=32")
    path, epochs = checkpoints["llama"], {"lsi": 1, "best": 1}.get(method)
    values = {} if epochs is None else {"epochs": epochs}
    quant = lsiq.format("w3a16", "quant.weight.group=32")
    model = lsiq.load_model(path, "model.seqlen=64")
    overrides = ["method.weight_only.start.training.epochs=1"] if method == "best" else []
    made = lsiq.quantize(model, lsiq.recipe(method, *overrides, **values), quant, lsiq.tokens("bundled", **SMALL))
    place = "method.weight_only.training" if method == "best" else "method.training"
    record = lsiq.run(
        *(f"model.path={path}", "model.seqlen=64", *words, f"method={method}", "calib.samples=4", *overrides),
        *([f"{place}.epochs={epochs}"] if epochs else []),
        *("calib=bundled", "eval.windows=2", "tracker=none", f"paths.runs={tmp_path}"),
    )
    assert made.average_bits == record.average_bits
    assert made.calibration == record.calibration
    assert [row["error"] for row in made.reports] == [row["error"] for row in record.blocks]
    assert lsiq.perplexity(made, "bundled", windows=2).value == record.metrics["ppl/bundled@64"]
    assert lsiq.perplexity(model, "bundled", windows=2).value == record.metrics["float/ppl/bundled@64"]


def test_models_say_in_a_line_what_they_are(checkpoints):
    model = lsiq.load_model(checkpoints["llama"], "model.seqlen=64")
    made = lsiq.quantize(model, lsiq.recipe("rtn"), lsiq.format("w3a16", "quant.weight.group=32"))
    assert repr(model) == f"FloatModel({model.name}, llama, 2 blocks, torch.float32 on {model.model.device})"
    assert repr(made) == f"QuantizedModel({model.name}, w3a16g32, rtn, seed 0, {made.average_bits:.3f} bits per weight)"


def test_bits_are_shared_out_as_a_run_does(tmp_path, checkpoints):
    words = ["quant.weight.group=32", "quant.allocate.bits=3.5", "quant.allocate.choices=[w2g32,w4g32]"]
    words += ["quant.allocate.samples=2", "quant.allocate.unit=block", "quant.allocate.rounds=1"]
    model, path = lsiq.load_model(checkpoints["llama"], "model.seqlen=64"), checkpoints["llama"]
    quant = lsiq.format("w3a16", *words)
    made = lsiq.quantize(model, lsiq.recipe("rtn"), quant, lsiq.tokens("bundled", **SMALL))
    record = lsiq.run(
        *(f"model.path={path}", "model.seqlen=64", "quant=w3a16", *words, "method=rtn", "calib.samples=4"),
        *("calib=bundled", "eval=none", "tracker=none", f"paths.runs={tmp_path}"),
    )
    assert made.average_bits == record.average_bits
    assert 2.5 < made.average_bits <= 3.5
    with pytest.raises(lsiq.LsiqError, match=r"calibration=None: quant\.allocate measures"):
        lsiq.quantize(model, lsiq.recipe("rtn"), quant)


def in_memory(checkpoints):
    return AutoModelForCausalLM.from_pretrained(checkpoints["llama"])


def test_a_model_of_transformers_in_memory_needs_no_disk_and_stays_as_it_is(checkpoints):
    module = in_memory(checkpoints)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ids = torch.randint(0, module.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    model = lsiq.load_model(module)
    with torch.no_grad():
        expected = module(input_ids=ids).logits
    assert (model.logits(ids) - expected).abs().max() < 1e-5  # seen: 0 to 5e-7, another kernel of attention
    small = lsiq.quantize(module, lsiq.recipe("gptq"), lsiq.format("w4a16"), ids)
    assert (small.logits(ids) - expected).abs().max() > 0
    assert lsiq.perplexity(small, ids).tokens == 4 * 31
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_model_in_memory_is_exported_and_reads_back(tmp_path, checkpoints):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    model = lsiq.load_model(in_memory(checkpoints), tokenizer=tokenizer)
    small = lsiq.quantize(model, lsiq.recipe("rtn"), lsiq.format("w4a16"))
    found = small.export("plain", tmp_path / "out")
    assert found["status"] == "finished"
    assert found["checks"][0]["difference"] <= found["checks"][0]["tolerance"]


def test_an_export_is_checked_against_the_formats_of_the_model(tmp_path, checkpoints):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model = lsiq.load_model(checkpoints["llama"])
    grid = ("w4a16", "quant.weight.group=32", "quant.weight.symmetric=true")
    fits = lsiq.quantize(model, lsiq.recipe("rtn"), lsiq.format(*grid, "quant.weight.scale=float16"))
    assert fits.export("gguf", tmp_path / "fits")["checks"][0]["status"] == "read"
    with pytest.raises(lsiq.ConfigError, match=r"quant.weight.scale=float32; .*export.round_scales=true"):
        lsiq.quantize(model, lsiq.recipe("rtn"), lsiq.format(*grid)).export("gguf", tmp_path / "wide")


def test_wrong_words_are_the_errors_of_the_command_line(checkpoints):
    with pytest.raises(lsiq.ConfigError, match="quant=w9: no such choice; use one of"):
        lsiq.format("w9")
    with pytest.raises(lsiq.ConfigError, match=r"epoch=3: method lsi has no such setting; it has .*epochs"):
        lsiq.recipe("lsi", epoch=3).method(lsiq.format("w3a16g128"))
    with pytest.raises(lsiq.ConfigError, match=r"method.training.epochs=-1: .*at least 0"):
        lsiq.recipe("lsi", epochs=-1).method(lsiq.format("w3a16g128"))
    with pytest.raises(lsiq.ConfigError, match="sample=4: calib=bundled has no such setting"):
        lsiq.tokens("bundled", sample=4)
    with pytest.raises(lsiq.ConfigError, match="method gptq needs calibration tokens"):
        lsiq.quantize(in_memory(checkpoints), lsiq.recipe("gptq"), lsiq.format("w4a16"))
    with pytest.raises(lsiq.InputError, match="no such folder"):
        lsiq.load_model("nowhere/at-all")


def test_records_are_a_table(tmp_path, checkpoints):
    lsiq.run(
        *(f"model.path={checkpoints['llama']}", "model.seqlen=64", "quant=w4a16", "method=rtn", "calib=none"),
        *("eval.windows=1", "tracker=none", f"paths.runs={tmp_path}"),
    )
    table = lsiq.records(tmp_path)
    assert list(table["method"]) == ["rtn"]
    assert table["ppl/bundled@64"].notna().all()


def test_epochs_and_tokens_of_a_recipe_are_not_given_together() -> None:
    fmt = lsiq.format("w2a16g128")
    twice = lsiq.recipe("best", "method.weight_only.training.tokens=4096", epochs=3)
    with pytest.raises(ConfigError, match=r"method\.weight_only\.training\.tokens=4096: epochs=3 is given as well"):
        twice.method(fmt, (8, 64))
    assert lsiq.recipe("lsi", epochs=5, tokens=None).method(fmt, (8, 64)).training.epochs == 5
