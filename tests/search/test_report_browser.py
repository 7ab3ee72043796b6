"""The pages of a search in a real browser: they are whole, quiet and readable, and every control does its work."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from socket import socket
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from search.report import main, write_report
from search.report_data import read_run
from tests.search.browser import Tab, open_browser
from tests.search.page_checks import list_faults
from tests.search.synthetic_run import OBJECTIVES, write_synthetic_run

pytestmark = pytest.mark.slow

WIDTHS = (400, 800, 1400)
FRONT = '[data-figure="front-figure"]'
_SECONDS = 20.0


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def tab(downloads: Path) -> Iterator[Tab]:
    with open_browser(downloads) as opened:
        yield opened


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    # Four objectives: so many winners that some are folded, and a metric over several powers of ten.
    return write_synthetic_run(
        folder,
        objectives=OBJECTIVES[:4],
        population=12,
        depth=12,
        change=lambda m: {**m, "cache_bytes": m["cache_bytes"] ** 2},
    )


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Path:
    return write_report(run_dir)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    runs = [write_synthetic_run(folder / f"run {seed} <i>", generations=3, seed=seed) for seed in range(3)]
    assert main([*map(str, runs), "--html", str(folder / "comparison.html")]) == 0
    return folder / "comparison.html"


def wait(ready: Callable[[], Any]) -> Any:
    """Return what `ready` gives once it is true."""
    end = time.monotonic() + _SECONDS
    while not (found := ready()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return found


def check(tab: Tab, page: Path, width: int) -> None:
    tab.open(page, width=width)
    assert tab.run("return document.querySelector('footer') !== null")
    tab.run("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    for dark in (False, True):
        tab.set_theme(dark=dark)
        assert list_faults(tab) == {}
    assert tab.requests() == [page.as_uri()]
    assert tab.complaints() == []


@pytest.mark.parametrize("width", WIDTHS)
def test_report_is_whole_and_readable_in_every_width_and_theme(tab: Tab, page: Path, width: int) -> None:
    check(tab, page, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_comparison_is_whole_and_readable_in_every_width_and_theme(tab: Tab, comparison: Path, width: int) -> None:
    check(tab, comparison, width)
    lines = tab.run(
        "return [...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('.js-line').length)"
    )
    assert lines == [3, 3]


@pytest.mark.parametrize("shape", [{"failing": 1.0, "baselines": False}, {"generations": 1, "population": 1}])
def test_report_of_a_young_run_is_whole(tab: Tab, tmp_path: Path, shape: dict[str, Any]) -> None:
    check(tab, write_report(write_synthetic_run(tmp_path, **shape)), 800)


def test_axes_follow_the_menus_and_the_small_panels(tab: Tab, page: Path) -> None:
    tab.open(page)

    def titles() -> list[str]:
        tab.settle()
        return tab.run(f"return ['x', 'y'].map(a => document.querySelector('{FRONT} .' + a + 'title').textContent)")

    def places() -> list[float]:
        return tab.run(f"return document.querySelector('{FRONT}').data.find(t => t.name === 'front').x")

    assert titles() == ["Decode time (× reference)", "Perplexity (per token)"]
    before = places()
    for axis, place in (("x", 0), ("y", 1)):
        options = tab.run(f"return [...document.querySelector('[data-axis={axis}]').options].map(o => o.textContent)")
        assert len(options) > 10
        for number, option in enumerate(options):
            tab.run(
                f"const menu = document.querySelector('[data-axis={axis}]'); menu.value = {number};"
                "menu.dispatchEvent(new Event('change'))"
            )
            assert titles()[place] == option
    assert places() != before
    pairs = tab.driver.find_elements("css selector", ".pair")
    assert len(pairs) == 6
    for pair in pairs:
        pair.click()
        assert tab.run("return [...document.querySelectorAll('.pair[aria-pressed=true]')]") == [pair]
        drawn = tab.run("return [...arguments[0].querySelectorAll('.title')].map(t => t.textContent)", pair)
        assert [text.removesuffix(", log") for text in drawn] == titles()
    assert tab.complaints() == []


def test_ticks_of_a_log_axis_are_whole_numbers_of_their_unit(tab: Tab, page: Path) -> None:
    tab.open(page)
    ticks = tab.run("return [...document.querySelectorAll('[data-figure^=best-cache] .ytick')].map(t => t.textContent)")
    assert len(ticks) >= 2
    assert all(float(tick.replace("k", "e3")) > 0 for tick in ticks)


def test_a_mark_tells_its_genome_and_leads_to_its_drawing(tab: Tab, run_dir: Path, page: Path) -> None:
    from selenium.webdriver import ActionChains

    tab.open(page)
    member = read_run(run_dir).front[-1]
    figure = tab.driver.find_element("css selector", FRONT)
    tab.run("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", figure)
    tab.settle()
    mark = tab.run(
        f"const traces = [...document.querySelectorAll('{FRONT} .scatterlayer .trace')];"
        "const marks = traces.map(trace => trace.querySelectorAll('.point'));"
        "return [...marks.find(m => m.length === arguments[0])].at(-1)",
        len(read_run(run_dir).front),
    )
    ActionChains(tab.driver).move_to_element(mark).perform()
    said = wait(lambda: tab.run(f"return document.querySelector('{FRONT} .hoverlayer').textContent"))
    assert member.genome_hash in said
    assert said.replace(" ", "").endswith(member.genome.split("-")[-1])
    ActionChains(tab.driver).click(mark).perform()
    card = f"document.getElementById('winner-{len(read_run(run_dir).front)}')"
    wait(lambda: tab.run(f"const box = {card}.getBoundingClientRect(); return box.top > -5 && box.top < innerHeight"))
    assert tab.run(f"return {card}.closest('details').open")
    assert tab.complaints() == []


def test_buttons_of_a_figure_show_under_the_pointer_and_work(tab: Tab, page: Path, downloads: Path) -> None:
    from selenium.webdriver import ActionChains

    tab.open(page)
    figure = tab.driver.find_element("css selector", FRONT)
    bar = figure.find_element("css selector", ".modebar-group")
    ActionChains(tab.driver).move_to_element(tab.driver.find_element("css selector", "h1")).perform()
    wait(lambda: tab.run("return getComputedStyle(arguments[0]).opacity", bar) == "0")
    tab.run("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", figure)
    ActionChains(tab.driver).move_to_element(figure).perform()
    wait(lambda: tab.run("return getComputedStyle(arguments[0]).opacity", bar) == "1")

    def span() -> float:
        tab.settle()
        low, high = tab.run("return arguments[0]._fullLayout.xaxis.range", figure)
        return high - low

    buttons = {b.get_attribute("data-title"): b for b in bar.find_elements("css selector", ".modebar-btn")}
    assert list(buttons) == ["Zoom in", "Zoom out", "Reset axes", "Download plot as a PNG"]
    whole = span()
    buttons["Zoom in"].click()
    wait(lambda: span() < whole)
    buttons["Reset axes"].click()
    wait(lambda: span() == pytest.approx(whole))
    buttons["Zoom out"].click()
    wait(lambda: span() > whole)
    buttons["Download plot as a PNG"].click()
    picture = wait(lambda: next(downloads.glob("*.png"), None))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert tab.complaints() == []


def test_a_column_sorts_up_and_then_down(tab: Tab, page: Path) -> None:
    tab.open(page)
    heads = tab.driver.find_elements("css selector", "table[data-sortable] thead button")
    assert len(heads) > 10
    for column, head in enumerate(heads):
        for order in ("ascending", "descending"):
            tab.run("arguments[0].click()", head)
            sorts = tab.run(
                "return [...document.querySelectorAll('table[data-sortable] th')].map(h => h.getAttribute('aria-sort'))"
            )
            assert [(place, sort) for place, sort in enumerate(sorts) if sort] == [(column, order)]
            values = tab.run(
                "return [...document.querySelectorAll('table[data-sortable] tbody tr')]"
                f".map(row => Number.parseFloat(row.cells[{column}].dataset.value))"
            )
            assert values == sorted(values, reverse=order == "descending")


def test_titles_of_a_long_table_stay_in_sight(tab: Tab, page: Path) -> None:
    tab.open(page, height=500)
    tops = tab.run(
        "const long = document.querySelector('.scroll.long'); long.scrollTo(200, 400);"
        "const head = long.querySelector('th.sticky').getBoundingClientRect(), edge = long.getBoundingClientRect();"
        "return [long.scrollTop, head.top - edge.top, head.left - edge.left]"
    )
    assert tops == [400, pytest.approx(0, abs=1.5), pytest.approx(0, abs=1.5)]


def test_links_lead_where_they_say(tab: Tab, page: Path) -> None:
    tab.open(page)
    links = tab.driver.find_elements("css selector", "a[href]")
    assert len(links) > 20
    for link in tab.run("return [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"):
        assert tab.run(
            "location.hash = ''; location.hash = arguments[0];"
            "return new Promise(done => setTimeout(() => done("
            "document.getElementById(arguments[0].slice(1)).checkVisibility()), 0))",
            link,
        ), link
    # Someone who opens the page at a winner in the folded part sees it.
    number = tab.run("return document.querySelector('details .winner:last-child').id")
    tab.open(page.as_uri() + f"#{number}")
    assert tab.run(f"return document.querySelector('#{number}').checkVisibility()")


def test_every_control_can_be_reached_and_used_by_keys(tab: Tab, page: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    tab.open(page)
    controls = "nav a, select, .pair, thead button, [tabindex='0'], summary, tbody a"
    wanted = tab.run(f'return document.querySelectorAll("{controls}").length')
    tab.run("window.seen = new Set(); document.addEventListener('focusin', e => seen.add(e.target))")
    bare = []
    for _ in range(wanted + 80):
        ActionChains(tab.driver).send_keys(Keys.TAB).perform()
        at = tab.run(
            "const e = document.activeElement; const s = getComputedStyle(e);"
            "return [e.tagName, e.className.baseVal ?? e.className, s.outlineStyle, e.matches(':focus-visible')]"
        )
        if at[0] == "BODY":
            break
        if at[2] == "none" or not at[3]:
            bare.append(at)
    assert bare == []
    unseen = tab.run(
        f'const all = [...document.querySelectorAll("{controls}")];'
        "return all.filter(e => e.checkVisibility() && !seen.has(e)).map(e => e.outerHTML.slice(0, 80))"
    )
    assert unseen == []
    tab.run("document.querySelectorAll('.pair')[2].focus()")
    ActionChains(tab.driver).send_keys(Keys.ENTER).perform()
    assert tab.run("return document.querySelectorAll('.pair')[2].getAttribute('aria-pressed')") == "true"
    tab.run("document.querySelector('summary').focus()")
    ActionChains(tab.driver).send_keys(Keys.SPACE).perform()
    wait(lambda: tab.run("return document.querySelector('details').open"))


def test_figures_follow_the_theme_and_the_printer(tab: Tab, page: Path) -> None:
    tab.open(page, dark=False)
    ink = f"return getComputedStyle(document.querySelector('{FRONT} .xtitle')).fill"
    light = tab.run(ink)
    tab.set_theme(dark=True)
    wait(lambda: tab.run(ink) != light)
    tab.driver.execute_cdp_cmd("Page.printToPDF", {})
    assert list_faults(tab) == {}
    assert tab.complaints() == []


def test_optuna_dashboard_shows_an_exported_study(tab: Tab, run_dir: Path, tmp_path: Path) -> None:
    reason = "needs optuna-dashboard: pip install 'star-arch[browser]'"
    pytest.importorskip("optuna", reason=reason)
    pytest.importorskip("optuna_dashboard", reason=reason)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    assert main([str(run_dir), "--optuna", storage]) == 0
    run = read_run(run_dir)
    total = len(run.candidates) + len(run.baselines)
    with closing(socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = "import sys; from optuna_dashboard._cli import main; sys.exit(main())"
    command = [sys.executable, "-c", serve, storage, "--host", "127.0.0.1", "--port", str(port), "--quiet"]
    server = subprocess.Popen(command, cwd=tmp_path)
    try:
        address = f"http://127.0.0.1:{port}/dashboard"
        end = time.monotonic() + 240  # it imports for a minute where others use the processor
        while not _answers(address):
            assert server.poll() is None
            assert time.monotonic() < end, "optuna-dashboard does not answer"
            time.sleep(0.5)
        for path, words in (
            ("", [run.directory.name]),
            ("/studies/1", ["perplexity", "Hyperparameter Importance"]),
            ("/studies/1/trials", [f"{total} Trials", "Trial 0", "Best Trial", "Fail", "perplexity"]),
        ):
            tab.open(address + path)
            for word in words:
                wait(lambda word=word: word in tab.run("return document.body.innerText"))  # type: ignore[misc]
            assert tab.complaints() == []
            assert all(asked.startswith(f"http://127.0.0.1:{port}/") for asked in tab.requests())
    finally:
        server.terminate()
        server.wait(30)


def _answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=30) as answer:
            return bool(answer.status == 200)
    except (URLError, ConnectionError, TimeoutError):
        return False
