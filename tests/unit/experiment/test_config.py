"""Every configuration file composes to settings, and wrong ones are answered without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.configuration import CONF, compose_run
from helpers.marks import slow

from lsiq.errors import ConfigError
from lsiq.experiment.composed import plain_config
from lsiq.experiment.config import parse
from lsiq.experiment.identity import run_id
from lsiq.methods.finetune import FineTune
from lsiq.methods.learned import Learned
from lsiq.methods.rotate import Rotate

FILES = sorted(
    (file.parent.name, file.stem)
    for group in CONF.iterdir()
    if group.is_dir() and group.name != "base"  # what other files begin with
    for file in group.glob("*.yaml")
)


# Model files differ in sizes alone. Methods that train single blocks are composed by tests/conformance/test_methods.py,
# and studies by tests/runs/test_sweeps.py.
QUICK = {"model": {"tiny-llama", "opt-125m"}, "method": {"best", "e2e"}, "sweep": {"baselines"}}


@pytest.mark.parametrize(
    ("group", "choice"),
    [file if file[1] in QUICK.get(file[0], {file[1]}) else slow(*file) for file in FILES],
    ids=lambda part: part,
)
def test_every_file_composes_to_checked_settings(group: str, choice: str, text_file: Path) -> None:
    overrides = [f"{group}={choice}"]
    if choice == "file":
        overrides.append(f"{group}.path={text_file}")
    if "run: ???" in (CONF / group / f"{choice}.yaml").read_text():
        overrides.append("method.run=some-run")
    if (group, choice) == ("calib", "mix"):
        overrides.append("calib.mix.bundled=1")  # there is no mixture that everybody wants
    if (group, choice) == ("calib", "none"):
        overrides.append("method=rtn")  # the default method needs calibration tokens
    if group == "export":
        overrides.append("quant.weight.scale=float16")
    if group == "sweep":  # a study of texts of yours names them in its command
        head = (CONF / group / f"{choice}.yaml").read_text().partition("\nhydra:\n")[0]
        overrides += [f"{key}.path={text_file}" for key in ("calib", "eval") if f" {key}.path=" in head]
    config = parse(compose_run(*overrides))
    assert config.model.seqlen >= 8
    if group == "quant":
        assert config.quant.name == choice


@pytest.mark.parametrize(("group", "choice"), FILES, ids=lambda part: part)
def test_every_file_begins_with_what_it_is(group: str, choice: str) -> None:
    lines = (CONF / group / f"{choice}.yaml").read_text().splitlines()
    first = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_the_best_recipe_follows_the_format() -> None:
    chosen = {quant: parse(compose_run("method=best", f"quant={quant}")).method for quant in ("w2a16g128", "w4a4")}
    assert {quant: method.start.name for quant, method in chosen.items()} == {
        "w2a16g128": "best-blocks",
        "w4a4": "smoothquant+rotate+best-blocks",
    }
    assert {method.name for method in chosen.values()} == {"best"}
    plain = plain_config(compose_run("method=best", "quant=w4a4"))
    assert "weight_only" not in plain["method"]  # the record holds what was carried out


@pytest.mark.parametrize(
    ("quant", "start"),
    [
        ("fp8", "smoothquant+rotate+best-blocks"),
        ("mxfp4", "rotate+best-blocks"),
        ("nvfp4", "best-blocks"),
        ("w4a8-mxint", "best-blocks"),
    ],
)
def test_the_best_recipe_rotates_inside_wide_blocks_and_not_in_narrow_ones(quant: str, start: str) -> None:
    method = parse(compose_run("method=best", f"quant={quant}")).method
    assert isinstance(method, FineTune)
    assert method.start is not None
    assert method.start.name == start
    if isinstance(method.start, Rotate):
        assert method.start.block == 32


@pytest.mark.parametrize(
    ("quant", "rate"),
    [("w4a4", (0.075, "step")), ("w8a8", (0.075, "step")), ("mxfp4", (1e-3, "value")), ("nvfp4", (1e-3, "value"))],
)
def test_the_best_recipe_learns_shifts_beside_quantised_activations(quant: str, rate: tuple[float, str]) -> None:
    method = parse(compose_run("method=best", f"quant={quant}")).method
    while not isinstance(method, Learned):
        method = method.start if isinstance(method, FineTune) else method.then  # type: ignore[attr-defined]
    assert [part.name for part in method.parts] == ["dense", "clip", "equivalent"]
    assert method.parts[-1].only_with_shifts
    assert (method.parts[-1].lr, method.parts[-1].unit) == rate


def test_the_best_recipe_for_floating_point_weights_alone_is_that_of_integers() -> None:
    method = parse(compose_run("method=best", "quant=w4a16-mxfp4", "method.weight_only.scales=null")).method
    assert isinstance(method, FineTune)
    assert method.start is not None
    assert method.start.name == "best-blocks"


WITHOUT_TORCH = """
import importlib, json, sys
jobs, modules = json.loads(sys.argv[1])
import lsiq.experiment.run
from lsiq.cli.compose import compose
from lsiq.experiment.config import parse
for words in jobs:
    parse(compose(*words))
for module in modules:
    importlib.import_module(module)
heavy = {'torch', 'transformers', 'numpy', 'pandas', 'scipy', 'sympy', 'huggingface_hub', 'wandb', 'datasets'}
assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))
"""


def test_settings_are_checked_without_importing_torch() -> None:
    """The first file of each class is composed; the modules of all classes are imported."""
    jobs: dict[str, list[str]] = {}
    modules: set[str] = set()
    for file in sorted(file for group in ("method", "export") for file in (CONF / group).rglob("*.yaml")):
        text = file.read_text()
        for target in re.findall(r"^ *_target_: (\S+)$", text, re.M):
            modules.add(target.rpartition(".")[0])
            if file.parent.parent == CONF:
                words = [f"{file.parent.name}={file.stem}", "quant.weight.scale=float16"]
                jobs.setdefault(target, words + (["method.run=x"] if "run: ???" in text else []))
    assert len(jobs) > 10
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps([list(jobs.values()), sorted(modules)])]
    subprocess.run(command, check=True)


def test_a_run_is_named_by_what_decides_its_numbers() -> None:
    def name(*overrides: str, **inputs: str) -> str:
        cfg = compose_run(*overrides)
        return run_id(parse(cfg), plain_config(cfg), inputs)

    base = name()
    assert base.startswith("tiny-llama_w3a16g128_")
    for same in ("tracker=none", "paths.runs=/elsewhere", "force=true", "trace=true", "tracker.group=study"):
        assert name(same) == base, same
    for other in ("seed=1", "quant.weight.bits=2", "calib.samples=3", "eval.seqlen=256", "model=tiny-opt"):
        assert name(other) != base, other
    assert name(model="another checkpoint") != base


def test_windows_drawn_at_random_are_named_as_before_there_was_a_choice() -> None:
    cfg = compose_run("calib.windows=random")
    plain = plain_config(cfg)
    name = run_id(parse(cfg), plain, {})
    del plain["calib"]["windows"]
    assert run_id(parse(cfg), plain, {}) == name
    disjoint = compose_run("calib.windows=disjoint")
    assert run_id(parse(disjoint), plain_config(disjoint), {}) != name


@pytest.mark.parametrize(
    ("corpus", "windows"),
    [("bundled", "disjoint"), ("augmented", "disjoint"), ("file", "disjoint"), ("mix", "disjoint"), ("c4", "random")],
)
def test_no_token_of_a_text_at_hand_is_drawn_twice_unless_asked_for(corpus: str, windows: str) -> None:
    """Hub corpora are drawn as the papers draw them."""
    assert plain_config(compose_run(f"calib={corpus}"))["calib"]["windows"] == windows


def test_runs_from_before_templates_and_mixtures_keep_their_names(text_file: Path) -> None:
    cfg = compose_run("calib=file", f"calib.path={text_file}")
    plain = plain_config(cfg)
    assert "template" in plain["calib"]
    name = run_id(parse(cfg), plain, {})
    del plain["calib"]["template"]
    assert run_id(parse(cfg), plain, {}) == name
    rendered = compose_run("calib=file", f"calib.path={text_file}", "calib.template=true")
    assert run_id(parse(rendered), plain_config(rendered), {}) != name


@pytest.mark.parametrize("overrides", [["method=gptq"], ["method=rotate", "method@method.then=gptq"]])
def test_runs_of_gptq_from_before_its_kernels_keep_their_names(overrides: list[str]) -> None:
    cfg = compose_run(*overrides)
    plain = plain_config(cfg)
    name = run_id(parse(cfg), plain, {})
    gptq = plain["method"].get("then", plain["method"])
    assert gptq["kernels"] == "auto"
    del gptq["kernels"]
    assert run_id(parse(cfg), plain, {}) == name
    gptq["kernels"] = "plain"
    assert run_id(parse(cfg), plain, {}) != name


def test_runs_from_before_ranges_were_clipped_keep_their_names() -> None:
    def name(*overrides: str, before: bool = False) -> str:
        cfg = compose_run("quant=w4a4", *overrides)
        plain = plain_config(cfg)
        if before:
            del plain["quant"]["activation"]["clip"], plain["quant"]["kv"]["clip"]
        return run_id(parse(cfg), plain, {})

    base, cached = name(), name("quant.kv.bits=4")
    assert name(before=True) == name("quant.activation.clip=1") == base
    assert name("quant.kv.bits=4", before=True) == name("quant.kv.bits=4", "quant.kv.clip=1") == cached
    others = [["quant.activation.clip=0.9"], ["quant.kv.clip=0.9"], ["quant.activation.clip=0.9", "quant.kv.clip=1"]]
    others += [["quant.kv.bits=4", "quant.kv.clip=0.9"]]
    assert len({base, cached, *(name(*other) for other in others)}) == 6


def test_the_kernels_of_learned_methods_are_part_of_the_name_as_ever() -> None:
    cfg = compose_run("method=lsi")
    plain = plain_config(cfg)
    name = run_id(parse(cfg), plain, {})
    del plain["method"]["training"]["kernels"]
    assert run_id(parse(cfg), plain, {}) != name


def test_a_mixture_is_named_by_its_weights_whatever_their_order() -> None:
    def name(*overrides: str) -> str:
        cfg = compose_run("calib=mix", *overrides)
        return run_id(parse(cfg), plain_config(cfg), {})

    base = name("calib.mix.c4=1", "calib.mix.ptb=2")
    assert name("calib.mix={ptb:2,c4:1}") == name("calib.mix={c4:1,ptb:2,file:0}") == base
    assert name("calib.mix.c4=2", "calib.mix.ptb=1") != base


@pytest.mark.parametrize(("trained", "same"), [("all", True), ("window", False)])
def test_only_runs_with_windows_have_other_names_since_windows_have_epochs_of_their_own(
    trained: str, same: bool
) -> None:
    cfg = compose_run("method=e2e", "method.run=some-run", "method.scales=1e-3", f"method.trained={trained}")
    plain = plain_config(cfg)
    name = run_id(parse(cfg), plain, {})
    del plain["method"]["window_epochs"]
    assert (run_id(parse(cfg), plain, {}) == name) is same


def test_runs_of_before_there_was_a_choice_of_moments_keep_their_names() -> None:
    for states, same in (("float32", True), ("int8", False)):
        cfg = compose_run("method=best", f"method.weight_only.states={states}")
        plain = plain_config(cfg)
        name = run_id(parse(cfg), plain, {})
        del plain["method"]["states"]
        assert (run_id(parse(cfg), plain, {}) == name) is same


def test_an_override_cannot_belie_the_name() -> None:
    assert parse(compose_run("quant=w4a16g128", "quant.weight.bits=2")).quant.name == "w2a16g128"
    assert parse(compose_run("quant.weight.symmetric=true")).quant.name == "w3a16g128-sym"


def test_a_local_checkpoint_takes_its_folders_name() -> None:
    config = parse(compose_run("model.path=/data/my models/opt 1b/"))
    assert config.model.name == "opt-1b"
    assert config.model.bundled is None


def test_methods_that_need_data_are_refused_without() -> None:
    config = parse(compose_run("method=rtn", "calib=none"))
    assert config.calib.corpus is None
    with pytest.raises(ConfigError, match="no such setting"):
        parse(compose_run("+method.alpha=3"))


@pytest.mark.parametrize("calib", ["bundled", "augmented"])
def test_windows_of_the_bundled_text_are_as_long_as_the_models_but_512_tokens_at_most(calib: str) -> None:
    for model, positions, seqlen in (("llama-2-7b", 2048, 512), ("tiny-llama", 512, 512), ("tiny-llama", 128, 128)):
        words = (f"model={model}", f"model.seqlen={positions}", f"calib={calib}")
        assert parse(compose_run(*words)).calib.seqlen == seqlen
    assert parse(compose_run("model=llama-2-7b", f"calib={calib}", "calib.seqlen=2048")).calib.seqlen == 2048
    with pytest.raises(ConfigError, match=r"model\.seqlen=abc: .*integer"):
        parse(compose_run("model.seqlen=abc", f"calib={calib}"))
