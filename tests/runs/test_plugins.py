"""A method, a part, a number format and a family are added from outside the package: one file each, and its YAML."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.configuration import ROOT
from helpers.marks import product, slow

from lsiq.results.record import read_record

PLUGINS = ROOT / "tests" / "plugins"
RUN = ROOT / "run.py"
SHORT = ("calib=bundled", "calib.samples=4", "calib.seqlen=64", "eval.windows=1", "tracker=none")


def run(tmp_path: Path, *words: str) -> str:
    """Run the program in the folder of plug-ins, and return what it printed."""
    command = [sys.executable, str(RUN), *words, *SHORT, f"paths.runs={tmp_path}"]
    done = subprocess.run(command, cwd=PLUGINS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_family_a_method_and_a_format_from_outside_run_together(tmp_path):
    shown = run(tmp_path, "model=helium-tiny", "quant=w4-coarse", "method=shrunk-range")
    assert "helium-tiny  w4a16-coarse32  shrunk-range" in shown
    record = next(tmp_path.glob("helium-tiny_w4a16-coarse32_shrunk-range_s0_*/record.json")).read_text()
    assert '"average_bits": 4.25' in record  # 4 bits, and 8 bits for each 32 weights


POWERS = [("lqer", "powers"), ("gptq", "powers"), ("awq", "powers"), ("lsi", "powers")]
OTHERS = [("gptq", "coarse"), ("lsi", "coarse"), ("dense", "coarse"), ("awq", "coarse"), ("lqer", "coarse")]
OTHERS += [("autoround", "powers")]


@pytest.mark.parametrize("cases", [slow(POWERS), product(OTHERS)], ids=["powers", "others"])
def test_a_format_from_outside_goes_through_methods_that_know_nothing_of_it(cases, tmp_path):
    """One process carries out all of them: to start takes longer than a run."""
    jobs = []
    for method, fmt in cases:
        learned = ["method.training.epochs=1"] if method in ("lsi", "dense", "autoround") else []
        rank = ["method.rank=4"] if method == "lqer" else []
        words = ["model=helium-tiny", f"quant=w4-{fmt}", f"method={method}", *learned, *rank]
        jobs.append([*words, *SHORT, f"paths.runs={tmp_path / 'runs'}"])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "processes.py"), str(tmp_path / "jobs.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=PLUGINS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [read_record(file.parent) for file in tmp_path.glob("runs/*/record.json")]
    assert all(record.status == "finished" for record in records)
    found = {(record.method, record.config["quant"]["weight"]["_target_"]) for record in records}
    targets = {"powers": "powers.Powers", "coarse": "coarse_steps.CoarseSteps"}
    assert found == {(method, f"lsiq_plugins.{targets[fmt]}") for method, fmt in cases}


@pytest.mark.slow
def test_a_part_from_outside_is_trained_with_others(tmp_path):
    words = ["method=lwc", "+method/part@method.parts.row_scale=row_scale", "method.training.epochs=1"]
    run(tmp_path, "model=helium-tiny", "quant=w4a16", "quant.weight.group=32", *words)
    (block,) = tmp_path.glob("*/blocks/block_000.safetensors")
    from safetensors import safe_open

    with safe_open(block, "pt") as tensors:
        learned = [name for name in tensors.keys() if name.startswith("row_scale:")]  # noqa: SIM118 (is no dict)
        assert len(learned) == 7
        assert tensors.get_tensor(learned[0]).abs().max() > 0


def test_a_target_outside_the_package_and_its_plug_ins_is_refused(tmp_path):
    command = [sys.executable, str(RUN), "method._target_=os.path.join", f"paths.runs={tmp_path}"]
    done = subprocess.run(command, cwd=PLUGINS, capture_output=True, text=True)
    assert "only classes of the package lsiq may be built" in done.stderr
