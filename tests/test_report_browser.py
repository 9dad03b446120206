"""The report in a real browser: seen whole on a wide and a narrow screen, silent and alone."""

from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
import stored_run

from infalign_jax import report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine"),
]

# Of every figure: its left and right edge, its height, and how many shapes it holds.
FIGURES = """[...document.querySelectorAll('figure > svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  return [box.left, box.right, box.height, svg.querySelectorAll('path').length];
})"""
OVERFLOW = """[...document.querySelectorAll('body *')].filter(element =>
  !element.closest('.scroll, svg') && element.scrollWidth > element.clientWidth + 1
  && getComputedStyle(element).display !== 'inline').map(element => element.outerHTML)"""
SCROLLING = """[...document.querySelectorAll('.scroll')].filter(box =>
  box.scrollWidth > box.clientWidth).length"""
NOISE = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.draw(stored_run.write(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_seen(page: Path, tab: browser.Tab, width: int) -> None:
    tab.open(page.as_uri(), width)
    figures = tab.evaluate(FIGURES)
    assert len(figures) == len(list((page.parent / "plots").glob("*.png")))
    for left, right, height, shapes in figures:
        assert left >= 0
        assert right <= width
        assert right - left > 250
        assert height > 150
        assert shapes > 5


@pytest.mark.parametrize("width", [1280, 390])
def test_only_tables_scroll_sideways(page: Path, tab: browser.Tab, width: int) -> None:
    tab.open(page.as_uri(), width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(OVERFLOW) == []
    assert (tab.evaluate(SCROLLING) > 0) == (width == 390)


def test_the_page_is_silent_and_asks_the_network_for_nothing(page: Path, tab: browser.Tab) -> None:
    tab.open(page.as_uri(), 1280)
    requests = [e for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert [e["params"]["request"]["url"] for e in requests] == [page.as_uri()]
    assert [e for e in tab.events if e["method"] in NOISE] == []


def test_a_script_in_a_response_is_shown_and_not_run(page: Path, tab: browser.Tab) -> None:
    tab.open(page.as_uri(), 1280)
    assert tab.evaluate("document.title") == "quickstart"
    assert tab.evaluate("document.querySelectorAll('script, img').length") == 0
    assert stored_run.SCRIPT in tab.evaluate("document.body.textContent")


def test_the_checks_see_a_page_that_is_wrong(tmp_path: Path, tab: browser.Tab) -> None:
    wrong = tmp_path / "wrong.html"
    wrong.write_text(
        "<meta name=viewport content='width=device-width'><img src='http://127.0.0.1:9/x.png'>"
        "<div style='width: 600px'>wide</div><script>console.error('no')</script>"
    )
    tab.open(wrong.as_uri(), 390)
    assert tab.evaluate("document.documentElement.scrollWidth") > 390
    assert any(e["method"] == "Runtime.consoleAPICalled" for e in tab.events)
    requests = [e for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert len(requests) == 2
