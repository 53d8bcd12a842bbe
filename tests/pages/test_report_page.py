"""`lsiq report --html` writes one page that holds all it shows, fetches nothing, and can be read by everybody."""

from __future__ import annotations

import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from helpers.browser import chromium, console, draw_all, first_paint, open_page
from helpers.configuration import ROOT, compose_run

from lsiq.errors import InputError
from lsiq.experiment.run import run
from lsiq.report.compact import read_runs, write_runs
from lsiq.report.page.content import Explorer, Page, Section
from lsiq.report.page.sources import gather
from lsiq.report.page.write import render, write_page
from lsiq.report.significance import compare
from lsiq.results.record import Record, read_record, write_record

RECORDS = ROOT / "analysis" / "records"
MOST_BYTES = 5_000_000
VOID = {"meta", "link", "input", "br", "img", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    inside: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        return [one for child in self.inside for one in ([child] if child.tag == tag else []) + child.all(tag)]

    def get(self, name: str) -> str:
        return self.attributes.get(name) or ""

    def words(self) -> str:
        return self.text + "".join(child.words() for child in self.inside)


class Tree(html.parser.HTMLParser):
    """A page as elements; every element must be closed by its own tag."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(page.read_text(encoding="utf-8"))
        assert self._open == [self.root], f"never closed: {self._open[-1].tag}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self._open[-1].inside.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self._open[-1].text += data


def charts(tree: Tree) -> dict[str, dict[str, Any]]:
    """What is drawn, by the title that stands above it and, as titles may repeat, a number."""
    found: dict[str, dict[str, Any]] = {}
    for figure in tree.root.all("figure"):
        for script in figure.all("script"):
            title = figure.all("figcaption")[0].text
            place = sum(name.startswith(title) for name in found)
            found[f"{title} #{place}" if place else title] = json.loads(script.text)
    return found


def rows(tree: Tree, caption: str) -> list[list[str]]:
    (table,) = [table for table in tree.root.all("table") if table.all("caption")[0].words() == caption]
    return [[cell.words() for cell in row.inside] for body in table.all("tbody") for row in body.inside]


@pytest.fixture(scope="module")
def runs(checkpoints: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a learned run, and rounding at 2 and 4 bits."""
    folder = tmp_path_factory.mktemp("runs")
    for method, bits in (("lsi-quick", 2), ("rtn", 2), ("rtn", 4)):
        run(
            compose_run(
                f"model.path={checkpoints['llama']}",
                *(f"method={method}", f"quant.weight.bits={bits}", "quant.weight.group=32"),
                *("calib=file", f"calib.path={text_file}", "calib.samples=4", "calib.seqlen=32"),
                *("eval=file", f"eval.path={text_file}", "eval.seqlen=64"),
                *("tracker=tensorboard", "tracker.mode=disabled", "tracker.group=trio", f"paths.runs={folder}"),
            )
        )
    return folder


@pytest.fixture(scope="module")
def one(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the learned run."""
    return write_page(runs, ["lsi-quick"], tmp_path_factory.mktemp("one") / "page.html")


@pytest.fixture(scope="module")
def three(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of all three."""
    return write_page(
        runs, ["w2a16g32_rtn", "lsi-quick", "w4a16g32_rtn"], tmp_path_factory.mktemp("three") / "page.html"
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of every committed record."""
    return write_page(Path("nowhere"), [str(RECORDS)], tmp_path_factory.mktemp("study") / "page.html")


@pytest.fixture(params=["one", "three", "study"])
def page(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_a_page_is_small_and_nothing_in_it_is_fetched(page: Path) -> None:
    assert page.stat().st_size < MOST_BYTES
    tree = Tree(page)
    named = [
        (element.tag, name, value)
        for tag in ("a", "link", "script", "img", "iframe", "source", "object", "form", "use", "image")
        for element in tree.root.all(tag)
        for name in ("src", "href", "srcset", "data", "action", "xlink:href")
        if (value := element.get(name)) and not value.startswith("#") and value != "data:,"
    ]
    assert named == []
    (style,) = tree.root.all("style")
    assert not re.search(r"url\(|@import", style.text)
    policies = [meta.get("content") for meta in tree.root.all("meta") if "Policy" in meta.get("http-equiv")]
    assert [policy.split(";")[0] for policy in policies] == ["default-src 'none'"]
    assert "http" not in policies[0]


def test_tables_and_charts_can_be_read_without_seeing_them(page: Path) -> None:
    tree = Tree(page)
    elements = [
        element
        for tag in ("div", "span", "p", "table", "figcaption", "h2", "section", "input", "select")
        for element in tree.root.all(tag)
    ]
    ids = Counter(element.get("id") for element in elements if element.get("id"))
    assert max(ids.values()) == 1
    for table in tree.root.all("table"):
        assert table.all("caption")[0].words()
        for heading in table.all("thead")[0].all("th"):
            assert heading.get("scope") == "col"
            (button,) = heading.all("button")
            assert button.words()
        for body in table.all("tbody"):
            assert all(row.inside[0].get("scope") == "row" for row in body.inside)
    plots = [element for element in tree.root.all("div") if element.get("class") == "plot"]
    assert plots
    for element in [*plots, *(element for element in elements if element.get("role") == "region")]:
        named = element.get("aria-labelledby").split()
        assert named
        assert all(ids[name] == 1 for name in named)
    words = {element.get("id"): element.words() for element in tree.root.all("p")}
    assert all(len(words[f"{plot.get('id')}-alt"]) > 10 for plot in plots)
    labels = {label.get("for") for label in tree.root.all("label")}
    fields = [*tree.root.all("input"), *tree.root.all("select")]
    assert {field.get("id") for field in fields} == labels


def test_a_run_is_told_from_its_settings_to_its_costs(one: Path, runs: Path) -> None:
    tree, source = Tree(one), gather(runs, ["lsi-quick"])[0]
    record, folder = source.record, source.folder
    assert record is not None
    assert folder is not None
    assert [heading.text for heading in tree.root.all("h2")] == [
        *("Quality", "Errors and flipped codes", "Weights and codes", "Learning", "Singular values"),
        *("Time and memory", "Settings and origin", "Left out"),
    ]
    drawn = charts(tree)
    left: Any = pandas.read_parquet(folder / "trajectory.parquet")
    last = left[left["epoch"] < 0]
    for title, column in (
        ("Output error, rounded to nearest", "error_before"),
        ("Output error, lsi-quick", "error_after"),
        ("Flipped codes", "flip_rate"),
    ):
        (trace,) = drawn[title]["data"]
        assert np.ravel(trace["customdata"]) == pytest.approx(last[column].to_numpy(), rel=1e-4)
        assert trace["x"] == [name.rpartition(".")[2] for name in dict.fromkeys(last["linear"])]
    histograms = [drawn[title]["data"] for title in drawn if title.startswith("block ") and "proj" in title]
    counts = last.set_index(["block", "linear"]).loc[(0, "self_attn.q_proj")]
    assert [trace["y"] for trace in histograms[0]] == [
        list(counts["histogram_before"]),
        list(counts["histogram_after"]),
    ]
    epochs = left[(left["epoch"] >= 0) & (left["block"] == 1)].drop_duplicates("epoch")
    losses = {trace["name"]: trace["y"] for trace in drawn["Loss"]["data"]}
    assert losses["block 1"] == pytest.approx(list(epochs["loss"]), rel=1e-4)
    (increments,) = [drawn[title]["data"] for title in drawn if title == "block 0 q_proj"]
    first = left[(left["epoch"] >= 0) & (left["block"] == 0) & (left["linear"] == "self_attn.q_proj")]
    assert increments[0]["y"] == pytest.approx([values[0] for values in first["increments"]], rel=1e-4)
    (seconds,) = drawn["Time by stage"]["data"]
    assert dict(zip(seconds["y"], seconds["x"], strict=True))["quantize"] == pytest.approx(
        record.seconds["quantize"], rel=1e-4
    )
    (peaks,) = drawn["Peak host memory until the end of each stage"]["data"]
    assert peaks["x"][-1] * 2**30 == pytest.approx(record.peak_bytes["host"], rel=0.05)
    assert ["quant.weight.bits", "2"] in rows(tree, "Settings by key")


def test_excess_stands_with_the_interval_of_its_windows(one: Path, runs: Path) -> None:
    from lsiq.report.significance import BLOCK, block_means, bootstrap_interval

    source = gather(runs, ["lsi-quick"])[0]
    assert source.folder is not None
    windows = pandas.read_parquet(source.folder / "windows.parquet")
    expected = bootstrap_interval(block_means(np.asarray(windows["loss"] - windows["float_loss"], np.float64), BLOCK))
    told = "Perplexity, excess loss over the float model with its interval, and divergence, by text and model"
    (row,) = [row for row in rows(Tree(one), told) if row[1] == "lsi-quick"]
    assert [float(value) for value in row[4:6]] == pytest.approx(expected, rel=1e-4)
    assert float(row[4]) <= float(row[3]) <= float(row[5])


def test_what_a_run_has_not_is_left_out_in_a_line(runs: Path, tmp_path: Path) -> None:
    def left(page: Path) -> str:
        return " ".join(item.words() for item in Tree(page).root.all("li") if not item.all("a"))

    rounded = write_page(runs, ["w2a16g32_rtn"], tmp_path / "rounded.html")
    assert "Learning and singular values: rtn trains nothing." in left(rounded)
    record, _ = find(runs, "w2a16g32_rtn")
    write_record(replace(record, stage_peaks={}), tmp_path / "old")  # only the record was kept, of an earlier version
    kept = write_page(runs, [str(tmp_path / "old")], tmp_path / "kept.html")
    assert "holds no trajectory.parquet" in left(kept)
    assert "Memory by stage: the run was made by a version" in left(kept)
    assert "Flipped codes" not in charts(Tree(kept))


def test_a_plan_beside_the_record_is_drawn(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "planned"
    shutil.copytree(find(runs, "w2a16g32_rtn")[1], folder)
    layers = {f"{block}.self_attn.{name}": f"w{2 + block}g32" for block in range(2) for name in ("q_proj", "k_proj")}
    plan = {"layers": {**layers, "lm_head": "w8g32"}, "average_bits": 2.5, "sensitivities": {"0.q": {"w2g32": 0.25}}}
    (folder / "plan.json").write_text(json.dumps(plan))
    tree = Tree(write_page(runs, [str(folder)], tmp_path / "page.html"))
    (trace,) = charts(tree)["Format of each linear, 2.5 bits on average"]["data"]
    assert trace["text"] == [["w2g32", "w2g32"], ["w3g32", "w3g32"]]
    assert trace["z"] == [[0, 0], [1, 1]]
    assert rows(tree, "What each choice costs: divergence at the model's end, nats per token") == [["0.q", "0.25"]]


def find(runs: Path, named: str) -> tuple[Record, Path]:
    source = gather(runs, [named])[0]
    assert source.record is not None
    assert source.folder is not None
    return source.record, source.folder


def test_several_runs_are_compared_as_the_command_compares_them(three: Path, runs: Path) -> None:
    tree, drawn = Tree(three), charts(Tree(three))
    folders = [find(runs, name)[1] for name in ("w2a16g32_rtn", "lsi-quick", "w4a16g32_rtn")]
    for letter, folder in zip("BC", folders[1:], strict=True):
        for difference in compare(folders[0], folder):
            (trace,) = drawn[f"{difference.key}: difference to A, 95% intervals"]["data"]
            place = trace["y"].index(f"{letter} − A")
            assert trace["x"][place] == pytest.approx(difference.mean, rel=1e-4)
            assert trace["customdata"][place] == pytest.approx([difference.low, difference.high], rel=1e-4)
    assert ["quant.weight.bits", "2", "2", "4"] in rows(tree, "Settings that differ")
    (trace,) = drawn["Output error, B / A"]["data"]
    errors = [
        pandas.read_parquet(folder / "trajectory.parquet").query("epoch < 0")["error_after"].to_numpy()
        for folder in folders[:2]
    ]
    assert np.ravel(trace["customdata"]) == pytest.approx(errors[1] / errors[0], rel=1e-3)
    points = drawn["Bits per weight against quality, with the Pareto front"]
    assert points["bits"] == pytest.approx([find(runs, f.name)[0].average_bits for f in folders], rel=1e-4)


def test_every_committed_record_stands_on_the_page_of_the_study(study: Path) -> None:
    recorded = [run for file in sorted(RECORDS.glob("*.jsonl")) for run in read_runs(file)]
    distinct = {(run.run_id, run.created) if run.run_id else id(run): run for run in recorded}
    assert len(distinct) > 600
    tree = Tree(study)
    assert len(rows(tree, f"All {len(distinct)} runs")) == len(distinct)
    points = charts(tree)["Bits per weight against quality, with the Pareto front"]
    assert len(points["bits"]) == len(distinct)
    for record, drawn in zip(distinct.values(), points["measures"]["excess/bundled@512"], strict=True):
        assert drawn == (
            None if (value := record.metrics.get("excess/bundled@512")) is None else pytest.approx(value, rel=1e-4)
        )


def test_rows_of_a_study_name_the_run_and_the_best_of_a_format_stand_first(study: Path) -> None:
    (table,) = [t for t in Tree(study).root.all("table") if t.all("caption")[0].words().startswith("All ")]
    columns = [heading.words() for heading in table.all("thead")[0].all("th")]
    assert columns[:3] == ["method", "format", "model"]
    place, shown = columns.index("excess/wikitext2@512"), rows(Tree(study), table.all("caption")[0].words())
    models = Counter(row[2] for row in shown)
    assert [row[2] for row in shown] == [model for model, count in models.most_common() for _ in range(count)]
    for kind in {(row[1], row[2]) for row in shown}:
        values = [float(row[place]) for row in shown if (row[1], row[2]) == kind and row[place] != "—"]
        assert values == sorted(values)
    assert any(row[0] == "lsi-corner, calib.samples=16" for row in shown)


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    nasty = '</script><script>alert("x")</script><img src=x onerror=alert(1)>&amp;'
    first = read_runs(RECORDS / "scale.jsonl")[0]
    write_runs([replace(first, method=nasty, run_id=nasty), replace(first, model=nasty)], tmp_path / "nasty.jsonl")
    tree = Tree(write_page(tmp_path, [str(tmp_path / "nasty.jsonl")], tmp_path / "page.html"))
    scripts = [
        script for script in tree.root.all("script") if script.get("type") not in ("application/json", "text/plain")
    ]
    assert not tree.root.all("img")
    assert not any("alert(" in script.text for script in scripts)
    assert any(nasty in row for row in rows(tree, "All 2 runs"))
    explorer = Explorer(["m"], [nasty], [nasty], [3.0], {"excess": [1.0]})
    text = render(Page("t", [], [], [Section("s", [explorer])], []))
    (told,) = re.findall(r'data-explorer="c1">(.*?)</script>', text)
    assert json.loads(told)["methods"] == [nasty.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")]


def test_the_library_is_the_one_whose_origin_is_named() -> None:
    folder = ROOT / "lsiq" / "report" / "page" / "template" / "plotly"
    digest = hashlib.sha256((folder / "plotly-cartesian.min.js").read_bytes()).hexdigest()
    assert (folder / "ORIGIN").read_text().split()[-1] == digest
    assert "MIT" in (folder / "LICENSE").read_text()


def test_a_page_is_asked_for_by_run_folder_study_or_file(runs: Path, tmp_path: Path) -> None:
    def ids(*named: str) -> set[str | None]:
        return {source.run.run_id for source in gather(runs, named)}

    everything = {file.parent.name for file in runs.glob("*/record.json")}
    assert ids() == ids("trio") == ids(str(runs)) == everything
    assert ids("lsi-quick") == {find(runs, "lsi-quick")[1].name}
    assert len(gather(runs, ["trio", "lsi-quick"])) == 3, "a run that is named twice is shown once"
    with pytest.raises(InputError, match="no such run"):
        gather(runs, ["nowhere"])
    with pytest.raises(InputError, match="no finished run there"):
        gather(tmp_path, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither records nor files"):
        gather(runs, [str(tmp_path / "empty")])


def test_the_command_writes_the_page_and_prints_where(runs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lsiq.report", "--html", "--runs", str(runs)]
    done = subprocess.run([*command, "trio"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "report.html\n"
    assert "3 runs of llama" in Tree(tmp_path / "report.html").root.all("h1")[0].text
    done = subprocess.run([*command, "w2a16g32_rtn"], cwd=tmp_path, capture_output=True, text=True, check=True)
    folder = find(runs, "w2a16g32_rtn")[1]
    assert Path(done.stdout.strip()) == folder / "report.html"
    (folder / "report.html").unlink()
    assert read_record(folder) is not None
    wrong = subprocess.run([*command, "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: nowhere: no such run")


def quickest_paint(driver: Any, page: Path, width: int, dark: bool) -> float:
    """Open a page up to five times, until it is seen within a second; milliseconds of the fastest time."""
    seen: list[float] = []
    while not seen or (min(seen) >= 1000 and len(seen) < 5):
        open_page(driver, page, width, dark)
        seen.append(first_paint(driver))
    return min(seen)


@pytest.mark.slow
def test_a_browser_draws_every_panel_without_a_complaint(one: Path, three: Path, study: Path, tmp_path: Path) -> None:
    """First paint took 0.2 to 0.5 s on two cores with other work; the fastest of some loads is the page's own time."""
    with chromium(tmp_path / "profile") as driver:
        for page in (one, three, study):
            for width, dark in ((390, True), (820, False), (1440, True)):
                assert quickest_paint(driver, page, width, dark) < 1000
                draw_all(driver)
                empty = (
                    "return [...document.querySelectorAll('.plot')].filter(plot => !plot.querySelector("
                    "'.scatterlayer .trace, .barlayer .trace, .heatmaplayer image')).map(plot => plot.id)"
                )
                assert driver.execute_script(empty) == []
                wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
                assert driver.execute_script(wide) <= 0, f"{page} is wider than {width} pixels"
                assert console(driver) == []


@pytest.mark.slow
def test_tables_sort_and_filter_by_keyboard_and_the_pareto_plot_follows_its_choices(
    study: Path, tmp_path: Path
) -> None:
    from selenium.webdriver.common.keys import Keys

    with chromium(tmp_path / "profile") as driver:
        open_page(driver, study, 1440)
        draw_all(driver)
        (table,) = [t for t in driver.find_elements("css selector", "table") if "All" in t.text[:4]]
        names = [heading.text.rstrip("↕↑↓") for heading in table.find_elements("css selector", "thead th")]
        place = names.index("excess/bundled@512")
        heading = table.find_elements("css selector", "thead th")[place]
        column = "return [...arguments[0].querySelectorAll('tbody tr')].map(row => row.cells[arguments[1]].textContent)"
        for key, wanted in ((Keys.ENTER, "ascending"), (Keys.SPACE, "descending")):
            heading.find_element("css selector", "button").send_keys(key)
            assert heading.get_attribute("aria-sort") == wanted
            values = driver.execute_script(column, table, place)
            known = [float(value) for value in values if value != "—"]
            assert known == sorted(known, reverse=wanted == "descending")
            assert values[len(known) :] == ["—"] * (len(values) - len(known))
        driver.execute_script("arguments[0].closest('.scroll').scrollLeft = 1e5", table)
        ends = "return [...arguments[0].tBodies[0].rows[0].cells].map(cell => cell.getBoundingClientRect().right)"
        assert driver.execute_script(ends, table)[1] > driver.execute_script(ends, table)[5], "what names a row stays"
        search = driver.find_element("css selector", f"[data-filter='{table.get_attribute('id')}']")
        search.send_keys("tiny-opt autoround")
        shown = "return [...arguments[0].querySelectorAll('tbody tr:not([hidden])')].map(row => row.textContent)"
        left = driver.execute_script(shown, table)
        assert 0 < len(left) < 100
        assert all("tiny-opt" in row and "autoround" in row for row in left)
        assert (
            driver.execute_script(
                "return document.querySelector(`[data-count='${arguments[0].id}']`).textContent", table
            )
            == f"{len(left)} rows"
        )
        points = (
            "return document.querySelector('.explorer .plot').data.flatMap(t => t.name === 'Pareto front' ? [] : t.y)"
        )
        front = "return document.querySelector('.explorer .plot').data.find(t => t.name === 'Pareto front').y"
        before, best = driver.execute_script(points), driver.execute_script(front)
        assert min(before) == best[-1]
        assert best == sorted(best, reverse=True)
        model = driver.find_element("css selector", ".explorer select")
        model.send_keys("tiny-opt")
        assert driver.execute_script(points) != before
        assert console(driver) == []
