"""Headless Chromium, driven as a reader would use it."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
# All that a page would load from elsewhere fails, and is counted below.
OFFLINE = "--proxy-server=127.0.0.1:9"


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """Yield a driver of Chromium with a new profile; skip the test where either is not installed."""
    pytest.importorskip("selenium", reason="driving a browser needs selenium (the extra dev)")
    binary, server = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or server is None:
        pytest.skip("no chromium and chromedriver on this machine")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, OFFLINE, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=server))
    try:
        yield driver
    finally:
        driver.quit()


def open_page(driver: Any, page: Path, width: int, dark: bool = False, height: int = 900) -> None:
    """Open a page at a width in CSS pixels, light or dark."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    driver.get(page.resolve().as_uri())


def first_paint(driver: Any) -> float:
    """Milliseconds from the start of loading until something is seen."""
    ask = "return performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)[0] ?? null"
    for _ in range(100):
        if (found := driver.execute_script(ask)) is not None:
            return float(found)
        time.sleep(0.05)
    raise AssertionError("the page painted nothing")


def draw_all(driver: Any) -> None:
    """Unfold all and scroll through the page, as a reader would, until every chart is drawn."""
    driver.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    for _ in range(400):
        left = driver.execute_script(
            "const left = [...document.querySelectorAll('.plot:not(.js-plotly-plot)')];"
            "if (left.length) left[0].scrollIntoView({block: 'center', behavior: 'instant'}); return left.length"
        )
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(f"{left} charts were never drawn")


def console(driver: Any) -> list[str]:
    """What the page complained of: errors and warnings of scripts, styles and the security policy."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
