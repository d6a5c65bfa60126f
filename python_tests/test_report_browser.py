"""The page of ``mars report`` in a real browser: it opens, filters, zooms and prints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from mars_runtime import PRESETS
from python_tests import browsers
from tvm_mars.compiler import NamedGraph, build
from tvm_mars.report import profile_program
from tvm_mars.report.page import report_page
from tvm_mars.zoo import load_digits

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install 'tvm-mars[browser]'"
)
pytest.importorskip("jinja2")
pytest.importorskip("vl_convert")

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LAYERS = 8
PATIENCE = 300_000  # ms: a busy machine is no failure


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = browsers.find()
    if found is None:
        pytest.skip(browsers.NONE)
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox"], timeout=PATIENCE
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def program() -> Any:
    return build([NamedGraph.of(load_digits())], PRESETS["mars"])


@pytest.fixture(scope="module")
def address(program: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "digits.html"
    path.write_text(report_page(program, "digits"), encoding="utf-8")
    return path.as_uri()


def opened(browser: Any, address: str, **options: Any) -> Any:
    """Open the page; whatever it says on the console, or asks for, is noted on it."""
    page = browser.new_context(viewport=DESKTOP, **options).new_page()
    page.set_default_timeout(PATIENCE)
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    if options.get("java_script_enabled", True):
        page.wait_for_selector("html[data-ready]", timeout=PATIENCE)
    return page


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    shown = opened(browser, address)
    yield shown
    assert not shown.said and shown.asked == [address]
    shown.context.close()


def eventually(page: Any, chart: str, signal: str, value: Any) -> None:
    """Wait until a chart's signal has a value; the page's policy forbids to wait within it."""
    for _ in range(50):
        if page.evaluate(f"marsReport.views.{chart}.signal('{signal}')") == value:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{signal} of {chart} does not become {value!r}")


def window(page: Any) -> tuple[float, float]:
    lo, hi = page.evaluate("[marsReport.state.lo, marsReport.state.hi]")
    for view in ("timeline", "bank0", "bank1"):  # all show the same time
        signals = page.evaluate(f"['lo', 'hi'].map((n) => marsReport.views.{view}.signal(n))")
        assert signals == [lo, hi]
    return lo, hi


def painted(page: Any, chart: str) -> int:
    """Count the pixels of a chart's canvas that something is painted on."""
    return int(
        page.evaluate(
            """(chart) => {
                const canvas = document.querySelector(`#chart-${chart} canvas`);
                const copy = new OffscreenCanvas(canvas.width, canvas.height);
                const context = copy.getContext("2d", { willReadFrequently: true });
                context.drawImage(canvas, 0, 0);
                const pixels = context.getImageData(0, 0, copy.width, copy.height).data;
                return pixels.filter((value, place) => place % 4 === 3 && value > 0).length;
            }""",
            chart,
        )
    )


def bars(page: Any, chart: str) -> int:
    return int(page.locator(f"#chart-{chart} svg .mark-rect.role-mark path").count())


def test_it_opens_and_draws_everything(page: Any) -> None:
    for chart in ("timeline", "bank0", "bank1", "fillings"):
        assert painted(page, chart) > 1000, chart
    assert bars(page, "comparison") == 2 * LAYERS
    assert bars(page, "energy") == 5 * LAYERS
    labels = page.locator("#chart-time svg .role-axis-label text").all_text_contents()
    assert "conv4+maxpool5" in labels


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits_the_window(browser: Any, address: str, size: dict[str, int], scheme: str) -> None:
    page = opened(browser, address, color_scheme=scheme)
    page.set_viewport_size(size)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    for chart in page.locator(".chart").all():
        inside = chart.locator("svg, canvas").first.bounding_box()
        assert inside["x"] >= 0 and inside["x"] + inside["width"] <= size["width"] + 1
    assert not page.said
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_stand_out(browser: Any, address: str, scheme: str) -> None:
    page = opened(browser, address, color_scheme=scheme)
    colours = page.evaluate(
        """() => {
            const style = getComputedStyle(document.documentElement);
            const names = ["page", "card", "ink", "quiet", "link", "assumed"];
            return Object.fromEntries(
                names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
        }"""
    )
    assert (luminance(colours["page"]) > 0.5) == (scheme == "light")
    for letters in ("ink", "quiet", "link", "assumed"):
        assert contrast(colours[letters], colours["page"]) >= 4.5, letters
    assert contrast(colours["quiet"], colours["card"]) >= 4.5
    assert page.evaluate("marsReport.views.time.signal('ink')") == colours["ink"]
    page.context.close()


def luminance(colour: str) -> float:
    """Give the relative luminance of #rrggbb, as WCAG 2 defines it."""
    parts = [int(part, 16) / 255 for part in re.findall("[0-9a-f]{2}", colour)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_change_of_scheme_is_followed(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    eventually(page, "timeline", "ink", "#e6edf3")
    page.emulate_media(color_scheme="light")
    eventually(page, "timeline", "ink", "#1f2328")


def test_the_filter_filters_tables_pictures_and_charts(page: Any) -> None:
    before = painted(page, "timeline")
    page.get_by_label("Show layers").fill("CONV4")
    page.wait_for_timeout(300)
    assert page.locator("#filter-status").text_content() == f"1 of {LAYERS}"
    for table in ("#time-table", "#work-table"):
        rows = page.locator(f"{table} tbody tr:visible th").all_text_contents()
        assert rows == ["conv4+maxpool5"]
    assert page.locator("#group-sets figure:visible").count() == 1
    assert bars(page, "energy") == 5
    assert painted(page, "timeline") < before / 2
    page.get_by_label("Show layers").fill("")
    page.wait_for_timeout(300)
    assert page.locator("#filter-status").text_content() == f"all {LAYERS}"
    assert bars(page, "energy") == 5 * LAYERS and painted(page, "timeline") == before


def test_buttons_and_layers_zoom(page: Any, program: Any) -> None:
    profile = profile_program(program, baseline=False)
    whole = (0, profile.cycles)
    assert window(page) == whole
    page.get_by_label("zoom in").click()
    assert window(page) == (profile.cycles / 4, profile.cycles * 3 / 4)
    page.get_by_label("earlier").click()
    lo, hi = window(page)
    assert (lo, hi) == (profile.cycles / 8, profile.cycles * 5 / 8)
    page.get_by_label("later").click()
    page.get_by_label("zoom out").click()
    assert window(page) == whole
    page.locator("#zoom-layer").select_option(label="conv3")
    start = sum(layer.cycles for layer in profile.layers[:3])
    assert window(page) == (start, start + profile.layers[3].cycles)
    status = page.locator("#zoom-status").text_content()
    assert (
        status == f"cycles {start:,} to {start + profile.layers[3].cycles:,} of {profile.cycles:,}"
    )
    page.get_by_role("button", name="all", exact=True).click()
    assert window(page) == whole


def test_keys_wheel_and_drag_zoom(page: Any, program: Any) -> None:
    whole = window(page)
    lane = page.get_by_role("group", name="Timeline: arrows move")
    lane.focus()
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    lo, hi = window(page)
    assert hi - lo == whole[1] / 2 and lo == whole[1] * 3 / 8
    page.keyboard.press("0")
    assert window(page) == whole
    box = lane.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.wheel(0, -100)  # the wheel alone moves the page
    page.wait_for_timeout(200)
    assert window(page) == whole
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_timeout(200)
    lo, hi = window(page)
    assert 0 < lo < hi < whole[1]
    box = lane.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    moved = window(page)
    assert moved[0] < lo and moved[1] - moved[0] == pytest.approx(hi - lo)


def test_two_fingers_zoom_and_one_moves(browser: Any, address: str) -> None:
    page = opened(browser, address, has_touch=True)
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(300)
    whole = window(page)
    lane = page.get_by_role("group", name="Timeline: arrows move")
    lane.scroll_into_view_if_needed()
    box = lane.bounding_box()
    middle, height = box["x"] + box["width"] * 0.6, box["y"] + 40
    session = page.context.new_cdp_session(page)

    def touch(kind: str, *xs: float) -> None:
        points = [{"x": x, "y": height, "id": number} for number, x in enumerate(xs)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", middle - 20, middle + 20)
    for step in range(1, 5):
        touch("touchMove", middle - 20 - 8 * step, middle + 20 + 8 * step)
    touch("touchEnd")
    page.wait_for_timeout(200)
    lo, hi = window(page)
    assert 0 < lo < hi < whole[1] and (hi - lo) < 0.6 * whole[1]
    touch("touchStart", middle)
    for step in range(1, 5):
        touch("touchMove", middle - 8 * step)
    touch("touchEnd")
    page.wait_for_timeout(200)
    moved = window(page)
    assert moved[0] > lo and moved[1] - moved[0] == pytest.approx(hi - lo)
    assert not page.said
    page.context.close()


def test_a_comparison_can_be_chosen(page: Any) -> None:
    for metric in page.get_by_label("compare").locator("option").all():
        page.get_by_label("compare").select_option(value=metric.get_attribute("value"))
        page.wait_for_timeout(100)
        assert bars(page, "comparison") == 2 * LAYERS
    page.get_by_label("compare").select_option(value="macro accesses")
    eventually(page, "comparison", "metric", "macro accesses")


def test_a_part_alone_and_shares(page: Any) -> None:
    button = page.get_by_role("button", name="weights")
    before = bars(page, "time")
    button.click()
    page.wait_for_timeout(200)
    assert button.get_attribute("aria-pressed") == "true"
    assert bars(page, "time") == LAYERS < before
    button.click()
    page.wait_for_timeout(200)
    assert button.get_attribute("aria-pressed") == "false" and bars(page, "time") == before
    page.locator("[data-shares=time]").check()
    eventually(page, "time", "shares", True)
    labels = page.locator("#chart-time svg .role-axis-label text").all_text_contents()
    assert "100%" in labels


def test_it_starts_with_a_way_past_the_navigation(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")
    page.go_back()


def test_it_prints_dark_letters_on_white(browser: Any, address: str) -> None:
    page = opened(browser, address, color_scheme="dark")
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 703, "height": 1000})  # A4 less its margins
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 703
    style = "getComputedStyle(document.body)"
    assert page.evaluate(f"[{style}.color, {style}.backgroundColor]") == [
        "rgb(0, 0, 0)",
        "rgb(255, 255, 255)",
    ]
    for hidden in ("nav", ".tools", ".zoom"):
        assert not page.locator(hidden).is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("marsReport.views.timeline.signal('ink')") == "#1f2328"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("marsReport.views.timeline.signal('ink')") == "#e6edf3"
    assert not page.said
    page.context.close()


def test_without_scripts_it_still_has_its_figures(browser: Any, address: str) -> None:
    page = opened(browser, address, java_script_enabled=False)
    assert page.locator("#time-table tbody tr").count() == LAYERS
    assert "need JavaScript" in page.locator("noscript").inner_text()
    assert page.locator("#group-sets svg").first.is_visible()
    page.context.close()
