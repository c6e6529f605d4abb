"""The page: one file that asks nobody for anything, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from recorded import config_for, invented, make_model, record

from gemini import GeminiDDP, HardwareProfile, StepFlops
from gemini.errors import RecordingError
from gemini.profile.page import html_page
from gemini.profile.recording import read_recording
from gemini.profile.report_parts import TABS, report_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROFILE = HardwareProfile(
    matrix_rates={"float32": 1e10},
    host_memory_rate=1e10,
    h2d_rate=1e10,
    d2h_rate=1e10,
    nvme_read_rate=1e9,
    nvme_write_rate=1e9,
    nvme_mixed_rate=1e9,
)


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("page")
    with GeminiDDP(make_model(), config_for("disk", directory)) as engine:
        report = engine.memory_report(profile=PROFILE, flops=StepFlops(forward=1e6, backward=2e6))
        record(engine, directory / "run", steps=[1, 2], predicted=report.predicted)
    path = directory / "report.html"
    path.write_text(html_page(read_recording(directory / "run")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("needs a browser: chromium or google-chrome")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive the browser")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str], list[str]]:
    """Return the page, what it has complained of, and the addresses it has asked for."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
    complaints: list[str] = []
    asked: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#panels[data-shown]")
    return page, complaints, asked


def test_every_tab_draws_and_nothing_complains_or_asks_the_network(browser: Any, page_path: Path) -> None:
    page, complaints, asked = open_page(browser, page_path)
    num_figures = {}
    for tab in TABS:
        page.click(f"#tabs button[data-key={tab['key']}]")
        page.wait_for_selector(f"#panels[data-shown={tab['key']}]")
        num_figures[tab["key"]] = page.locator(".figure .main-svg").count() // 3
    assert num_figures == {"overview": 1, "memory": 2, "chunks": 1, "timeline": 1, "run": 3, "plan": 0}
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def places_to_hover(page: Any) -> list[tuple[float, float]]:
    """Return the middles of a figure's bars, the widest first, or where there are none the middle of the figure."""
    find = (
        "nodes => nodes.map(node => { const b = node.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })"
    )
    bars = page.locator(".figure .barlayer .point path").evaluate_all(find)
    boxes = sorted(bars, key=lambda box: -box[2])[:60] or page.locator(".figure .nsewdrag").evaluate_all(find)[:1]
    return [(x + width / 2, y + height / 2) for x, y, width, height in boxes]


@pytest.mark.parametrize("tab", ["chunks", "timeline"])
def test_hovering_tells_which_chunk_it_is(tab: str, browser: Any, page_path: Path) -> None:
    page, complaints, _ = open_page(browser, page_path)
    page.click(f"#tabs button[data-key={tab}]")
    page.wait_for_selector(f"#panels[data-shown={tab}] .figure .nsewdrag", state="attached")
    texts: set[str] = set()
    while not any(re.search(r"chunk \d+ \(", text) for text in texts):  # until the test's time is over
        for x, y in places_to_hover(page):
            page.mouse.move(x, y)
            page.wait_for_timeout(30)
            texts |= set(page.locator(".hoverlayer .hovertext").all_text_contents())
    assert complaints == []


def test_the_step_can_be_chosen(browser: Any, page_path: Path) -> None:
    page, _, _ = open_page(browser, page_path)
    assert page.locator("#step option").all_inner_texts() == ["1", "2"]
    assert "step 2;" in page.inner_text(".tiles")
    page.select_option("#step", label="1")
    assert "step 1;" in page.inner_text(".tiles")


def test_a_narrow_window_has_room_for_figures(browser: Any, page_path: Path) -> None:
    page, complaints, _ = open_page(browser, page_path)
    page.set_viewport_size({"width": 400, "height": 800})
    for tab in TABS:
        page.click(f"#tabs button[data-key={tab['key']}]")
        page.wait_for_selector(f"#panels[data-shown={tab['key']}]")
        widths = page.locator(".figure .nsewdrag").evaluate_all(
            "nodes => nodes.map(n => n.getBoundingClientRect().width)"
        )
        assert all(width > 180 for width in widths), (tab["key"], widths)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert complaints == []


def luminance(color: str) -> float:
    """Return a CSS colour's relative luminance. Source: WCAG 2.2, section 1.4.3."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(scheme: str, browser: Any, page_path: Path) -> None:
    page, _, _ = open_page(browser, page_path, color_scheme=scheme)

    def style(selector: str, name: str) -> str:
        return str(page.eval_on_selector(selector, f"node => getComputedStyle(node).{name}"))

    paper = luminance(style("body", "backgroundColor"))
    assert (paper > 0.5) is (scheme == "light")
    for selector, name in (("body", "color"), ("p.note", "color"), (".figure .xtick text", "fill")):
        ink = luminance(style(selector, name))
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, selector
    page.click("#theme")
    assert (luminance(style("body", "backgroundColor")) > 0.5) is not (scheme == "light")


def test_the_page_loads_nothing_from_elsewhere(page_path: Path) -> None:
    html = page_path.read_text(encoding="utf-8")
    assert html.count("<script") == 3 + html.count('"<script') + html.count("'<script") + html.count("`<script")
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?!data:)https?:[^>]*>", html) == []


def test_names_cannot_end_the_script_that_holds_them() -> None:
    recording = invented()
    html = html_page(recording)
    data = html.split('id="report">', 1)[1].split("</script>", 1)[0]
    assert "<b>" not in data
    assert json.loads(data) == json.loads(json.dumps(report_of(recording)))
    assert "chunk 0 (<b>0</b> and 0 more)" in json.dumps(report_of(recording))


def test_without_plotly_the_report_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    recording = invented()
    with pytest.raises(RecordingError, match=r"pip install 'gemini-memory\[report\]'"):
        html_page(recording)
