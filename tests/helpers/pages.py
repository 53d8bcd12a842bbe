"""Pages of Markdown as their readers see them: the commands of their blocks, their links and anchors."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from helpers.configuration import ROOT
from markdown_it import MarkdownIt
from markdown_it.token import Token

FOLDERS = ("docs", "analysis", "lsiq/assets")


def pages() -> list[Path]:
    """Every page of the project."""
    below = [page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")]
    return sorted([*ROOT.glob("*.md"), *below])


def _tokens(page: Path) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's `sh` blocks, in words; comments are left out and `&&` parts two commands."""
    found = []
    for token in _tokens(page):
        if token.type != "fence" or token.info != "sh":
            continue
        for line in token.content.replace("\\\n", " ").splitlines():
            rest = shlex.split(line, comments=True)
            while rest:
                end = rest.index("&&") if "&&" in rest else len(rest)
                found.append(rest[:end])
                rest = rest[end + 1 :]
    return found


def blocks(page: Path, info: str) -> list[str]:
    """The fenced blocks of a page that are marked `info`."""
    return [token.content for token in _tokens(page) if token.type == "fence" and token.info == info]


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures that lie in the repository, as they are written."""
    targets = [token.attrGet({"link_open": "href", "image": "src"}.get(token.type, "")) for token in _tokens(page)]
    return [unquote(str(target)) for target in targets if target and not re.match(r"[a-z]+:", str(target))]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: dict[str, int] = {}
    tokens = list(_tokens(page))
    for heading, inline in itertools.pairwise(tokens):
        if heading.type != "heading_open":
            continue
        words = "".join(child.content for child in inline.children or ())
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        again = found.get(anchor, 0)
        found[anchor] = again + 1
        if again:
            found[f"{anchor}-{again}"] = 1
    return set(found)
