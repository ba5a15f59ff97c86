"""What a reader does on the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Locator, Page, Route, expect

OpenPage = Callable[..., Page]
"""Opens the page at a server, in a browser with these options."""


def ask(page: Page, text: str) -> Locator:
    """The answer, at its end."""
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")
    return ended(page)


def ended(page: Page) -> Locator:
    """The last answer, once nothing more comes."""
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".running")).to_have_count(0)
    return page.locator(".answer").last


def greedy(page: Page, **settings: str) -> None:
    """Set temperature 0, so that the demo model says what it memorised; and what else is given."""
    page.locator("#open-settings").click()
    for name, value in {"temperature": "0", **settings}.items():
        page.locator(f"#settings [name={name}]").fill(value)
    page.keyboard.press("Escape")


def answer_with(page: Page, *deltas: dict[str, Any], reason: str = "stop") -> None:
    """From now on the server's answers are these deltas, whatever is asked."""
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": reason})
    body = "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def asked_for(page: Page, **more: Any) -> list[dict[str, Any]]:
    """The bodies of requests from now on; the server gets `more` beside them."""
    bodies: list[dict[str, Any]] = []

    def handle(route: Route) -> None:
        bodies.append(route.request.post_data_json)
        route.continue_(post_data=json.dumps({**bodies[-1], **more}))

    page.route("**/v1/chat/completions", handle)
    return bodies
