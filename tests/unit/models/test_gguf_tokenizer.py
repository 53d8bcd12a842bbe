"""A GGUF file's tokenizer gives the tokens of the one that it was written from, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.gguf_files import DECOMPOSED, TEXT, write_gguf
from helpers.marks import slow_but
from helpers.models import SHAPES, save_model
from omegaconf import DictConfig
from tokenizers import Tokenizer

from lsiq.errors import InputError
from lsiq.experiment.request import prepare
from lsiq.experiment.run import run
from lsiq.models.gguf_file import read_header
from lsiq.models.gguf_tokenizer import read_tokenizer
from lsiq.models.splitters import find_name

pytest.importorskip("gguf")
SmallRun = Callable[..., DictConfig]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ONLY_BYTES = {**BYTES, "use_regex": False}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# What the models' own tokenizer.json says, by the name that llama.cpp's converter gives it.
SOURCES: dict[str, dict[str, Any]] = {
    "gpt-2": {"pre_tokenizer": BYTES},
    "smollm": {"pre_tokenizer": [{"type": "Digits", "individual_digits": True}, BYTES]},
    "llama-bpe": {"pre_tokenizer": [split(LLAMA3), ONLY_BYTES], "ignore_merges": True},
    "dbrx": {"pre_tokenizer": [split(LLAMA3), ONLY_BYTES]},
    "qwen2": {
        "pre_tokenizer": [split(LLAMA3.replace("{1,3}", "")), ONLY_BYTES],
        "normalizer": {"type": "NFC"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(SHAPES["llama"], tmp_path_factory.mktemp("models") / "llama")


def source(folder: Path, name: str) -> dict[str, Any]:
    """The bundled tokenizer with the splitting of a model's own.

    A piece that no merge makes tells whether words are taken whole.
    """
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    given = SOURCES[name]
    steps = given["pre_tokenizer"]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps} if isinstance(steps, list) else steps
    tokenizer["normalizer"] = given.get("normalizer")
    model = tokenizer["model"]
    model["ignore_merges"] = given.get("ignore_merges", False)
    model["merges"] = [merge for merge in model["merges"] if "".join(merge).replace(" ", "") != "Ġthe"]
    return tokenizer


def written(folder: Path, target: Path, name: str) -> Path:
    """A copy of the checkpoint with the tokenizer of `source`."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / "tokenizer.json").write_text(json.dumps(source(folder, name)))
    return target


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", slow_but(["smollm", "llama-bpe", "qwen2"], SOURCES))
def test_tokens_are_those_of_the_tokenizer_that_was_written(name: str, folder: Path, tmp_path: Path) -> None:
    checkpoint = written(folder, tmp_path / "model", name)
    tokenizer = read_tokenizer(write_gguf(checkpoint, tmp_path / "m.gguf", "F16", splitter=name))
    own = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for text in (TEXT, DECOMPOSED):
        assert ids(tokenizer, text) == own.encode(text, add_special_tokens=False).ids, text
    assert find_name(json.loads(own.to_str())) == name
    assert find_name(json.loads(tokenizer.backend_tokenizer.to_str())) == name


def test_what_splits_words_otherwise_gives_other_tokens(folder: Path) -> None:
    tokenizers = {name: Tokenizer.from_str(json.dumps(source(folder, name))) for name in SOURCES}
    tokens = {name: tuple(own.encode(TEXT + DECOMPOSED).ids) for name, own in tokenizers.items()}
    assert len(set(tokens.values())) == len(SOURCES)


@pytest.mark.parametrize("name", slow_but(["gpt-4o"], ["dbrx", "deepseek-r1-qwen", "gpt-4o", "tekken"]))
def test_a_name_that_transformers_knows_splits_as_it_reads_the_file(name: str, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = write_gguf(folder, tmp_path / "m.gguf", "F16", splitter=name)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert ids(read_tokenizer(path), TEXT + DECOMPOSED) == ids(theirs, TEXT + DECOMPOSED)


@pytest.mark.parametrize(("name", "begins"), [("llama-bpe", True), ("smollm", False)])
def test_texts_begin_as_llama_cpp_begins_them_where_the_file_does_not_say(
    name: str, begins: bool, folder: Path, tmp_path: Path
) -> None:
    tokenizer = read_tokenizer(write_gguf(folder, tmp_path / "m.gguf", "F16", splitter=name))
    assert (tokenizer("the boat")["input_ids"][0] == tokenizer.bos_token_id) == begins


@pytest.mark.parametrize("export", slow_but(["gguf"], ["gguf", "plain"]))
def test_an_export_of_a_file_has_the_tokens_of_the_run(
    export: str, folder: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    path = write_gguf(folder, tmp_path / "m.gguf", "F16", splitter="smollm")
    settings = ("calib=none", "eval=none", "quant.weight.scale=float16", "export.verify=false")
    record = run(small_run(path, *settings, f"export={export}"))
    target = Path(record.exports[export]["folder"])
    if export == "gguf":
        assert read_header(target / "model.gguf").metadata["tokenizer.ggml.pre"] == "smollm"
        again = read_tokenizer(target / "model.gguf")
    else:
        again = AutoTokenizer.from_pretrained(target)
    assert ids(again, TEXT) == ids(read_tokenizer(path), TEXT)


@pytest.mark.parametrize(
    ("name", "message"),
    [("bloom", r"not known here \(tokenizer.ggml.pre=bloom\)"), (None, "does not say how")],
    ids=str,
)
def test_an_unknown_splitter_is_refused_unless_a_tokenizer_is_given(
    name: str | None, message: str, folder: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    path = write_gguf(folder, tmp_path / "m.gguf", "F16", splitter=name)
    with pytest.raises(InputError, match=message + ".*; give .* with model.tokenizer=DIR"):
        prepare(small_run(path))
    own = written(folder, tmp_path / "own", "smollm")
    given = (f"model.tokenizer={own}", "eval=none", "calib=none", "quant.weight.scale=float16", "export=gguf")
    record = run(small_run(path, *given, "export.verify=false"))
    header = read_header(Path(record.exports["gguf"]["folder"]) / "model.gguf")
    assert header.metadata["tokenizer.ggml.pre"] == "smollm"


def test_a_run_s_name_says_which_tokenizer_it_read(folder: Path, small_run: SmallRun, tmp_path: Path) -> None:
    files = {name: write_gguf(folder, tmp_path / f"{name}.gguf", "F16", splitter=name) for name in ("gpt-2", "smollm")}
    assert set(prepare(small_run(files["gpt-2"])).inputs) == {"model", "calib.path", "eval.path"}
    assert prepare(small_run(files["smollm"])).inputs["model.splitter"] == "smollm"
    one, same, other = (written(folder, tmp_path / place, name) for place, name in
                        (("a", "smollm"), ("b", "smollm"), ("c", "qwen2")))  # fmt: skip
    names = [prepare(small_run(files["gpt-2"], f"model.tokenizer={place}")).folder.name for place in (one, same, other)]
    assert names[0] == names[1] != names[2]
    assert names[0] != prepare(small_run(files["gpt-2"])).folder.name
    with pytest.raises(InputError, match=r"model\.tokenizer=.*: there is no tokenizer; give a folder with"):
        prepare(small_run(files["gpt-2"], f"model.tokenizer={tmp_path}"))
