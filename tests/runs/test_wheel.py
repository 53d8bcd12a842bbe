"""The wheel, installed away from the checkout, gives the command `lsiq`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.configuration import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that the wheel of this checkout is installed in."""
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling (the extra test)")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(folder / "site"), str(wheel)], check=True, capture_output=True)
    return folder / "site"


def lsiq(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(site / "bin" / "lsiq"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_installed_command_runs_and_reports_away_from_the_checkout(site, tmp_path):
    (tmp_path / "conf" / "quant").mkdir(parents=True)
    (tmp_path / "conf" / "quant" / "mine.yaml").write_text("defaults: [w3a16g128]\nweight:\n  bits: 5\n")
    done = lsiq(site, tmp_path, "method=rtn", "quant=mine", "calib=none", "eval.windows=1", "tracker=none")
    assert done.returncode == 0, done.stderr
    assert "tiny-llama  w5a16g128  rtn" in done.stdout
    record = next(tmp_path.glob("runs/*/record.json")).read_text()
    assert str(ROOT) not in record  # the package that ran is the installed one
    listed = lsiq(site, tmp_path, "report")
    assert "tiny-llama_w5a16g128_rtn" in listed.stdout
    paged = lsiq(site, tmp_path, "report", "--html", "w5a16g128", "--out", "page.html")
    assert paged.stdout == "page.html\n", paged.stderr
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "plotly.js (cartesian - minified)" in text
    assert "Flipped codes" in text
    assert "Errors by linear: the run had no calibration data" in text


@pytest.mark.slow
def test_the_wheel_holds_the_licence_of_what_comes_with_it(site):
    (about,) = site.glob("lsiq-*.dist-info")
    told = [file.read_text(encoding="utf-8") for file in (about / "licenses").rglob("LICENSE*")]
    assert any("Plotly" in text for text in told)


@pytest.mark.slow
def test_the_wheel_holds_the_studies_and_says_what_may_be_chosen(site, tmp_path):
    shown = lsiq(site, tmp_path, "sweep=study", "--cfg", "hydra")
    assert "variants" in shown.stdout, shown.stderr
    wrong = lsiq(site, tmp_path, "quant=w9a16")
    assert wrong.returncode != 0
    assert "w3a16g128" in wrong.stderr
