"""Whole runs whose linears have formats of their own: by rules, by a plan, by sensitivity."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.configuration import compose_run
from helpers.interruption import at_rename, interrupt
from omegaconf import DictConfig

import lsiq.experiment.sharing
from lsiq.errors import ConfigError
from lsiq.experiment.composed import plain_config
from lsiq.experiment.config import parse
from lsiq.experiment.identity import run_id
from lsiq.experiment.run import run
from lsiq.formats.integer import Integer
from lsiq.results.record import Record
from lsiq.results.store import BlockStore

SmallRun = Callable[..., DictConfig]
CHOICES = "quant.allocate.choices=[w2g32,w4g32,w8g32]"


@pytest.fixture
def model(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["llama"]


def folder_of(record: Record, tmp_path: Path) -> Path:
    return tmp_path / "runs" / record.run_id


def formats_of(record: Record, tmp_path: Path) -> dict[str, Integer]:
    store = BlockStore(folder_of(record, tmp_path) / "blocks")
    return {
        f"{index}.{name.removesuffix('.weight')}": weight.format  # type: ignore[misc]
        for index in range(2)
        for name, weight in store.read(index).weights.items()
    }


def test_settings_that_came_later_leave_the_names_of_runs_as_they_were() -> None:
    """The name of a run is a hash of what its configuration held before they came."""
    config = compose_run("method=rtn", "tracker=none", "quant=w3a16g128")
    plain = plain_config(config)
    before = {**plain, "quant": {key: plain["quant"][key] for key in ("weight", "activation")}}
    assert set(plain["quant"]) > {"kv", "rules", "plan", "allocate"}
    assert run_id(parse(config), plain, {}) == run_id(parse(config), before, {})
    assert run_id(parse(compose_run("method=rtn", "quant.kv.bits=8")), plain, {}) != run_id(parse(config), plain, {})


@pytest.mark.parametrize(
    "method",
    [
        "rtn",
        "awq",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("gptq", "lqer", "lwc", "smoothquant", "rotate")),
    ],
)
def test_each_linear_gets_its_format_and_average_bits_count_it(
    method: str, model: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    rules = '[{match: "*.down_proj", format: w8g32}, {match: self_attn.q_proj, blocks: "-1", format: float}]'
    words = [f"method={method}", f"quant.rules={rules}", "eval.rtn=false"]
    words += ["method.training.epochs=1"] if method == "lwc" else []
    record = run(small_run(model, *words))
    found = formats_of(record, tmp_path)
    assert "1.self_attn.q_proj" not in found
    assert {fmt.bits for name, fmt in found.items() if name.endswith("down_proj")} == {8}
    assert {fmt.bits for name, fmt in found.items() if not name.endswith("down_proj")} == {3}
    shapes = {"q_proj": 96 * 96, "k_proj": 32 * 96, "v_proj": 32 * 96, "o_proj": 96 * 96}
    shapes |= {"gate_proj": 160 * 96, "up_proj": 160 * 96, "down_proj": 96 * 160}
    weights = 2 * sum(shapes.values())
    wide, float_ = 2 * shapes["down_proj"], shapes["q_proj"]
    bits = (weights - wide - float_) * (3 + 19 / 32) + wide * (8 + 24 / 32) + float_ * 16
    if method not in ("lqer", "rotate"):  # whose branches and rotations count as well
        assert record.average_bits == pytest.approx(bits / weights, rel=1e-9)
    assert record.run_id.split("_")[1] == "w3a16g32-rules"
    assert record.metrics["excess/file@64"] < 1.0


def test_a_block_that_stays_in_float_is_left_out(model: Path, small_run: SmallRun) -> None:
    record = run(small_run(model, 'quant.rules=[{blocks: "0", format: float}]', "method=gptq"))
    assert record.blocks[0]["average_bits"] == 16
    assert record.blocks[0]["error"] == 0
    assert record.blocks[1]["error"] > 0


def test_a_rule_that_matches_nothing_ends_the_run_before_anything_is_loaded(
    model: Path, small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lsiq.experiment.stages, "load", pytest.fail)
    with pytest.raises(
        ConfigError, match=r"quant\.rules\[0\]\.match=fc1: matches no linear of llama; there are self_attn"
    ):
        run(small_run(model, "quant.rules=[{match: fc1, format: w8g32}]"))


def test_bits_are_shared_out_once_and_the_plan_serves_other_methods(
    model: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quant.allocate.bits=4.0", CHOICES, "quant.allocate.samples=2"]
    record = run(small_run(model, *words))
    folder = folder_of(record, tmp_path)
    plan = json.loads((folder / "plan.json").read_text())
    assert record.run_id.startswith("llama_mixed4a16_rtn_s0_")
    assert record.average_bits == pytest.approx(plan["average_bits"])
    assert 3.7 < plan["average_bits"] <= 4.0
    assert record.plan["digest"]
    assert sum(record.plan["counts"].values()) == 14
    assert len(record.plan["counts"]) > 1
    assert len(plan["sensitivities"]) == 14
    assert (folder / "plan.svg").is_file() == (find_spec("matplotlib") is not None)

    monkeypatch.setattr(lsiq.experiment.sharing, "measure", pytest.fail)  # what was measured is in the cache
    tighter = run(small_run(model, "quant.allocate.bits=3.0", *words[1:]))
    assert tighter.average_bits is not None
    assert tighter.average_bits <= 3.0
    other = run(small_run(model, "method=gptq", f"quant.plan={folder / 'plan.json'}"))
    assert other.inputs["quant.plan"]
    assert other.average_bits == record.average_bits
    assert formats_of(other, tmp_path) == formats_of(record, tmp_path)
    rules = [f"quant.plan={folder / 'plan.json'}", 'quant.rules=[{match: "*.v_proj", format: w8g32}]']
    ruled = formats_of(run(small_run(model, *rules)), tmp_path)
    assert {fmt.bits for name, fmt in ruled.items() if name.endswith("v_proj")} == {8}


def test_a_plan_may_be_measured_again_as_the_method_rounds(model: Path, small_run: SmallRun, tmp_path: Path) -> None:
    words = ["method=gptq", "quant.allocate.bits=3.5", CHOICES, "quant.allocate.samples=2", "quant.allocate.rounds=2"]
    record = run(small_run(model, *words, "quant.allocate.rounding=method"))
    measured = record.plan["measured"]
    assert measured == sorted(measured, reverse=True)
    assert record.average_bits is not None
    assert record.average_bits <= 3.5
    request = json.loads((folder_of(record, tmp_path) / "plan.json").read_text())["request"]
    assert request["rounding"]["method"] == "gptq"
    with pytest.raises(ConfigError, match=r"quant\.allocate\.rounding=method: method awq changes more than the codes"):
        run(small_run(model, "method=awq", "quant.allocate.bits=3.5", CHOICES, "quant.allocate.rounding=method"))


def test_a_limit_below_the_smallest_choice_is_one_line(model: Path, small_run: SmallRun) -> None:
    with pytest.raises(
        ConfigError, match=r"quant\.allocate\.bits=2\.1: the smallest of the choices takes 2\.5625 bits"
    ):
        run(small_run(model, "quant.allocate.bits=2.1", CHOICES))
    with pytest.raises(ConfigError, match=r"quant\.allocate\.bytes=1000: the smallest .* give 45264 or more"):
        run(small_run(model, "quant.allocate.bytes=1000", CHOICES))


def test_what_cannot_be_exported_is_said_before_sensitivities_are_measured(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    plan = ("quant.allocate.bits=4", "quant.allocate.choices=[w2g32,w4g32]")
    with pytest.raises(ConfigError, match=r"export=gguf: writes llama, .* models, not opt"):
        run(small_run(checkpoints["opt"], *plan, "export=gguf", "export.round_scales=true"))
    (file,) = (tmp_path / "runs").glob("*/record.json")
    assert set(json.loads(file.read_text())["seconds"]) <= {"load", "total"}


def test_a_head_that_groups_do_not_divide_is_said_before_the_model_is_loaded(
    checkpoints: dict[str, Path], small_run: SmallRun, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"w8g36 does not divide word_embed_proj_dim=96 of opt .lm_head.; use w8g32"):
        run(small_run(checkpoints["opt"], "quant.rules=[{match: lm_head, format: w8g36}]"))
    (file,) = (tmp_path / "runs").glob("*/record.json")
    assert "load" not in json.loads(file.read_text())["seconds"]


def test_bytes_and_rules_hold_together(model: Path, small_run: SmallRun, tmp_path: Path) -> None:
    words = ["quant.allocate.bytes=80000", CHOICES, "quant.allocate.samples=1", "quant.allocate.measure=fisher"]
    record = run(
        small_run(model, *words, 'quant.rules=[{match: "*.o_proj", format: w8g32}]', "quant.allocate.unit=stage")
    )
    found = formats_of(record, tmp_path)
    assert {fmt.bits for name, fmt in found.items() if name.endswith("o_proj")} == {8}
    assert len({found[f"0.self_attn.{name}_proj"].bits for name in "qkv"}) == 1
    weights = 2 * (2 * 96 * 96 + 2 * 32 * 96 + 3 * 160 * 96)
    assert record.average_bits is not None
    assert 70000 < record.average_bits * weights / 8 <= 80000


def test_head_and_embeddings_are_rounded_where_a_rule_names_them(model: Path, small_run: SmallRun) -> None:
    plain = run(small_run(model))
    words = "[{match: lm_head, format: w4g32}, {match: embed_tokens, format: w8g32}]"
    rounded = run(small_run(model, f"quant.rules={words}", "eval.rtn=false"))
    key = "ppl/file@64"
    assert rounded.metrics[f"float/{key}"] == plain.metrics[f"float/{key}"]
    assert rounded.metrics[key] != plain.metrics[key]
    assert rounded.blocks[0]["error"] != plain.blocks[0]["error"], (
        "the quantised stream begins at the rounded embeddings"
    )
    assert rounded.cost["checkpoint_bytes"] < 0.6 * plain.cost["checkpoint_bytes"]
    table = 4096 * 96
    linears = 2 * (2 * 96 * 96 + 2 * 32 * 96 + 3 * 160 * 96)
    bits = linears * (3 + 19 / 32) + table * (4 + 20 / 32) + table * (8 + 24 / 32)
    assert rounded.average_bits == pytest.approx(bits / (linears + 2 * table))


def test_a_matrix_that_is_head_and_embeddings_has_one_format(checkpoints: dict[str, Path], small_run: SmallRun) -> None:
    rule = "{match: lm_head, format: w4g32}"
    with pytest.raises(ConfigError, match="are one matrix and cannot have two formats"):
        run(small_run(checkpoints["opt"], f"quant.rules=[{rule}, {{match: embed_tokens, format: w8g32}}]"))
    record = run(small_run(checkpoints["opt"], f"quant.rules=[{rule}]"))
    assert record.metrics["excess/file@64"] != 0


def test_keys_and_values_alone_are_rounded(model: Path, small_run: SmallRun) -> None:
    coarse = run(small_run(model, "quant=fp16", "quant.weight.group=null", "quant.kv.bits=2"))
    fine = run(small_run(model, "quant=fp16", "quant.weight.group=null", "quant.kv.bits=8"))
    tokens = run(
        small_run(
            model,
            "quant=fp16",
            "quant.weight.group=null",
            "quant.kv.bits=8",
            "quant.kv.per=channel",
            "quant.kv.group=8",
        )
    )
    assert coarse.run_id.split("_")[1] == "fp16-kv2"
    assert tokens.run_id.split("_")[1] == "fp16-kv8t8"
    assert coarse.average_bits == 16
    assert coarse.metrics["kl/file@64"] > 100 * fine.metrics["kl/file@64"] > 0
    assert 0 < tokens.metrics["kl/file@64"] < coarse.metrics["kl/file@64"] / 100


@pytest.mark.slow
@pytest.mark.parametrize("export", ["compressed-tensors", "gguf", "plain"])
def test_an_export_leads_back_to_its_record(export: str, model: Path, small_run: SmallRun, tmp_path: Path) -> None:
    words = ["quant.allocate.bits=3.6", "quant.allocate.choices=[w2g32,w3g32,w4g32-sym]", "quant.allocate.samples=1"]
    words += ["quant.weight.scale=float16"]
    record = run(small_run(model, *words))
    cfg = compose_run(f"from={record.run_id}", f"export={export}", f"paths.runs={tmp_path / 'runs'}", "tracker=none")
    exported = run(cfg, [f"from={record.run_id}", f"export={export}"])
    (check,) = exported.exports[export]["checks"]
    assert check["difference"] <= 1e-5  # measured: 0.0
    origin = json.loads((Path(exported.exports[export]["folder"]) / "lsiq.json").read_text())
    assert origin["run_id"] == record.run_id
    assert origin["inputs"] == record.inputs
    assert origin["plan_digest"] == record.plan["digest"]
    assert origin["plan"] == json.loads((folder_of(record, tmp_path) / "plan.json").read_text())["layers"]
    assert any(name.endswith((".safetensors", ".gguf")) for name in origin["files"])


@pytest.mark.slow
def test_a_dry_run_says_what_sharing_bits_out_takes(small_run: SmallRun, model: Path) -> None:
    record = run(small_run(model, "dry_run=true", "quant.allocate.bits=4.0", CHOICES, "quant.allocate.samples=2"))
    assert record.seconds["allocate"] > 0
    with pytest.raises(ConfigError, match="matches no linear"):
        run(small_run(model, "dry_run=true", "quant.rules=[{match: fc1, format: w8g32}]"))


def test_a_run_that_stopped_goes_on_with_the_formats_it_had_chosen(
    model: Path, small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quant.allocate.bits=4.0", CHOICES, "quant.allocate.samples=1", "paths.cache=null"]
    undisturbed = run(small_run(model, *words, f"paths.runs={tmp_path / 'other'}"))
    with at_rename("block_001.safetensors", interrupt), pytest.raises(KeyboardInterrupt):
        run(small_run(model, *words))
    monkeypatch.setattr(lsiq.experiment.sharing, "measure", pytest.fail)  # the plan lies beside the record
    again = run(small_run(model, *words))
    assert again.status == "finished"
    assert again.metrics == undisturbed.metrics
    assert again.plan == undisturbed.plan
