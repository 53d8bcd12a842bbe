"""What mkdocs does beside rendering docs/: pages from elsewhere in the checkout, and tables on the pages of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from links import PAGES, ROOT, SOURCES, rewrite, source_of, targets
from method_tables import numbers, settings_of, training_settings
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# A line of a page that a table takes the place of, a comment where the page is read as it is; and of which files of
# conf/method/ it is, by the key of the page's head.
TABLES = {
    "<!-- settings -->": ("settings", settings_of),
    "<!-- numbers -->": ("methods", numbers),
    "<!-- training -->": ("methods", training_settings),
}


def on_config(config: Any) -> Any:
    """Put pages that the navigation does not name under More."""
    named = set(_pages_of(config.nav))
    docs = Path(config.docs_dir)
    others = sorted(str(file.relative_to(docs)) for file in docs.rglob("*.md"))
    if more := [page for page in others if page not in named]:
        config.nav.append({"More": more})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/, and the files that pages link to."""
    for origin, place in PAGES.items():
        if origin != "README.md":
            files.append(File.generated(config, place, abs_src_path=str(ROOT / origin)))
    linked: set[str] = set()
    for file in files.documentation_pages():
        linked |= targets(file.content_string, source_of(file.src_uri))
    for path in sorted(linked):
        files.append(File.generated(config, f"{SOURCES}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Return the page with links that work on the site, with its tables, and with Markdown inside what is folded."""
    uri = page.file.src_uri
    for mark, (key, table) in TABLES.items():
        if mark in markdown:
            markdown = markdown.replace(mark, table(page.meta.get(key) or page.meta["methods"]))
    return rewrite(markdown.replace("<details>", '<details markdown="1">'), source_of(uri), uri)


def _pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in inner for page in _pages_of(entry)]
