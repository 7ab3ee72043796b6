"""A headless Chromium for tests of pages: what it was shown, what it said about that, and whom it asked for anything.

The browser and its driver are the system's own, found on PATH, and selenium is told where they are: nothing is looked
up or downloaded, and no name but this machine's own resolves.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 60.0


class Tab:
    """One page in a headless browser."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, address: str | Path, *, width: int = 1400, height: int = 900, dark: bool = False) -> None:
        """Open a file or an address in a window of this size; what was said and asked for before is forgotten."""
        self.driver.get("about:blank")
        self.resize(width, height)
        self.set_theme(dark=dark)
        self.complaints(), self.requests()
        self.driver.get(address.resolve().as_uri() if isinstance(address, Path) else address)

    def resize(self, width: int, height: int = 900) -> None:
        """Give the window a size, in CSS pixels; narrower ones than a desktop's windows can be, too."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def set_theme(self, *, dark: bool) -> None:
        """Prefer dark or light colours, and in either case no movement, so that a scroll is over at once."""
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page and return what it returns, a promise's value once it is there."""
        return self.driver.execute_script(script, *arguments)

    def settle(self) -> None:
        """Wait until two frames were drawn."""
        self.run("return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def complaints(self) -> list[str]:
        """Return what the console got since the last time at level warning or above; an uncaught error is among it."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the last time, other than data inside the page."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(("data:", "blob:"))]

    def photograph(self, path: Path) -> None:
        """Write a picture of the whole page."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def open_browser(downloads: Path) -> Iterator[Tab]:
    """Start a browser, or skip the test where there is none; files that pages hand out land in `downloads`."""
    pytest.importorskip("selenium", reason="needs selenium: pip install 'star-arch[browser]'")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        missing = "a Chromium" if browser is None else "chromedriver"
        pytest.skip(f"needs {missing} on PATH: apt install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = browser
    arguments = ["--headless=new", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-gpu"]
    arguments += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-first-run", "--lang=en"]
    # A mouse: without one, figures have no buttons.
    arguments.append(
        "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"
    )
    if os.geteuid() == 0:  # as in a container: the sandbox refuses root
        arguments.append("--no-sandbox")
    for argument in arguments:
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=Service(executable_path=driver))
    try:
        chrome.set_page_load_timeout(_SECONDS)
        chrome.set_script_timeout(_SECONDS)
        yield Tab(chrome)
    finally:
        chrome.quit()
