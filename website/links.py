"""Links between pages that lie in different places of the checkout and of the site."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

ROOT = Path(__file__).resolve().parent.parent
# Pages outside docs/ that the site shows, and where.
PAGES = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "analysis/searches/README.md": "project/searches.md",
    "analysis/published/README.md": "project/published.md",
    "analysis/published/more/README.md": "project/published-later.md",
    "analysis/peers/README.md": "project/peers.md",
    "README.md": "index.md",
}
SOURCES = "source"  # where the site keeps files of the checkout that pages link to

_FENCE = re.compile(r"(^```.*?^```[^\S\n]*$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?P<text>\[[^\]\n]*\])\((?P<target>[^)\s]+)\)")


def source_of(uri: str) -> str:
    """Return where in the checkout the page `uri` of the site comes from."""
    origins = {place: origin for origin, place in PAGES.items() if origin != "README.md"}
    return origins.get(uri, f"docs/{uri}")


def targets(markdown: str, page: str) -> set[str]:
    """Return the files of the checkout that the page links to and the site has no page of.

    Args:
        page: where the text stands in the checkout, such as docs/best.md.
    """
    found: set[str] = set()

    def note(text: str, path: str, anchor: str) -> str:
        if path and _place(path) is None and (ROOT / path).is_file():
            found.add(path)
        return text

    _each(markdown, page, note)
    return found


def rewrite(markdown: str, page: str, uri: str) -> str:
    """Return the text with links that work on the site; links to folders become their words.

    Args:
        page: where the text stands in the checkout.
        uri: where the site has it.
    """

    def change(text: str, path: str, anchor: str) -> str:
        place = _place(path)
        if place is None:
            if not (ROOT / path).is_file():
                return text[1:-1]
            place = f"{SOURCES}/{path}"
        return f"{text}({relpath(place, PurePosixPath(uri).parent)}{anchor})"

    return _each(markdown, page, change)


def _place(path: str) -> str | None:
    """Where the site has a path of the checkout, if docs/ or `PAGES` holds it."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") and (ROOT / path).is_file() else None


def _each(markdown: str, page: str, change: Callable[[str, str, str], str]) -> str:
    """The text after `change` has seen each link into the checkout: its words, path and anchor."""

    def one(link: re.Match[str]) -> str:
        target, mark, anchor = link["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        path = normpath(str(PurePosixPath(page).parent / target))
        return change(link["text"], path, mark + anchor)

    pieces = _FENCE.split(markdown)
    return "".join(piece if piece.startswith("```") else _LINK.sub(one, piece) for piece in pieces)
