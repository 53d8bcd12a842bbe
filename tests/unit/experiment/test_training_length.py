"""Epochs may be given as tokens to train on; a run is the same however they were given."""

from __future__ import annotations

import pytest
from helpers.configuration import compose_run
from omegaconf import DictConfig

import lsiq
from lsiq.errors import ConfigError
from lsiq.experiment.composed import plain_config
from lsiq.experiment.config import parse
from lsiq.experiment.identity import run_id
from lsiq.experiment.request import prepare
from lsiq.tables.protocol import composed


def name(cfg: DictConfig) -> str:
    return run_id(parse(cfg), plain_config(cfg), {})


@pytest.mark.parametrize(
    ("tokens", "samples", "epochs"),
    [("1.3e6", 128, 20), ("1.3e6", 512, 5), ("1310720", 512, 5), ("1", 512, 1), ("655360", 512, 3), ("1.3e6", 64, 40)],
)
def test_epochs_are_the_whole_number_nearest_to_the_tokens(tokens: str, samples: int, epochs: int) -> None:
    words = ("method=lsi", f"calib.samples={samples}", "calib.seqlen=512")
    by_tokens, by_epochs = (
        compose_run(*words, f"method.training.{w}") for w in (f"tokens={tokens}", f"epochs={epochs}")
    )
    assert parse(by_tokens).method.training.epochs == epochs
    assert plain_config(by_tokens) == plain_config(by_epochs)
    assert name(by_tokens) == name(by_epochs)


def test_each_training_of_a_composed_method_has_tokens_of_its_own() -> None:
    words = ("method=best", "calib=augmented", "calib.seqlen=512")
    method = parse(compose_run(*words, "method.weight_only.start.training.tokens=1.3e6")).method
    assert (method.start.training.epochs, method.training.epochs) == (5, 10)  # 128 drawn and 384 written sequences
    method = parse(compose_run(*words, "method.weight_only.training.tokens=524288")).method
    assert (method.start.training.epochs, method.training.epochs) == (10, 2)


def test_sequences_held_back_are_not_counted() -> None:
    words = ("method=lsi", "calib.samples=64", "calib.seqlen=512", "method.training.tokens=573440")
    assert parse(compose_run(*words)).method.training.epochs == 18  # 17.5
    assert parse(compose_run(*words, "method.training.keep=held")).method.training.epochs == 20


def test_rules_about_epochs_hold_for_those_that_follow() -> None:
    words = ("method=lsi", "method.training.schedule=staged", "method.training.wait=3", "calib.seqlen=512")
    parse(compose_run(*words))
    with pytest.raises(ConfigError, match=r"method.training.wait=3: a staged schedule needs 1 to epochs-1=1"):
        parse(compose_run(*words, "method.training.tokens=32768"))  # 2 epochs of 32 sequences


def test_epochs_and_tokens_are_refused_together() -> None:
    both = r"method\.training\.tokens=1e6: epochs=3 is given as well; give one of them"
    with pytest.raises(ConfigError, match=both):
        compose_run("method=lsi", "method.training.epochs=3", "method.training.tokens=1e6")
    with pytest.raises(ConfigError, match="give one of them"):
        lsiq.recipe("lsi", epochs=3, tokens=1e6)
    compose_run("method=best", "method.weight_only.training.epochs=3", "method.weight_only.start.training.tokens=1e6")


@pytest.mark.parametrize("tokens", ["0", "-5", "many", "true"])
def test_tokens_that_are_no_number_above_0_are_refused(tokens: str) -> None:
    with pytest.raises(ConfigError, match=r"method\.training\.tokens=.*: is no number above 0; expected: tokens"):
        parse(compose_run("method=lsi", f"method.training.tokens={tokens}"))


def test_tables_take_runs_by_the_epochs_that_tokens_stand_for() -> None:
    expected = composed(("method=lsi", "calib.samples=512", "calib.seqlen=512", "method.training.tokens=1.3e6"))
    assert expected is not None
    assert expected["method"]["training"]["epochs"] == 5


def test_a_recipe_with_tokens_waits_for_the_calibration_tokens() -> None:
    recipe, quant = lsiq.recipe("lsi", tokens=4096), lsiq.format("w3a16g128")
    assert recipe.method(quant, (8, 64)).training.epochs == 8
    assert lsiq.recipe("best", tokens=4096).method(quant, (8, 64)).training.epochs == 8
    with pytest.raises(ConfigError, match=r"tokens: epochs follow from them"):
        recipe.method(quant)


def test_runs_from_before_sequences_were_held_back_keep_their_names() -> None:
    cfg = compose_run("method=lsi")
    plain = plain_config(cfg)
    assert plain["method"]["training"].pop("held", "gone") is None
    assert run_id(parse(cfg), plain, {}) == name(cfg)
    held = compose_run("method=lsi", "method.training.keep=held")
    more = compose_run("method=lsi", "method.training.keep=held", "method.training.held=0.25")
    assert len({name(cfg), name(held), name(more)}) == 3


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (("samples=32", "held=0.01"), r"held=0\.01: is less than one of 32 sequences"),
        (("samples=1", "held=0.9"), r"held=0\.9: leaves none of 1 sequences to train on"),
        (("samples=3", "held=null"), r"held=0\.125: is less than one of 3 sequences"),
    ],
)
def test_a_share_that_holds_nothing_back_or_all_is_refused(words: tuple[str, str], refusal: str) -> None:
    for method, training in (("lsi", "method.training"), ("best", "method.weight_only.start.training")):
        cfg = compose_run(f"method={method}", f"calib.{words[0]}", f"{training}.{words[1]}", f"{training}.keep=held")
        with pytest.raises(ConfigError, match=rf"^{training}\.{refusal}") as raised:
            prepare(cfg)
        assert "\n" not in str(raised.value)


def test_a_share_without_keep_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.training\.held=0\.25: keep=last holds no sequences back"):
        parse(compose_run("method=lsi", "method.training.held=0.25"))
