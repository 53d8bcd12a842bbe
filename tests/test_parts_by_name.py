"""Parts of a method are settings by name; positions, as older commands have them, mean the same."""

import json

import pytest
from conftest import CONF

from lsiq.cli.compose import compose
from lsiq.errors import ConfigError
from lsiq.experiment.composed import plain_config
from lsiq.experiment.config import parse


def test_a_part_is_changed_by_its_name_and_by_its_old_position_alike():
    by_name = compose("method=lsi", "method.parts.clip.lr=0.5")
    by_position = compose("method=lsi", "method.parts.2.lr=0.5")
    assert plain_config(by_name) == plain_config(by_position)
    assert [part["lr"] for part in plain_config(by_name)["method"]["parts"]][2] == 0.5
    assert compose("method=lsi", "method.parts[2].lr=0.5") == by_name


def test_positions_reach_nested_methods():
    cfg = compose("method=best", "method.weight_only.start.parts.0.lr=0.25")
    assert cfg.method.weight_only.start.parts.dense.lr == 0.25


def test_a_position_that_is_not_there_says_which_parts_are():
    there = r"parts\.7\.lr=1: the method has 4 parts: singular, equivalent, clip, rounding"
    with pytest.raises(ConfigError, match=there):
        compose("method=lsi", "method.parts.7.lr=1")


def test_an_error_in_a_part_names_the_part():
    with pytest.raises(ConfigError, match=r"method\.parts\.clip\.lr=-1"):
        parse(compose("method=lsi", "method.parts.clip.lr=-1"))


def test_a_part_may_be_added_to_a_method_by_its_file():
    cfg = compose("method=lwc", "+method/part@method.parts.rounding=rounding")
    assert [part.name for part in parse(cfg).method.parts] == ["clip", "rounding"]


def test_parts_may_be_given_as_a_list():
    parts = "[{_target_:lsiq.parts.clip.Clip,lr:0.03,search:true}]"
    assert parse(compose("method=dense", f"method.parts={parts}")).method.parts[0].search


def test_every_part_has_one_preset_and_every_learned_method_takes_its_parts_from_presets():
    presets = {file.stem for file in (CONF / "method" / "part").glob("*.yaml")}
    targets = {name: f"_target_: lsiq.parts.{name}." for name in presets}
    assert all(target in (CONF / "method" / "part" / f"{name}.yaml").read_text() for name, target in targets.items())
    for file in (CONF / "method").glob("*.yaml"):
        if "Learned" in (text := file.read_text()):
            assert "- _target_: lsiq.parts" not in text, file


def test_a_record_holds_parts_in_their_order():
    plain = plain_config(compose("method=lsi"))
    assert isinstance(plain["method"]["parts"], list)  # what names a run: the same as ever
    assert json.dumps(plain["method"]["parts"][0])
