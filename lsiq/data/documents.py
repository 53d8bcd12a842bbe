"""Text documents from local files, one string each, without importing torch."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

from lsiq.errors import InputError

# The line that separates documents; the same string is the end-of-text token of the bundled tokenizer.
SEPARATOR = "<|endoftext|>"


def read_documents(path: str | Path, fields: tuple[str, ...] = ("text",)) -> Iterator[str]:
    """Yield the documents of one file, in file order, reading it as a stream.

    `.jsonl`: one document per line, the named string fields joined as they are. Any other suffix, also behind `.xz`:
    plain text whose documents are separated by lines that hold exactly `<|endoftext|>`; the newline before a separator
    belongs to the separator, blank documents are dropped, and a file without separators is one unchanged document.

    Raises
    ------
    InputError
        The file cannot be opened, is not UTF-8, is a damaged xz file, or a line lacks a field; the message names file,
        line and field.
    """
    path = Path(path)
    if path.name.removesuffix(".xz").endswith(".jsonl"):
        yield from _json_documents(path, fields)
    else:
        yield from _text_documents(_lines(path))


def read_objects(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield the line number and the object of each line of a jsonl file, plain or xz, blank lines left out.

    Raises
    ------
    InputError
        As `read_documents`, and for a line that is not one JSON object.
    """
    path = Path(path)
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            message = f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})"
            raise InputError(f"{message}; each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, line {number}: holds a {type(record).__name__}; each line must be one JSON object"
            )
        yield number, record


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, unpacked if it ends in `.xz`, with their newlines."""
    try:
        with lzma.open(path, "rb") if path.suffix == ".xz" else open(path, "rb") as file:
            yield from _decoded_lines(file, path)
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(
            f"{path} is not a complete xz file ({error}); copy it again or unpack it with `xz -d`"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error


def _decoded_lines(file: Iterable[bytes], path: Path) -> Iterator[str]:
    # Bytes are split at "\n" and decoded line by line: newlines stay as they are, and an error has a line number.
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            rule = f"byte {error.start} of the line is not UTF-8"
            raise InputError(f"{path}, line {number}: {rule}; convert the file with `iconv -t UTF-8`") from error


def _text_documents(lines: Iterator[str]) -> Iterator[str]:
    document_lines: list[str] = []
    for line in lines:
        if line.rstrip("\r\n") != SEPARATOR:
            document_lines.append(line)
            continue
        document = "".join(document_lines).removesuffix("\n").removesuffix("\r")
        document_lines.clear()
        if document.strip():
            yield document
    document = "".join(document_lines)
    if document.strip():
        yield document


def _json_documents(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    for number, record in read_objects(path):
        document = "".join(_field(record, name, path, number) for name in fields)
        if document.strip():
            yield document


def _field(record: dict, name: str, path: Path, number: int) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        problem = "is missing" if name not in record else f"is a {type(value).__name__}, not a string"
        fields = ", ".join(key for key, entry in record.items() if isinstance(entry, str)) or "none"
        raise InputError(f"{path}, line {number}: field {name!r} {problem}; name one of its string fields: {fields}")
    return value
