"""Rules and plans give linears formats of their own; what they name has to be there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lsiq.errors import ConfigError, InputError
from lsiq.formats.activation import Activation
from lsiq.formats.fp8 import FP8
from lsiq.formats.integer import Integer
from lsiq.formats.mxfp import MXFP
from lsiq.formats.mxint import MXInt
from lsiq.formats.names import format_name, named_format
from lsiq.formats.nvfp4 import NVFP4
from lsiq.formats.placed import PlacedQuant, place
from lsiq.formats.quant import QuantSettings
from lsiq.settings import fill

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def settings(*rules: dict, **changes: object) -> QuantSettings:
    values = {"weight": Integer(bits=3, group=32), "activation": Activation(), "rules": list(rules), **changes}
    return fill(QuantSettings, values, "quant")


def placed(*rules: dict, depth: int = 4, **changes: object) -> dict[str, str]:
    found = place(settings(*rules, **changes), depth, LINEARS, "some model")
    assert isinstance(found, PlacedQuant)
    return {name: str(format_name(fmt)) for name, fmt in found.layers.items()}


def test_a_rule_gives_its_format_to_the_blocks_and_linears_that_it_names() -> None:
    found = placed({"match": "*.down_proj", "blocks": "0,-1", "format": "w8g32"})
    assert {name for name, fmt in found.items() if fmt == "w8g32"} == {"0.mlp.down_proj", "3.mlp.down_proj"}
    assert {fmt for name, fmt in found.items() if not name.endswith("down_proj")} == {"w3g32"}


def test_ranges_leave_their_end_out_and_the_last_rule_counts() -> None:
    found = placed({"blocks": "1:3", "format": "w4g32"}, {"match": "self_attn.*", "blocks": "2:", "format": "float"})
    assert [found[f"{index}.self_attn.q_proj"] for index in range(4)] == ["w3g32", "w4g32", "float", "float"]
    assert [found[f"{index}.mlp.down_proj"] for index in range(4)] == ["w3g32", "w4g32", "w4g32", "w3g32"]


def test_a_number_alone_is_a_block() -> None:
    assert placed({"blocks": -1, "format": "float"})["3.mlp.down_proj"] == "float"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            {"match": "*.fc1", "format": "w8g32"},
            r"quant\.rules\[0\]\.match=\*\.fc1: matches no linear .* mlp\.down_proj",
        ),
        ({"blocks": "7", "format": "w8g32"}, r"quant\.rules\[0\]\.blocks=7: some model has blocks 0 to 3"),
        ({"match": "lm_head", "blocks": "0", "format": "w8g32"}, r"lm_head lies in no block; leave blocks out"),
        ({"blocks": "first", "format": "w8g32"}, r"quant\.rules\.0\.blocks=first: first is no block"),
        ({"format": "w9"}, r"quant\.rules\.0\.format=w9: no weight format is called w9"),
        ({"matches": "*", "format": "w8"}, r"matches.*no such setting"),
    ],
)
def test_a_rule_that_means_nothing_is_one_line(rule: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        place(settings(rule), 4, LINEARS, "some model")


def test_a_format_by_name_takes_the_width_of_scales_from_the_weights() -> None:
    found = place(settings({"format": "w8g32"}, weight=Integer(bits=3, group=32, scale="float16")), 1, LINEARS, "m")
    assert found.in_block(0).of("mlp.down_proj.weight") == Integer(bits=8, group=32, scale="float16")


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        ("w3g128", Integer(bits=3, group=128)),
        ("w4g64-sym", Integer(bits=4, group=64, symmetric=True)),
        ("w8", Integer(bits=8)),
        ("float", Integer(bits=16)),
        ("w4-mxint", MXInt(bits=4)),
        ("mxfp4", MXFP(element="e2m1")),
        ("mxfp6", MXFP(element="e2m3")),
        ("nvfp4", NVFP4()),
        ("fp8", FP8()),
    ],
)
def test_names_of_formats_go_both_ways(name: str, fmt: object) -> None:
    assert named_format(name) == fmt
    assert format_name(named_format(name)) == name


def test_a_file_of_settings_names_its_weight_format() -> None:
    assert named_format("w4a8-mxint") == MXInt(bits=4)


def test_what_a_name_does_not_say_is_written_out() -> None:
    assert format_name(MXFP(element="e2m1", block=16)) == {
        "_target_": "lsiq.formats.mxfp.MXFP",
        "element": "e2m1",
        "block": 16,
        "rule": "even",
    }
    assert format_name(Integer(bits=3, scale="float16")) == {
        "_target_": "lsiq.formats.integer.Integer",
        "bits": 3,
        "group": None,
        "symmetric": False,
        "scale": "float16",
    }


def test_formats_are_not_told_before_the_rules_are_placed() -> None:
    with pytest.raises(AssertionError, match="placed on a model first"):
        settings({"format": "w8"}).of("mlp.down_proj")


def test_a_plan_gives_each_linear_its_format_and_rules_have_the_last_word(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    layers = {f"{index}.{name}": "w2g32" for index in range(2) for name in LINEARS}
    plan.write_text(json.dumps({"layers": layers}))
    found = placed({"match": "*.o_proj", "format": "w8g32"}, depth=2, plan=str(plan))
    assert {found[f"{index}.self_attn.o_proj"] for index in range(2)} == {"w8g32"}
    assert found["1.mlp.down_proj"] == "w2g32"


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": {"0.mlp.down_proj": "w2g32"}}))
    with pytest.raises(ConfigError, match=r"lacks 0\.self_attn\.o_proj, and some model has 12 linears"):
        placed(plan=str(plan))
    plan.write_text("[]")
    with pytest.raises(InputError, match="is no plan"):
        placed(plan=str(plan))
    with pytest.raises(InputError, match="cannot be read"):
        placed(plan=str(tmp_path / "none.json"))


def test_names_of_settings_say_how_linears_came_by_their_formats() -> None:
    assert settings().name == "w3a16g32"
    assert settings({"format": "w8"}).name == "w3a16g32-rules"
    assert settings(allocate={"bits": 2.5}).name == "mixed2.5a16"
    assert settings({"format": "w8"}, plan="some.json").name == "mixeda16-rules"
    assert settings(kv={"bits": 8, "group": 16}).name == "w3a16g32-kv8g16"
    with pytest.raises(ConfigError, match=r"plan=some\.json: the formats are chosen already"):
        settings(plan="some.json", allocate={"bits": 3.0})
    with pytest.raises(ConfigError, match=r"bits=3\.0: and bytes=10 are two limits"):
        settings(allocate={"bits": 3.0, "bytes": 10})
