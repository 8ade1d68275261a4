"""A headless Chromium for the tests of pages; they are skipped where there is none."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytest.importorskip("selenium", reason="selenium is not installed: no browser tests")
if not (CHROMIUM and DRIVER):
    pytest.skip(
        "chromium or chromedriver is not installed: no browser tests", allow_module_level=True
    )

from selenium import webdriver  # noqa: E402

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
]


@contextlib.contextmanager
def chromium(profile: Path, width: int) -> Iterator[webdriver.Chrome]:
    """A browser of that width in pixels; its log has what console and network say."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


GROUNDS = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}  # of the pages, by scheme


@contextlib.contextmanager
def emulated(browser: webdriver.Chrome, width: int, scheme: str) -> Iterator[None]:
    """Show pages in a window of that width to somebody who likes light or dark ones."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def assert_fits(browser: webdriver.Chrome, scheme: str) -> None:
    """Nothing of the page hangs over the edge, and its ground is that of the scheme."""
    over = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert over <= 0
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == GROUNDS[scheme]
