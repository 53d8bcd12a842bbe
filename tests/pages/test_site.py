"""The site that mkdocs makes of docs/: it builds strictly, fetches nothing, and leads a reader to an answer."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from helpers.configuration import CONF, ROOT

from lsiq.tables.papers.model_sizes import TEXTS
from lsiq.tables.papers.size_runs import load_sizes

METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))


def head(page: Path) -> dict:
    """The settings at the top of a page, between two lines of `---`."""
    found = re.match(r"---\n(.*?)\n---\n", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found, page
    return yaml.safe_load(found[1])


def test_every_method_has_a_page() -> None:
    told = {method for page in METHOD_PAGES for key in ("methods", "settings") for method in head(page).get(key, [])}
    assert told == {file.stem for file in (CONF / "method").glob("*.yaml")}


def test_numbers_and_settings_of_a_page_are_those_of_records_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "website"))
    tables = importlib.import_module("method_tables")
    assert "| `damping` | `0.01` |" in tables.settings_of(["gptq"])
    found = tables.numbers(["gptq", "lsi"])
    assert "| `w2a16g128` | `gptq` | 0.895 ± 0.013 | 1.550 ± 0.049 |" in found  # as in docs/tables/main.md
    samples = [load_sizes().sample("SmolLM2", "w2", "lsi", f"excess/{text}") for text in TEXTS]
    means = [f"{sample.mean:.3g}" for sample in samples if sample is not None]
    assert len(means) == 2
    (row,) = (line for line in found.splitlines() if line.startswith("| 2 | `lsi` |"))
    assert f"| {' / '.join(means)} (" in row  # as in docs/tables/size.md


def test_the_tables_of_the_site_want_nothing_that_draws() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, 'website'); import method_tables"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    for wanted in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(wanted) is None:
            pytest.skip("building the site needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class _Page(HTMLParser):
    """Links with their words, and what the page fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.fetched: list[str] = []
        self._open: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a":
            self._open = given.get("href")
        elif tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.fetched.append(str(given["src"]))
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(str(given.get("href")))

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self.links.append((self._open, " ".join(data.split())))
            self._open = None


def pages(site: Path) -> Iterator[tuple[Path, _Page]]:
    for file in sorted(site.rglob("*.html")):
        if "source" not in file.relative_to(site).parts:
            yield file, _Page(file.read_text(encoding="utf-8"))


def leads_to(page: Path, link: str) -> Path:
    target = (page.parent / unquote(link.partition("#")[0])).resolve()
    return target / "index.html" if target.is_dir() else target


@pytest.mark.slow
def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for file, page in pages(site):
        assert not [place for place in page.fetched if re.match(r"(https?:)?//", place)], file
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_folded_tables_are_tables_on_the_site_too(site: Path) -> None:
    shown = [page.read_text(encoding="utf-8") for page in (site / "tables").glob("*/index.html")]
    assert any("<details" in page for page in shown)
    assert not [page for page in shown if "| ---" in page]


@pytest.mark.slow
def test_every_page_of_docs_can_be_reached_from_the_first(site: Path) -> None:
    seen, ahead = set(), [(site / "index.html").resolve()]
    while ahead:
        file = ahead.pop()
        if file in seen or file.suffix != ".html" or not file.is_file():
            continue
        seen.add(file)
        links = (link for link, _ in _Page(file.read_text(encoding="utf-8")).links)
        ahead += [leads_to(file, link) for link in links if not re.match(r"[a-z]+:|#", link)]
    every = {file.resolve() for file, _ in pages(site)} - {(site / "404.html").resolve()}
    assert every <= seen, every - seen


@pytest.mark.slow
def test_a_llama_in_3_bits_and_vllm_is_one_click_away(site: Path) -> None:
    start = site / "index.html"
    found = [
        link
        for link, words in _Page(start.read_text(encoding="utf-8")).links
        if {"3", "bits,", "vLLM"} <= set(words.split())
    ]
    assert found, "the first page has no link that says so"
    answer = leads_to(start, found[0]).read_text(encoding="utf-8")
    words = re.sub(r"<[^>]+>", "", answer)
    for needed in ("model.path=DIR", "quant=w3a16g128", "export=gptq", "vllm serve runs/RUN/export/gptq"):
        assert needed in words, needed


@pytest.mark.slow
def test_a_methods_page_has_the_settings_of_its_file_and_numbers_of_its_records(site: Path) -> None:
    page = (site / "methods" / "gptq" / "index.html").read_text(encoding="utf-8")
    damping = yaml.safe_load((CONF / "method" / "gptq.yaml").read_text(encoding="utf-8"))["damping"]
    assert re.search(rf"<code>damping</code></td>\s*<td[^>]*><code>{damping}</code>", page)
    main = (ROOT / "docs" / "tables" / "main.md").read_text(encoding="utf-8")
    row = next(line for line in main.splitlines() if line.startswith("| w2a16g128 | gptq |"))
    for cell in row.split("|")[4:8]:
        assert f">{cell.strip()}<" in page, cell
