"""A browser on the page of a real server, and an eye on what the page must never do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from serving import Server
from talking import OpenPage

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")  # while it is open, an event loop runs in this thread, and no other test can have one
def browser() -> Iterator[Browser]:
    """The system's Chromium, without a window."""
    if CHROMIUM is None:
        pytest.skip("the page is not tested: there is no chromium (apt install chromium)")
    with sync_playwright() as playwright:
        # inside containers there is often no sandbox to be had, and the page is our own
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[OpenPage]:
    """Opens the page in a fresh browser profile: `open_page(server, **what new_context takes)`.

    After the test: no error was reported, no violation of the content security policy, and no request elsewhere.
    """
    complaints: list[str] = []
    contexts = []

    def opened(at: Server = server, **options: Any) -> Page:
        context = browser.new_context(**{"locale": "en-GB", "base_url": at.url, **options})
        contexts.append(context)
        context.set_default_timeout(10_000)
        context.on(
            "request", lambda request: request.url.startswith((at.url, "blob:")) or complaints.append(request.url)
        )
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: "Security Policy" in message.text and complaints.append(message.text))
        page.goto("/")
        page.get_by_role("textbox", name="Message").or_(page.get_by_role("textbox", name="消息")).wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    """The page of glm4-demo."""
    return open_page()
