"""What precision=auto stands for, that the record says it, and what depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.configuration import compose_run
from helpers.learned import W2, fresh, schedule_of, setting
from omegaconf import DictConfig

from lsiq.experiment.composed import plain_config
from lsiq.experiment.config import parse
from lsiq.experiment.precision import precision_of
from lsiq.experiment.run import run
from lsiq.experiment.stamp import stamp
from lsiq.learning.learner import learn
from lsiq.parts.clip import Clip
from lsiq.report.compact import compact
from lsiq.results.record import Record
from lsiq.runtime.precision import Choice, bfloat16_features, fastest
from lsiq.tables.protocol import contradiction

CLIP = Clip(lr=1e-2, start_logit=4.0, form="sigmoid", search=False)
CPU = torch.device("cpu")
ASK = (
    "import torch; from lsiq.runtime.precision import fastest; "
    "print(fastest(torch.device('cpu'), torch.float32).chosen)"
)


def test_auto_is_bfloat16_only_where_the_cpu_has_instructions_for_it() -> None:
    choice = fastest(CPU, torch.float32)
    assert choice.chosen in (["float32", "bfloat16"] if bfloat16_features() else ["float32"])
    assert "bfloat16" in choice.why or all(name in choice.why for name in bfloat16_features())


def test_auto_is_float32_where_bfloat16_is_emulated() -> None:
    """With its kernels held to AVX2, any x86 CPU emulates bfloat16: 5 times as slow as float32 on a Zen 4."""
    held = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    asked = subprocess.run(
        [sys.executable, "-c", ASK], env={**os.environ, **held}, capture_output=True, text=True, check=True
    )
    if torch.cpu.get_capabilities().get("architecture") == "x86_64":
        assert asked.stdout.strip() == "float32"
    else:  # neither switch holds back other CPUs
        assert asked.stdout.strip() in ("float32", "bfloat16")


def test_a_model_in_half_precision_is_trained_in_its_own() -> None:
    assert fastest(CPU, torch.float16).chosen == "float16"


def test_a_machine_keeps_what_it_found_and_mends_a_damaged_note(tmp_path: Path) -> None:
    found = fastest(CPU, torch.float32, tmp_path / "a")
    (file,) = (tmp_path / "a" / "precision").iterdir()
    other = "float32" if found.chosen == "bfloat16" else "bfloat16"
    for content, expected in ((f'{{"chosen": "{other}", "why": "noted"}}', Choice(other, "noted")), ("{", found)):
        cache = tmp_path / expected.chosen
        (cache / "precision").mkdir(parents=True)
        (cache / "precision" / file.name).write_text(content)
        assert fastest(CPU, torch.float32, cache) == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_auto_trains_as_what_it_stands_for(checkpoint: Path, tmp_path: Path, name: str) -> None:
    cache = noted(tmp_path, name)
    block, context = setting(checkpoint)
    auto = learn((CLIP,), schedule_of(precision="auto"), block, W2, replace(context, cache=cache))
    named = learn((CLIP,), schedule_of(precision=name), block, W2, replace(context, generator=fresh()))
    assert [epoch.loss for epoch in auto.epochs] == [epoch.loss for epoch in named.epochs]
    for one, other in zip(auto.states, named.states, strict=True):
        assert all(torch.equal(one.parameters[key], other.parameters[key]) for key in one.parameters)


def noted(tmp_path: Path, name: str) -> Path:
    """A cache in which this machine has noted a precision."""
    fastest(CPU, torch.float32, tmp_path / "found")
    (file,) = (tmp_path / "found" / "precision").iterdir()
    cache = tmp_path / "noted"
    (cache / "precision").mkdir(parents=True)
    (cache / "precision" / file.name).write_text(f'{{"chosen": "{name}", "why": "noted"}}')
    return cache


def test_the_record_says_what_auto_stood_for(
    small_run: Callable[..., DictConfig], checkpoint: Path, tmp_path: Path
) -> None:
    cache = noted(tmp_path, "bfloat16")
    config = small_run(checkpoint, "method=lwc", "method.training.epochs=1", f"paths.cache={cache}")
    record = run(config)
    assert record.training_precision == {"chosen": "bfloat16", "why": "noted"}
    assert compact(record).get("method.training.precision") == "bfloat16"
    named = run(small_run(checkpoint, "method=lwc", "method.training.epochs=1", "method.training.precision=bfloat16"))
    assert named.training_precision == {}, "nothing was left to the machine"
    assert named.metrics == record.metrics


def test_blocks_of_another_precision_are_made_anew() -> None:
    record = Record("id", "running", "", {}, 0, {})
    stamps = {stamp(replace(record, training_precision={"chosen": name})) for name in ("float32", "bfloat16")}
    assert len(stamps | {stamp(record)}) == 3


@pytest.mark.parametrize(
    ("overrides", "asks"),
    [
        (["method=best"], True),  # its start trains block by block
        (["method=rotate", "method@method.then=omniquant"], True),
        (["method=gptq"], False),  # its auto is that of a factorisation
        (["method=lsi", "method.training.precision=float32"], False),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_auto_is_found_wherever_in_a_method_it_stands(overrides: list[str], asks: bool) -> None:
    method = parse(compose_run(*overrides)).method
    assert (precision_of(method, CPU, torch.float32, None) is not None) == asks


@pytest.mark.parametrize(
    ("had", "wanted", "same"),
    [
        ("auto", "model", True),  # in a record that says no more
        ("float32", "model", False),
        ("bfloat16", "auto", True),
        ("bfloat16", "float32", False),
    ],
)
def test_training_through_the_model_is_compared_by_its_precision(had: str, wanted: str, same: bool) -> None:
    target = {"_target_": "lsiq.methods.learned.Course"}
    key = contradiction({**target, "precision": had}, {**target, "precision": wanted}, "training")
    assert key == (None if same else "training.precision")


def test_the_first_run_stays_out_of_the_studys_tables() -> None:
    composed = {group: plain_config(compose_run())[group] for group in ("calib", "method")}
    assert composed["method"]["label"] == "lsi-quick"
    study = {
        group: plain_config(compose_run("sweep=study", "method=lsi-corner"))[group] for group in ("calib", "method")
    }
    assert contradiction(composed["method"], study["method"], "method") is not None
