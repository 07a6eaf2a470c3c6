"""The page of `elastic serve` in headless Chromium: samples, who answered, how experts do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from serve.keys import new_key
from tests.served import Http, http, make_repository

pytestmark = pytest.mark.browser

WIDE: ViewportSize = {"width": 1180, "height": 900}
NARROW: ViewportSize = {"width": 390, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for found in map(shutil.which, names) if found), None)
    assert path is not None, f"none of {', '.join(names)} is installed"
    with sync_playwright() as playwright:
        # No sandbox: CI runs as root, and the only page is ours.
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Http]:
    make_repository(tmp_path / "flow")
    with http(tmp_path / "flow") as running:
        yield running


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Open the page; it must have thrown nothing, and asked nobody else for anything."""
    wrong: list[str] = []

    def open_it(served: Http, size: ViewportSize = WIDE, *, dark: bool = False) -> Page:
        def check(url: str) -> None:
            if not url.startswith((served.url, "data:")):
                wrong.append(url)

        page = browser.new_page(viewport=size, color_scheme="dark" if dark else "light")
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: check(request.url))
        page.goto(served.url)
        return page

    yield open_it
    for context in browser.contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_generates_and_shows_who_answered(
    opened: Open, served: Http, size: ViewportSize, dark: bool
) -> None:
    page = opened(served, size, dark=dark)
    expect(page.locator("#ready")).to_have_text("ready")
    expect(page.locator("#steps-told")).to_have_text("5")
    page.locator("#n").fill("4")
    page.locator("#go").click()
    expect(page.locator("#gallery img")).to_have_count(4)
    expect(page.locator("#told")).to_have_text(
        re.compile(r"\d s, answered by expert-0, expert-1, expert-2$")
    )
    expect(page.locator("#trace canvas")).to_have_count(3)
    shares = page.locator("#trace .share").all_inner_texts()
    assert sum(int(one.split()[0]) for one in shares) == pytest.approx(100, abs=2)
    drawn = page.locator("#gallery img").evaluate_all("(all) => all.map((one) => one.naturalWidth)")
    assert drawn == [4] * 4
    page.locator("#gallery button").nth(2).click()
    expect(page.locator("#trace .axis")).to_contain_text("sample 3, seed 3")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_policies_are_switched_and_experts_unloaded(opened: Open, served: Http) -> None:
    page = opened(served)
    page.get_by_text("Top 1").click()
    page.locator("#go").click()
    expect(page.locator("#told")).to_contain_text("answered by expert-")
    assert "answered by" in page.locator("#told").inner_text()
    rows = page.locator("#experts tr")
    rows.nth(1).get_by_role("button").click()
    expect(rows.nth(1)).to_contain_text("unloaded")
    expect(page.locator("#ready")).to_have_text("1 of 3 experts lost")
    page.get_by_text("All", exact=True).click()
    page.locator("#go").click()
    expect(page.locator("#told")).to_contain_text("without expert-1")
    rows.nth(1).get_by_role("button").click()
    expect(page.locator("#ready")).to_have_text("ready")


def test_a_key_is_asked_for(opened: Open, tmp_path: Path) -> None:
    make_repository(tmp_path / "flow")
    key, digest = new_key()
    keys = [{"name": "me", "sha256": digest}]
    with http(tmp_path / "flow", keys=keys) as served:
        page = opened(served)
        page.locator("#key").fill(key)
        page.locator("#key").dispatch_event("change")
        expect(page.locator("#ready")).to_have_text("ready")
        page.locator("#go").click()
        expect(page.locator("#gallery img")).to_have_count(8)


def test_a_text_streams_in(opened: Open, tmp_path: Path) -> None:
    make_repository(tmp_path / "text", "language")
    with http(tmp_path / "text") as served:
        page = opened(served)
        expect(page.locator("#prompt")).to_be_visible()
        expect(page.locator("#gallery")).to_be_hidden()
        page.locator("#tokens").fill("64")
        page.locator("#go").click()
        expect(page.locator("#told")).to_have_text(re.compile(r"^\d+\.\d\d s$"))
        assert len(page.locator("#text").inner_text()) > 20


def test_the_api_page_lists_every_address(opened: Open, served: Http) -> None:
    page = opened(served)
    page.goto(served.url + "/docs")
    expect(page.locator("details").first).to_be_visible()
    expect(page.locator("summary code", has_text="/v1/images/generations")).to_have_count(1)
