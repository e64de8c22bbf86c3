"""The report as a reader meets it: opened in headless Chromium, at a desk and on a phone, by day and by night."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import comparison, with_runs

from bittern.evaluation import report, scenes

pytestmark = pytest.mark.browser
LONG = "a photo of a purple heart and a green ring, " * 5


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, as in containers, Chromium has no sandbox.
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = with_runs(comparison(scenes.held_out(12), models=3))
    found.reference.drawing.prompts[0] = LONG + "x" * 200
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report.render(found, "bittern compare " + "a-very-long-name/" * 20), encoding="utf-8")
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_whole(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    root = "document.documentElement"
    # Cards that are out of sight have not been laid out.
    page.add_style_tag(content=".card { content-visibility: visible !important }")
    assert page.evaluate(f"{root}.scrollWidth") <= page.evaluate(f"{root}.clientWidth") == width
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    # Every picture decodes; CSS alone would show nothing of one that does not.
    sizes = page.evaluate(
        """async () => Promise.all([...document.querySelectorAll(".card")].flatMap((card) =>
            [...card.style].filter((name) => name.startsWith("--p")).map(async (name) => {
                const image = new Image();
                image.src = card.style.getPropertyValue(name).slice(4, -1).replaceAll('"', "");
                await image.decode();
                return image.naturalWidth;
            })))"""
    )
    assert sizes == [128] * (12 * 4)
    # What a finger meets: sliders are as tall as their pictures, these are lines of text.
    heights = page.evaluate("[...document.querySelectorAll('summary')].map((it) => it.getBoundingClientRect().height)")
    assert heights and min(heights) >= 40
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    lightness = [sum(map(int, text[4:-1].split(","))) for text in (ink, paper)]
    assert (lightness[0] < lightness[1]) == (scheme == "light") and abs(lightness[0] - lightness[1]) > 400
    page.close()


def test_the_slider_and_the_order_work(browser: Any, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(page_file.as_uri())
    slider = page.locator(".stage input").first
    slider.evaluate("(range) => { range.value = 20; range.dispatchEvent(new Event('input')) }")
    clip = page.locator(".stage .over").first.evaluate("(over) => getComputedStyle(over).clipPath")
    assert clip == "inset(0px 0px 0px 20%)"
    assert page.locator(".card:visible").count() == 6
    page.click("#more")
    assert page.locator(".card:visible").count() == 12 and not page.locator("#more").is_visible()
    page.select_option("#order", "psnr")
    order = page.evaluate("[...document.querySelectorAll('.card')].map((card) => Number(card.dataset.psnr))")
    assert order == sorted(order) and len(set(order)) > 1
    page.close()
