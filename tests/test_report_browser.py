"""The report as people see it: in a real headless browser, on a wide screen and on a phone, by day and by night."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from golden_files import ROOT
from PIL import Image
from test_reporting import PAGE, made_study, write_lines

from smpconv_zoo.reporting.page import Links, render_page
from smpconv_zoo.reporting.report import log_sections

# Nothing is asked of the network, by the page or by the browser; root has no sandbox.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
WIDE, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium to drive a browser")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and ChromeDriver (Debian: chromium, chromium-driver) to look at the report")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    from selenium.webdriver.chrome.service import Service

    running = webdriver.Chrome(options=options, service=Service(driver, env={**os.environ, "SE_AVOID_STATS": "true"}))
    running.set_script_timeout(60)
    yield running
    running.quit()


@pytest.fixture(scope="module")
def with_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of the logs and a made study, without networks."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("eval/results", "weights", "docs"):
        shutil.copytree(ROOT / name, root / name)
    write_lines(root / "eval" / "results" / "study.jsonl", made_study())
    page = root / "docs" / "study.html"
    sections = list(log_sections(root).values())
    page.write_text(render_page("A study", "", [], sections, "", Links(root, page)), encoding="utf-8")
    return page


@pytest.fixture(params=["report", "study"])
def page(request: pytest.FixtureRequest, with_study: Path) -> Path:
    return PAGE if request.param == "report" else with_study


def look(browser: Any, page: Path, size: tuple[int, int], scheme: str = "light") -> None:
    """Open a page in a window of this size; everything folded is unfolded, as a curious reader would."""
    browser.get_log("browser")
    browser.get_log("performance")
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_it_fits_its_window_and_can_be_read(browser: Any, page: Path, size: tuple[int, int]) -> None:
    look(browser, page, size)
    assert browser.execute_script("return window.innerWidth") == size[0]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    # Words of figures, too, stay inside the window, and are large enough to be read. On a phone heads of tables are
    # there for those who listen alone.
    words = browser.execute_script(
        "return [...document.querySelectorAll('.panels text, p, h1, h2, h3, td, th, li, pre, a')].filter(e => {"
        " const head = e.closest('thead'); return !head || getComputedStyle(head).position !== 'absolute' }).map(e => {"
        " const r = e.getBoundingClientRect(), s = e.ownerSVGElement;"
        " const scale = s ? s.getBoundingClientRect().width / s.viewBox.baseVal.width : 1;"
        " return [e.textContent.trim(), r.left, r.right, scale * parseFloat(getComputedStyle(e).fontSize), r.width] })"
    )
    assert len(words) > 200
    shown = [word for word in words if word[4] > 1]
    assert [word for word in shown if word[1] < -1 or word[2] > size[0] + 1] == []
    assert [word for word in shown if word[3] < 9.9] == []
    if page == PAGE:
        assert browser.execute_script("return document.querySelectorAll('h2').length") == 8


def test_it_loads_nothing_and_complains_of_nothing(browser: Any, page: Path) -> None:
    look(browser, page, WIDE)
    assert browser.get_log("browser") == []
    requests = [entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]]
    assert requests and not [request for request in requests if '"url":"http' in request]
    assert browser.execute_script("return document.scripts.length") == 0


def test_every_picture_is_decoded(browser: Any) -> None:
    look(browser, PAGE, WIDE)
    widths = browser.execute_async_script(
        "const done = arguments[0]; const all = [...document.querySelectorAll('image')].map(async e => {"
        " const i = new Image(); i.src = e.getAttribute('href'); await i.decode(); return i.naturalWidth });"
        "Promise.all(all).then(done, error => done(String(error)))"
    )
    assert isinstance(widths, list) and len(widths) >= 20 and min(widths) > 0


def test_every_figure_can_be_told_and_every_link_followed(browser: Any, page: Path) -> None:
    look(browser, page, WIDE)
    labels = browser.execute_script(
        "return [...document.querySelectorAll('.panels svg')].map(e => e.getAttribute('aria-label'))"
    )
    assert len(labels) >= 10 and all(len(label) > 20 for label in labels)
    assert browser.execute_script(
        "return [...document.querySelectorAll('article')].every(e => e.querySelector('.how a'))"
    )
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    links = browser.execute_script("return [...document.querySelectorAll('a')].map(e => e.href)")
    inner = [urlsplit(link).fragment for link in links if urlsplit(link).fragment]
    assert inner and set(inner) <= set(ids)
    files = [Path(unquote(urlsplit(link).path)) for link in links]
    assert len(files) > 20 and [path for path in files if not path.is_file()] == []


def test_a_picture_of_some_figures_is_taken(browser: Any, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "eval" / "photograph.py", PAGE, tmp_path / "it.png", "--only", "accuracy"]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    picture = Image.open(tmp_path / "it.png")
    assert picture.width == 1080 and 500 < picture.height < 1500 and len(picture.convert("RGB").getcolors(256)) > 50
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "is left as it is" in done.stderr


def test_by_night_it_is_dark(browser: Any) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        look(browser, PAGE, WIDE, scheme)
        colours = browser.execute_script(
            "const of = (s, p) => getComputedStyle(document.querySelector(s))[p];"
            "return [of('body', 'backgroundColor'), of('body', 'color'), of('.panels text', 'fill')]"
        )
        ground, ink, words = (sum(map(int, colour.strip("rgb()").split(","))) for colour in colours)
        grounds.append(ground)
        assert abs(ground - ink) > 450 and abs(ground - words) > 300
    assert grounds[0] > 600 > 150 > grounds[1]
