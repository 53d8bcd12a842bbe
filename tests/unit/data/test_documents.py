"""Documents read from files: what is kept, what is split, and what an unreadable file says."""

import json
import lzma
import subprocess
import sys

import pytest

from lsiq.data.documents import read_documents
from lsiq.errors import InputError


def test_separator_lines_split_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n<|endoftext|>\n\n<|endoftext|>\nthree <|endoftext|> four\n")
    assert list(read_documents(path)) == ["one\ntwo", "three <|endoftext|> four\n"]


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.tokens"])
def test_a_file_without_separators_is_one_unchanged_document(tmp_path, name):
    text = " \n = Título = \n\r\n naïve 戦場\n"
    (tmp_path / name).write_bytes(text.encode())
    assert list(read_documents(tmp_path / name)) == [text]


def test_an_empty_file_holds_no_documents(tmp_path):
    (tmp_path / "a.txt").touch()
    assert list(read_documents(tmp_path / "a.txt")) == []


def test_xz_holds_the_same_documents_as_plain_text(tmp_path):
    content = b"one\n<|endoftext|>\ntwo"
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(content))
    assert list(read_documents(tmp_path / "a.txt.xz")) == list(read_documents(tmp_path / "a.txt"))


def test_json_fields_are_joined_in_the_order_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": "x ", "b": "y"}) + "\n\n" + json.dumps({"b": "2", "a": "1"}) + "\n")
    assert list(read_documents(path, fields=("a", "b"))) == ["x y", "12"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', ["line 2", "'text' is missing", "body"]),
        ("a.jsonl", b'{"text": 3}\n', ["line 1", "'text' is a int"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["line 2", "not JSON"]),
        ("a.jsonl", b"[1]\n", ["line 1", "list"]),
        ("a.txt", b"fine\ncaf\xe9\n", ["line 2", "UTF-8"]),
        ("a.txt.xz", lzma.compress(b"x" * 9999)[:-20], ["xz"]),
        ("a.txt.xz", b"no xz at all", ["xz"]),
    ],
)
def test_an_unreadable_file_is_named_with_line_and_cause(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_documents(path))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in [str(path), *words]), message


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt cannot be read"):
        list(read_documents(tmp_path / "none.txt"))


def test_reading_text_does_not_import_torch():
    code = "import sys, lsiq.data.documents; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
