"""Take the screenshots of the page in docs/images: `python tools/screenshots.py`.

It starts `glm4 serve` on the demo models and looks at the page in Chromium, through Playwright. They come out as they
are with Debian's packages chromium, fonts-inter, fonts-jetbrains-mono and fonts-noto-cjk.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGES = REPOSITORY / "docs" / "images"
DESKTOP = {"viewport": {"width": 1180, "height": 760}, "device_scale_factor": 2}
PHONE = {"viewport": {"width": 390, "height": 760}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}


def main() -> None:
    """Write every image."""
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        with served("glm4-demo") as url:
            page = opened(browser, url, "en-GB", **DESKTOP)
            talk(page, "Tell me about Beijing")
            talk(page, "What is seven times eight?")
            talk(page, "Write a factorial function in Python")
            take(page, "page-light")

            page = opened(browser, url, "en-GB", color_scheme="dark", **DESKTOP)
            tools = json.loads((REPOSITORY / "demo" / "corpus" / "tools.json").read_text(encoding="utf-8"))
            settings(page, tools=json.dumps([tools["get_weather"]]))
            talk(page, "What is the weather in Beijing?")
            page.locator(".call textarea").fill('{"city": "Beijing", "weather": "rainy", "temperature": 14}')
            page.locator(".foot .solid").click()
            wait(page)
            take(page, "page-dark")

            page = opened(browser, url, "zh-CN", **DESKTOP)
            talk(page, "请介绍一下北京")
            talk(page, "彩虹有哪些颜色")
            talk(page, "用 Python 写一个快速排序")
            page.locator("#open-settings").click()
            page.locator("#settings .icon-button").blur()
            take(page, "page-chinese")
        with served("glm4-z1-demo") as url:
            page = opened(browser, url, "zh-CN", **PHONE)
            talk(page, "小明有三个苹果，又买了四个，一共有几个？")
            page.locator(".thoughts summary").tap()
            take(page, "page-phone")
        browser.close()


@contextmanager
def served(model: str) -> Iterator[str]:
    """Where a server answers with this demo model."""
    command = [sys.executable, "-m", "glm4", "serve", "-m", str(REPOSITORY / "demo" / model), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        yield next(line.split()[1] for line in process.stderr if line.startswith("ready: "))
        process.terminate()


def opened(browser: Browser, url: str, locale: str, **options: Any) -> Page:
    """The page in a browser that was never here, set to temperature 0."""
    page = browser.new_context(locale=locale, **options).new_page()
    page.goto(url)
    settings(page, temperature="0")
    return page


def settings(page: Page, **values: str) -> None:
    """Change settings of the open conversation."""
    page.locator("#open-settings").click()
    for name, value in values.items():
        page.locator(f"#settings [name={name}]").fill(value)
    page.keyboard.press("Escape")


def talk(page: Page, question: str) -> None:
    """A conversation of its own about `question`."""
    if page.locator("article").count():
        page.locator("#new").click()
    page.locator("#message").fill(question)
    page.locator("#message").press("Enter")
    wait(page)


def wait(page: Page) -> None:
    """Until the answer has ended."""
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".answer:not(.running) .foot").last).not_to_be_empty()


def take(page: Page, name: str) -> None:
    """Write one image."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(400)  # what moves comes to rest
    page.screenshot(path=IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
