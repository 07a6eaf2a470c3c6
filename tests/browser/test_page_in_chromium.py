"""The page of a run in a real browser: it draws, zooms, filters, and asks for nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from elastic.report.page import write_page
from tests.fake_run import FAULTS, FakeRun

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDE: ViewportSize = {"width": 1300, "height": 900}
NARROW: ViewportSize = {"width": 400, "height": 800}
IS_DRAWN = "() => document.querySelector('#range').dataset.from !== undefined"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium of this machine, without a screen."""
    path = next((path for name in NAMES if (path := shutil.which(name))), None)
    if path is None:
        pytest.fail(
            f"none of {', '.join(NAMES)} is installed: apt-get install chromium,"
            " or leave these tests out with -m 'not browser'"
        )
    with sync_playwright() as playwright:
        # No sandbox: CI runs as root, and the only page is ours.
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of 120 steps with faults and evaluations."""
    fake = FakeRun(tmp_path_factory.mktemp("run"), num_steps=120)
    fake.run(FAULTS)
    fake.finish()
    return write_page(fake.folder.path)


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, report: Path) -> Iterator[Open]:
    """Open the report; what it complained of or asked for must have been nothing at the end."""
    wrong: list[str] = []
    pages: list[Page] = []

    def opened(path: Path = report, *, size: ViewportSize = WIDE, dark: bool = False) -> Page:
        page = browser.new_page(viewport=size, color_scheme="dark" if dark else "light")
        pages.append(page)
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function(IS_DRAWN)
        assert wrong.pop(0) == path.as_uri()  # the only thing that is ever asked for
        return page

    yield opened
    for page in pages:
        page.close()
    assert wrong == []


def shown(page: Page) -> tuple[float, float]:
    """From when to when the page shows the run, in seconds, once what was asked for is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    data = page.locator("#range").evaluate("(range) => ({...range.dataset})")
    return float(data["from"]), float(data["to"])


def turn_wheel(page: Page, pixels: int) -> tuple[float, float]:
    """Turn the wheel where the mouse is, until another part of the run is shown; return it."""
    before = page.locator("#range").get_attribute("data-from")
    page.mouse.wheel(0, pixels)
    page.wait_for_function(
        "(before) => document.querySelector('#range').dataset.from !== before", arg=before
    )
    return shown(page)


def point_at(page: Page, selector: str, *, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
    """Move the mouse to a place in an element, given as shares of its size."""
    page.locator(selector).scroll_into_view_if_needed()
    box = page.locator(selector).bounding_box()
    assert box is not None
    place = box["x"] + x * box["width"], box["y"] + y * box["height"]
    page.mouse.move(*place)
    return place


def inked(page: Page, selector: str) -> float:
    """The share of the pixels of a canvas that something was drawn on."""
    return float(
        page.locator(selector).evaluate(
            """(canvas) => {
              const { width, height } = canvas;
              const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
              let drawn = 0;
              for (let i = 3; i < data.length; i += 4) drawn += data[i] > 0;
              return drawn / (data.length / 4);
            }"""
        )
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_every_panel_is_drawn(open_page: Open, size: ViewportSize, dark: bool) -> None:
    page = open_page(size=size, dark=dark)
    titles = page.locator(".chart h2").all_inner_texts()
    assert titles[:3] == ["Loss", "Step time ms", "accuracy"]
    for index in range(len(titles)):
        assert inked(page, f".chart >> nth={index} >> canvas") > 0.01
    assert inked(page, "#timeline") > 0.3
    assert inked(page, "#overview") > 0.3
    assert inked(page, "#heat") > 0.3
    assert page.locator("#exact").inner_text() == "exact"
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= size["width"]  # nothing sticks out


def test_the_wheel_zooms_to_the_pointer_and_a_double_click_shows_all(open_page: Open) -> None:
    page = open_page()
    whole = shown(page)
    point_at(page, "#timeline", x=0.25)
    closer = turn_wheel(page, -400)
    assert whole[0] < closer[0] < closer[1] < whole[1]
    assert closer[0] - whole[0] < whole[1] - closer[1]  # towards where the pointer is
    page.mouse.dblclick(*point_at(page, "#timeline"))
    assert shown(page) == pytest.approx(whole)


def test_dragging_moves_and_shift_dragging_zooms_to_what_was_marked(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("+")
    page.keyboard.press("+")
    before = shown(page)
    x, y = point_at(page, "#timeline", x=0.6)
    page.mouse.down()
    page.mouse.move(x - 200, y, steps=4)
    page.mouse.up()
    moved = shown(page)
    assert moved[0] > before[0]
    assert moved[1] - moved[0] == pytest.approx(before[1] - before[0])
    page.keyboard.down("Shift")
    page.mouse.down()
    page.mouse.move(x, y, steps=4)
    page.mouse.up()
    page.keyboard.up("Shift")
    marked = shown(page)
    assert moved[0] < marked[0] < marked[1] < moved[1]


def test_keys_move_zoom_and_go_from_fault_to_fault(open_page: Open) -> None:
    page = open_page()
    whole = shown(page)
    spans = []
    for _ in FAULTS:
        page.keyboard.press("n")
        spans.append(shown(page))
    assert spans == sorted(spans)
    assert len(set(spans)) == len(FAULTS)
    page.keyboard.press("p")
    assert shown(page) == pytest.approx(spans[-2])
    page.keyboard.press("ArrowLeft")
    assert shown(page)[0] < spans[-2][0]
    page.keyboard.press("0")
    assert shown(page) == pytest.approx(whole)


def test_a_curve_needs_ctrl_so_that_the_page_can_be_scrolled(open_page: Open) -> None:
    page = open_page()
    whole = shown(page)
    point_at(page, ".chart >> nth=0 >> canvas")
    page.mouse.wheel(0, 100)
    page.wait_for_function("() => window.scrollY > 0")
    assert shown(page) == whole
    point_at(page, ".chart >> nth=0 >> canvas")  # it moved with the page
    page.keyboard.down("Control")
    assert turn_wheel(page, -400)[0] > whole[0]
    page.keyboard.up("Control")


def test_the_axis_may_be_steps(open_page: Open) -> None:
    page = open_page()
    by_time = shown(page)
    page.locator("#by-step").click()
    assert shown(page) == by_time
    point_at(page, "#timeline", x=0.5)
    begin, end = turn_wheel(page, -400)
    assert by_time[0] < begin < end < by_time[1]
    told = page.locator("#range").inner_text()
    first, last = map(int, re.findall(r"steps (\d+) to (\d+)", told)[0])
    assert first + last == pytest.approx(119, abs=4)  # about the middle step, not the middle second
    page.keyboard.press("0")
    shown(page)
    assert "steps 0 to 119" in page.locator("#range").inner_text()


def test_hovering_tells_what_a_worker_did(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("n")
    shown(page)
    tip = page.locator("#tip")
    told = []
    for x in (0.3, 0.4, 0.5, 0.6, 0.7):
        point_at(page, "#timeline", x=x, y=0.22)  # the first row
        told.append(tip.inner_text())
    assert any(re.match(r"worker-0: micro-batch \d+ of step \d+", text) for text in told), told
    point_at(page, ".chart >> nth=0 >> canvas")
    assert "each step: " in tip.inner_text()
    assert "evaluation: " in tip.inner_text()


def test_the_heatmap_tells_who_is_slow_and_the_account_where_the_time_went(
    open_page: Open,
) -> None:
    page = open_page()
    tip = page.locator("#tip")
    point_at(page, "#heat", x=0.9, y=0.32)  # worker 2, which is slow since step 60
    assert re.match(
        r"worker-2 computed (\d{2,3}) % (or more )?longer than its peers", tip.inner_text()
    )
    assert re.match(r"goodput \d+\.\d % of 17", page.locator("#goodput").inner_text())
    assert "productive" in page.locator("#account-parts").inner_text()
    assert page.locator("#account-bar span").count() > 3
    causes = page.locator("#causes tr")
    slow = causes.filter(has_text="slow computation worker 2")
    whole = shown(page)
    slow.first.locator("button").click()
    begin, end = shown(page)
    assert whole[0] < begin < end < whole[1]


def test_events_are_filtered_and_lead_to_their_place(open_page: Open) -> None:
    page = open_page()
    rows = page.locator("#events tr")
    everything = rows.count()
    page.locator("#search").fill("kill worker-3")
    assert rows.count() == 1
    assert rows.first.get_attribute("class") == "fault"
    whole = shown(page)
    rows.first.locator("button").click()
    begin, end = shown(page)
    assert whole[0] < begin < end < whole[1]
    page.locator("#search").fill("")
    page.locator("#kinds button", has_text="worker joins").click()
    assert rows.count() == everything - 8  # 7 that joined, one asked for
    page.locator("#kinds button", has_text="evaluation").click()
    assert rows.count() == everything - 8 + 3


def test_settings_and_result_are_shown(open_page: Open) -> None:
    page = open_page()
    assert "batch.micro_batches" in page.locator("#settings").inner_text()
    assert "5e8f5e8f" in page.locator("#result").inner_text()
    assert "params_sha256" in page.locator("#hashes").inner_text()


@pytest.mark.parametrize("num_steps", [1, 7000])
def test_runs_of_every_size_are_drawn(open_page: Open, tmp_path: Path, num_steps: int) -> None:
    fake = FakeRun(tmp_path, num_steps=num_steps, is_watched=True)
    fake.run({} if num_steps == 1 else {5: "kill", 6000: "aggregator"})
    page = open_page(write_page(tmp_path))
    assert inked(page, "#timeline") > 0.1
    assert page.locator("#state").inner_text() == "interrupted"
    assert page.locator("#notes").is_visible() == (num_steps > 1)
    page.keyboard.press("n")
    page.keyboard.press("+")
    begin, end = shown(page)
    assert begin < end
