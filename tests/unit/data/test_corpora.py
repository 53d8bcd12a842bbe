"""Corpora are read in the hub's schema and joined as the published protocol says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
from torch import Tensor
from transformers import AutoTokenizer

from lsiq.assets import bundled_model, bundled_text
from lsiq.data.corpora import Text, read_corpus
from lsiq.data.tokens import cut_windows, draw_windows, random_windows, token_hash
from lsiq.errors import InputError


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(bundled_model("tiny-llama"))


def test_the_bundled_text_is_split_once_and_for_all() -> None:
    calibration, evaluation = bundled_text("calibration"), bundled_text("evaluation")
    assert (len(calibration), len(evaluation)) == (100, 24)
    assert {
        kind: sum(piece.parent.name == kind for piece in evaluation)
        for kind in ("science", "history", "craft", "stories")
    } == {
        "science": 6,
        "history": 6,
        "craft": 6,
        "stories": 6,
    }
    assert not {piece.name for piece in calibration} & {piece.name for piece in evaluation}


def test_raw_wikitext_gives_the_rows_of_the_hub(tmp_path: Path) -> None:
    raw = tmp_path / "wiki.test.raw"
    raw.write_text(" \n = Robert Boulter = \n \n Robert Boulter is an actor . \n")
    rows = ["", " = Robert Boulter = \n", "", " Robert Boulter is an actor . \n"]  # as the hub's data set stores them
    parquet = tmp_path / "test-00000-of-00001.parquet"
    pd.DataFrame({"text": rows}).to_parquet(parquet)
    expected = "\n\n".join(rows)
    assert read_corpus("wikitext2", "evaluation", str(raw)).joined() == expected
    assert read_corpus("wikitext2", "evaluation", str(parquet)).joined() == expected


def test_c4_joins_the_first_documents_and_calibrates_by_document(tmp_path: Path) -> None:
    file = tmp_path / "c4-validation.00000-of-00008.json.gz"
    with gzip.open(file, "wt") as out:
        for n in range(1200):
            out.write(json.dumps({"text": f"Document {n}.", "timestamp": "2019", "url": "https://example.org"}) + "\n")
    evaluation = read_corpus("c4", "evaluation", str(file))
    assert len(evaluation.documents) == 1100
    assert evaluation.joined().startswith("Document 0. Document 1. ")
    assert read_corpus("c4", "calibration", str(file)).by_document


def test_ptb_and_pile_are_read_from_their_columns(tmp_path: Path) -> None:
    ptb = tmp_path / "ptb.parquet"
    pd.DataFrame({"sentence": ["no it was n't black monday", "but while"]}).to_parquet(ptb)
    assert read_corpus("ptb", "evaluation", str(ptb)).joined() == "no it was n't black monday\n\nbut while"
    import zstandard

    pile = tmp_path / "val.jsonl.zst"
    pile.write_bytes(zstandard.compress(b'{"text": "one", "meta": {}}\n{"text": "two", "meta": {}}\n'))
    assert list(read_corpus("pile", "calibration", str(pile)).documents) == ["one", "two"]


def test_a_local_copy_without_the_column_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pd.DataFrame({"body": ["a"]}).to_parquet(file)
    with pytest.raises(InputError, match="no text in 'text'; it has body"):
        read_corpus("wikitext2", "evaluation", str(file))


def test_a_hub_corpus_out_of_reach_names_the_local_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"eval\.local\.c4=FILE"):
        read_corpus("c4", "evaluation")


def test_drawing_depends_on_the_seed_alone(tokenizer: object) -> None:
    text = read_corpus("bundled", "calibration")
    first, again, other = (draw_windows(text, tokenizer, 6, 64, seed, "bundled") for seed in (0, 0, 1))
    assert first.shape == (6, 64)
    assert token_hash(first) == token_hash(again) != token_hash(other)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_disjoint_windows_take_no_token_twice(tmp_path: Path, seed: int) -> None:
    text = Text([" ".join(map(str, range(1000)))], "\n\n")

    class Numbers:
        def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
            del verbose
            return {"input_ids": [int(word) for word in text.split()]}

    def draw(samples: int) -> Tensor:
        return draw_windows(text, Numbers(), samples, 64, seed, "numbers", "disjoint")

    for samples in (4, 15):
        windows = draw(samples)
        assert windows.shape == (samples, 64)
        assert len(windows.unique()) == windows.numel()
    with pytest.raises(InputError, match=r"holds 15 windows of calib\.seqlen=64 .* calib\.windows=random"):
        draw(16)


def test_documents_that_are_long_enough_give_one_window_each(tokenizer: object, tmp_path: Path) -> None:
    file = tmp_path / "c4.jsonl"
    long = "The tide rose over the flats and the boats began to lift. " * 20
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["short", long, long, "short"]))
    text = read_corpus("c4", "calibration", str(file))
    assert draw_windows(text, tokenizer, 2, 64, 0, "c4").shape == (2, 64)
    with pytest.raises(InputError, match=r"only 2 of 4 documents .* calib\.samples=3"):
        draw_windows(text, tokenizer, 3, 64, 0, "c4")


def test_a_short_text_names_its_length_and_the_setting(tokenizer: object, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("Too short.")
    text = read_corpus("file", "evaluation", str(file))
    with pytest.raises(InputError, match=r"fewer than eval\.seqlen=64"):
        cut_windows(text, tokenizer, 64, "short.txt")
    with pytest.raises(InputError, match=r"fewer than calib\.seqlen=64"):
        draw_windows(text, tokenizer, 2, 64, 0, "short.txt")


def test_random_windows_stay_in_the_vocabulary() -> None:
    windows = random_windows(11, 3, 40, seed=5)
    assert windows.shape == (3, 40)
    assert 0 <= int(windows.min()) <= int(windows.max()) < 11
