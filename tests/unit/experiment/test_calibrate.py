"""Calibration on conversations and on mixtures of corpora, by runs and from Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.configuration import compose_run
from omegaconf import DictConfig
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import lsiq
from lsiq.assets import bundled_model
from lsiq.data.conversations import read_conversations, render
from lsiq.data.mixture import apportion
from lsiq.data.settings import CalibSettings
from lsiq.data.token_cache import TokenRequest, cached_tokens
from lsiq.data.tokens import token_hash
from lsiq.errors import ConfigError, InputError
from lsiq.experiment.calibrate import NOTHING_KEPT, calibration_tokens
from lsiq.experiment.config import parse
from lsiq.experiment.input_checks import check_before_torch
from lsiq.experiment.run import run
from lsiq.models.chat_template import read_chat_template
from lsiq.models.loading import load
from lsiq.results.record import Record, read_record

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|endoftext|>{{ message.role }}: {{ message.content }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def chat_model(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small LLaMA, with a chat template in its tokenizer."""
    folder = tmp_path_factory.mktemp("chat") / "llama"
    shutil.copytree(checkpoints["llama"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def talk(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"How many barrels did boat {number} carry?"},
        {"role": "assistant", "content": f"Boat {number} carried {number * 7} barrels of salt to the harbour."},
    ]


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    file.write_text("".join(json.dumps({"messages": talk(number)}) + "\n" for number in range(40)))
    return file


def wrong(folder: Path, messages: object) -> Path:
    file = folder / "wrong.jsonl"
    file.write_text(json.dumps({"messages": talk(1)}) + "\n" + json.dumps({"messages": messages, "id": 3}) + "\n")
    return file


def test_windows_are_cut_from_conversations_that_follow_each_other(chat_model: Path, talks: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    request = TokenRequest("file", "calibration", str(talks), ("text",), 64, 3, 0, "disjoint", template=True)
    windows = cached_tokens(request, tokenizer, NOTHING_KEPT)
    assert windows.shape == (3, 64)
    apart = [tokenizer.apply_chat_template(talk(number), tokenize=True)["input_ids"] for number in range(40)]
    stream = torch.tensor([token for ids in apart for token in ids])
    found = stream.unfold(0, 64, 1)
    assert all((found == window).all(1).any() for window in windows)
    assert (windows == tokenizer.convert_tokens_to_ids("<|endoftext|>")).any()  # a token, not its letters


def test_no_special_tokens_are_added_to_those_of_the_template(chat_model: Path, talks: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))]
    )
    text = "".join(render(talks, tokenizer))
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len(tokenizer(text)["input_ids"]) == length + 1
    whole = TokenRequest("file", "calibration", str(talks), ("text",), length, 1, 0, "disjoint", template=True)
    assert (
        cached_tokens(whole, tokenizer, NOTHING_KEPT)[0].tolist()
        == tokenizer(text, add_special_tokens=False)["input_ids"]
    )


def test_a_template_that_asks_for_the_date_gives_the_same_text_every_day(chat_model: Path, talks: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. {{ messages[0].content }}"
    assert render(talks, tokenizer)[0] == "Today is 26 Jul 2024. How many barrels did boat 0 carry?"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, r"line 2: has no list of messages \(its fields: messages, id\)"),
        ([], "line 2: has no list of messages"),
        ([{"role": "asistant", "content": "x"}], "line 2, message 1: role=asistant: no such role; use one of system"),
        ([{"content": "x"}], "message 1: role=None"),
        (["x"], "message 1: is a str"),
        ([{"role": "user"}], "message 1: content is missing"),
        ([*talk(1), {"role": "user", "content": ["x"]}], "message 3: content is a list; it must be a string"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, messages: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_conversations(wrong(tmp_path, messages)))


def test_a_conversation_that_the_template_refuses_is_named(chat_model: Path, tmp_path: Path) -> None:
    file = wrong(tmp_path, [{"role": "tool", "content": "x"}])
    with pytest.raises(InputError, match=r"wrong\.jsonl, line 2: the chat template refuses .* \(no tools\)"):
        render(file, AutoTokenizer.from_pretrained(chat_model))


def test_conversations_are_checked_before_torch(
    chat_model: Path, talks: Path, checkpoints: dict[str, Path], small_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    def check(model: Path, file: Path) -> None:
        check_before_torch(parse(small_run(model, f"calib.path={file}", "calib.template=true")), model)

    check(chat_model, talks)
    with pytest.raises(ConfigError, match=r"calib\.template=true: the tokenizer of .*llama has no chat template"):
        check(checkpoints["llama"], talks)
    with pytest.raises(InputError, match="role=robot"):
        check(chat_model, wrong(tmp_path, [{"role": "robot", "content": "x"}]))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no conversation"):
        check(chat_model, tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="from jsonl"):
        check(chat_model, tmp_path / "talks.txt")


def test_the_template_is_the_one_that_transformers_takes(tmp_path: Path) -> None:
    shutil.copytree(bundled_model("tiny-llama"), tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(file.read_text())

    def both() -> tuple[str | None, str | None]:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        found = tokenizer.get_chat_template() if tokenizer.chat_template else None
        return read_chat_template(tmp_path / "model"), found

    assert both() == (None, None)
    file.write_text(json.dumps(config | {"chat_template": "one"}))
    assert both() == ("one", "one")
    several = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    file.write_text(json.dumps(config | {"chat_template": several}))
    assert both() == ("three", "three")
    (tmp_path / "model" / "chat_template.jinja").write_text("four")
    assert both() == ("four", "four")


def test_a_tokenizer_without_a_template_is_refused_from_python_too(talks: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        render(talks, AutoTokenizer.from_pretrained(bundled_model("tiny-llama")))


def test_shares_are_rounded_by_the_largest_remainder() -> None:
    assert apportion({"a": 0.5, "b": 0.3, "c": 0.2}, 10) == {"a": 5, "b": 3, "c": 2}
    assert apportion({"a": 1, "b": 1, "c": 1}, 8) == {"a": 3, "b": 3, "c": 2}
    assert apportion({"a": 47, "b": 16, "c": 15.8, "d": 12, "e": 6.1, "f": 3.1}, 10) == {
        **{"a": 5, "b": 2, "c": 1},
        **{"d": 1, "e": 1, "f": 0},
    }


def mixture(**values: object) -> CalibSettings:
    known = {"corpus": "mix", "samples": 8, "seqlen": 32, "windows": "disjoint"}
    return CalibSettings(**{**known, **values})  # type: ignore[arg-type]


def test_a_mixture_draws_each_share_from_its_corpus(chat_model: Path, talks: Path) -> None:
    calib = mixture(mix={"file": 3, "stories": 1, "c4": 0}, paths={"file": str(talks)}, template=True)
    assert [(share.corpus, share.samples, share.template) for share in calib.shares()] == [
        ("stories", 2, False),
        ("file", 6, True),
    ]
    model = load(parse(compose_run(f"model.path={chat_model}", "method=rtn")).model, chat_model, torch.device("cpu"), 0)
    drawn = calibration_tokens(calib, model, 0)
    apart = [
        calibration_tokens(mixture(corpus="stories", samples=2), model, 0),
        calibration_tokens(mixture(corpus="file", path=str(talks), samples=6, template=True), model, 0),
    ]
    assert drawn is not None
    assert sorted(drawn.tolist()) == sorted(row for part in apart if part is not None for row in part.tolist())
    assert drawn.tolist() != [row for part in apart if part is not None for row in part.tolist()]
    templated = mixture(mix={"stories": 1, "file": 3}, paths={"file": str(talks)}, template=True)
    again, other = calibration_tokens(templated, model, 0), calibration_tokens(calib, model, 1)
    assert again is not None
    assert other is not None
    assert token_hash(again) == token_hash(drawn) != token_hash(other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no corpus has a weight"),
        ({"mix": {"c4": 1}, "path": "x"}, "a mixture has a path for each corpus"),
        ({"mix": {"c4": 1, "file": 1}}, "paths.file=null"),
        ({"mix": {"c4": 1}, "paths": {"ptb": "x"}}, "ptb has no weight"),
        ({"mix": {"random": 1}, "paths": {"random": "x"}}, "is read from no file"),
        ({"mix": {"c4": 99, "ptb": 1}}, "less than one of calib.samples=8"),
        ({"mix": {"c4": 1}, "template": True}, "only a file of yours holds conversations"),
        ({"corpus": "c4", "mix": {"ptb": 1}}, "choose calib=mix"),
        ({"corpus": "c4", "template": True}, "only a file of yours holds conversations"),
        ({"corpus": "file", "path": "x", "template": True, "fields": ["a"]}, "reads messages"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(**values)


def test_the_record_names_what_was_mixed(
    chat_model: Path, talks: Path, text_file: Path, small_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    """Both are in the run's name, too: another file or template is another run."""
    words = [
        *("calib=mix", "calib.path=null", "calib.mix.file=1", "calib.mix.wikitext2=1", "calib.template=true"),
        *(f"calib.paths.file={talks}", "method=gptq"),
    ]
    raw = tmp_path / "wiki.raw"
    raw.write_text(text_file.read_text())
    words.append(f"calib.paths.wikitext2={raw}")

    def finished(model: Path) -> Record:
        record = run(small_run(model, *words))
        assert record == read_record(tmp_path / "runs" / record.run_id)
        return record

    record = finished(chat_model)
    assert set(record.inputs) == {
        *("model", "calib.paths.file", "calib.paths.wikitext2", "calib.template", "eval.path"),
    }
    assert record.config["calib"]["mix"]["file"] == 1
    assert record.calibration["samples"] == 4
    other = tmp_path / "other" / "llama"
    shutil.copytree(chat_model, other)
    (other / "chat_template.jinja").write_text(TEMPLATE.replace(": ", " says: "))
    again = finished(other)
    changed = {key for key, found in record.inputs.items() if again.inputs[key] != found}
    assert changed == {"calib.template"}
    assert again.run_id != record.run_id
    assert again.calibration["tokens"] != record.calibration["tokens"]
    made = lsiq.quantize(
        lsiq.load_model(chat_model),
        lsiq.recipe("gptq"),
        lsiq.format("w3a16g128", "quant.weight.group=32"),
        lsiq.tokens(
            "mix",
            *(f"calib.paths.wikitext2={raw}", f"calib.paths.file={talks}"),
            **{"mix": {"file": 1, "wikitext2": 1}, "template": True, "samples": 4, "seqlen": 32, "batch": 2},
        ),
    )
    assert made.calibration == record.calibration
