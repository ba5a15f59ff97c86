"""The page to chat on, as its readers use it: a real browser, a real server, the demo model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from serving import REPOSITORY, Server, start_server
from talking import OpenPage, answer_with, ask, asked_for, ended, greedy

BEIJING = "Beijing is the capital of China and its political and cultural centre."
WEATHER = json.loads((REPOSITORY / "demo" / "corpus" / "tools.json").read_text("utf-8"))["get_weather"]
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
TEXTS, PAPERS = ("ink", "quiet"), ("paper", "side", "raised", "soft", "code")
ENDLESS = {"ignore_eos": True, "max_tokens": 1900}


def test_an_answer_is_streamed_and_rendered(page: Page) -> None:
    greedy(page)
    bodies = asked_for(page)
    answer = ask(page, "用 Python 判断一个数是不是质数")
    assert bodies == [
        {
            "model": "glm4-demo",
            "messages": [{"role": "user", "content": "用 Python 判断一个数是不是质数"}],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    expect(answer.locator("p").first).to_have_text("好的：")
    expect(answer.locator("figcaption span")).to_have_text("python")
    expect(answer.locator("pre code")).to_contain_text("return all(n % i for i in range(2, int(n**0.5) + 1))")
    expect(answer.locator(".note")).to_have_text(re.compile(r"^\d+ tokens in \d+\.\d s$"))
    expect(page.locator("#status")).to_contain_text("Answer: 好的")


def test_words_show_before_the_answer_ends_and_what_stands_is_left_alone(page: Page) -> None:
    asked_for(page, **ENDLESS)
    page.locator("#message").fill("Tell me about Beijing")
    page.locator("#message").press("Enter")
    first = page.locator(".answer .prose > *").first
    first.wait_for()
    expect(page.locator("#stop")).to_be_visible()
    question = page.locator(".question").element_handle()
    expect(page.locator(".answer")).to_have_text(re.compile(".{400}", re.DOTALL))
    assert question.is_visible(), "it is still the same element"
    page.locator("#stop").click()
    ended(page)


def test_escape_stops_and_the_server_knows(page: Page, server: Server) -> None:
    asked_for(page, **ENDLESS)
    page.locator("#message").fill("Tell me about Beijing")
    page.locator("#message").press("Enter")
    page.locator(".answer .prose > *").first.wait_for()
    page.keyboard.press("Escape")
    answer = ended(page)
    expect(answer.locator(".note")).to_contain_text("Stopped")
    expect(page.locator("#message")).to_be_focused()
    while server.metric("glm4_running"):  # the browser says so in its own time
        page.wait_for_timeout(20)


def test_regenerate_and_edit(page: Page) -> None:
    greedy(page)
    ask(page, "Tell me about Beijing")
    bodies = asked_for(page)
    answer = ended(page)
    answer.get_by_role("button", name="Answer again").press("Enter")
    expect(page.locator("#message")).to_be_focused()
    expect(ended(page)).to_contain_text(BEIJING)
    ask(page, "What is my name?")

    question = page.locator(".question").first
    question.hover()
    question.get_by_role("button", name="Edit").click()
    box = question.get_by_role("textbox")
    expect(box).to_have_value("Tell me about Beijing")
    box.fill("Tell me about Paris")
    box.press("Enter")
    expect(ended(page)).to_contain_text("Paris")
    expect(page.locator("article")).to_have_count(2)
    assert [message["content"] for message in bodies[-1]["messages"]] == ["Tell me about Paris"]

    answer = ended(page)
    answer.get_by_role("button", name="Edit").click()
    answer.get_by_role("textbox").fill("**Paris** it is.")
    answer.get_by_role("button", name="Save").click()
    expect(page.locator(".answer strong")).to_have_text("Paris")
    ask(page, "Thanks")
    assert bodies[-1]["messages"][1] == {"role": "assistant", "content": "**Paris** it is."}


def test_conversations_survive_a_reload(page: Page) -> None:
    greedy(page)
    ask(page, "Tell me about Beijing")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "Tell me about Paris")
    page.reload()
    expect(page.locator(".answer")).to_contain_text("Paris")
    expect(page.locator("#conversations li")).to_have_text(["Tell me about Paris", "Tell me about Beijing"])
    page.locator("#conversations").get_by_text("Tell me about Beijing").click()
    expect(page.locator(".answer")).to_contain_text(BEIJING)
    page.locator("#open-settings").click()
    expect(page.locator("[name=temperature]")).to_have_value("0")


def test_a_reload_amid_an_answer_keeps_what_came(page: Page) -> None:
    asked_for(page, **ENDLESS)
    page.locator("#message").fill("Tell me about Beijing")
    page.locator("#message").press("Enter")
    page.locator(".answer .prose > *").first.wait_for()
    page.reload()
    answer = ended(page)
    expect(answer.locator(".prose > *").first).to_be_visible()
    expect(answer.locator(".note")).to_contain_text("The page was closed before the answer ended")


def test_an_answer_goes_on_while_another_conversation_is_open(page: Page) -> None:
    asked_for(page, **ENDLESS)
    page.locator("#message").fill("Tell me about Beijing")
    page.locator("#message").press("Enter")
    page.locator(".answer .prose > *").first.wait_for()
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#send")).to_be_visible()
    page.locator("#conversations .running").click()
    expect(page.locator("#stop")).to_be_visible()
    page.locator("#stop").click()
    expect(ended(page).locator(".note")).to_contain_text("Stopped")


def test_rename_delete_export_and_import(page: Page, tmp_path: Path) -> None:
    greedy(page, system="Be brief.")
    ask(page, "Tell me about Beijing")
    page.locator("#open-menu").click()
    page.locator("#rename").click()
    page.locator("#ask-input").fill("The capital")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("The capital")

    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    [conversation] = json.loads(file.read_text("utf-8"))["conversations"]
    assert conversation["title"] == "The capital"
    assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"]

    page.locator("#open-menu").click()
    page.locator("#remove").click()
    page.locator("#ask").get_by_role("button", name="OK").click()
    expect(page.locator("#conversations li")).to_have_count(0)
    page.reload()
    expect(page.locator("#conversations li")).to_have_count(0)

    page.locator("#file").set_input_files(file)
    expect(page.locator("#title")).to_have_text("The capital")
    expect(page.locator(".answer")).to_contain_text("Beijing")
    page.locator("#open-settings").click()
    expect(page.locator("[name=system]")).to_have_value("Be brief.")


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"format": "glm4-chat", "conversations": [{"id": 1}]}'])
def test_a_file_that_holds_no_conversations(page: Page, content: str) -> None:
    page.locator("#file").set_input_files({"name": "x.json", "mimeType": "text/json", "buffer": content.encode()})
    expect(page.locator("#notice")).to_have_text("x.json holds no conversations exported from here")


def test_thoughts_are_folded(open_page: OpenPage, z1_server: Server) -> None:
    page = open_page(z1_server)
    greedy(page)
    bodies = asked_for(page)
    answer = ask(page, "七乘六等于几")
    expect(answer.locator(".prose").last).to_have_text("七乘六等于四十二。")
    expect(answer.locator(".thoughts .prose")).not_to_be_visible()
    answer.get_by_text("Thoughts").click()
    expect(answer.locator(".thoughts .prose")).to_have_text("七个六相加，是四十二。")

    page.locator("#open-settings").click()
    page.get_by_role("checkbox", name="Think before answering").uncheck()
    page.keyboard.press("Escape")
    answer.get_by_role("button", name="Answer again").click()
    expect(ended(page).locator(".thoughts")).not_to_be_visible()
    assert bodies[-1]["thinking"] == {"type": "disabled"}
    assert "reasoning_content" not in json.dumps(bodies)


def test_tools_are_called_and_their_results_typed_in(page: Page) -> None:
    greedy(page, tools=json.dumps([WEATHER]))
    bodies = asked_for(page)
    answer = ask(page, "查一下北京的天气")
    call = answer.locator(".call")
    expect(call.locator("h3")).to_contain_text("get_weather")
    assert json.loads(call.locator("pre").inner_text()) == {"city": "北京"}
    call.get_by_role("textbox", name="Result").fill('{"city": "北京", "weather": "多云", "temperature": 7}')
    answer.get_by_role("button", name="Send results").click()
    expect(page.locator(".answer")).to_have_count(2)
    expect(ended(page)).to_contain_text("北京今天多云，气温7度。")
    expect(page.get_by_role("button", name="Send results")).to_have_count(0)
    spoken, result = bodies[-1]["messages"][1:]
    assert result == {
        "role": "tool",
        "tool_call_id": spoken["tool_calls"][0]["id"],
        "content": '{"city": "北京", "weather": "多云", "temperature": 7}',
    }

    page.reload()
    page.get_by_role("button", name="Change result").click()
    box = page.get_by_role("textbox", name="Result")
    box.fill(box.input_value().replace("多云", "晴"))
    page.get_by_role("button", name="Send results").click()
    expect(page.locator(".answer")).to_have_count(2)
    expect(ended(page)).to_contain_text("北京今天晴，气温7度。")


def test_tools_that_are_no_list_are_said_before_anything_is_sent(page: Page) -> None:
    greedy(page, tools='{"a": 1}')
    expect(page.locator("#tools-error")).to_have_text("The tools are not a JSON list: [ … ]")
    bodies = asked_for(page)
    answer = ask(page, "Tell me about Beijing")
    expect(answer.locator(".wrong")).to_have_text("The tools are not a JSON list: [ … ]")
    assert bodies == []
    greedy(page, tools="")
    answer.get_by_role("button", name="Try again").click()
    expect(ended(page)).to_contain_text(BEIJING)


def test_settings_reach_the_server(page: Page) -> None:
    greedy(page, system="Be brief.", top_p="0.5", top_k="3", max_tokens="2", seed="7")
    bodies = asked_for(page)
    answer = ask(page, "Tell me about Beijing")
    expect(answer.locator(".note")).to_contain_text("Cut off at the token limit · 2 tokens")
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert bodies[0].items() >= {"temperature": 0, "top_p": 0.5, "top_k": 3, "max_tokens": 2, "seed": 7}.items()


def test_the_servers_own_words_about_an_error_and_another_try(page: Page) -> None:
    greedy(page, top_p="7")
    answer = ask(page, "Tell me about Beijing")
    expect(answer.locator(".wrong")).to_have_text("top_p: 7 is out of range (above 0, at most 1)")
    greedy(page, top_p="")
    answer.get_by_role("button", name="Try again").click()
    expect(ended(page)).to_contain_text("Beijing")


def test_a_server_that_is_gone(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    expect(ask(page, "hello").locator(".wrong")).to_contain_text("The server cannot be reached")
    for body in ('data: {"choices": []}\n\n', "data: <html>\n\n", ""):
        page.unroute_all()
        page.route("**/v1/chat/completions", lambda route, _, body=body: route.fulfill(body=body))
        page.get_by_role("button", name="Try again").click()
        expect(ended(page).locator(".wrong")).to_have_text("The connection broke off before the answer ended")


def test_an_api_key_is_asked_for(open_page: OpenPage) -> None:
    server = start_server(GLM4_API_KEY="secret")
    try:
        page = open_page(server)
        lock = page.locator("#lock")
        expect(lock).to_contain_text("the API key is missing or wrong")
        lock.get_by_label("API key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        expect(lock.get_by_label("API key", exact=True)).to_have_value("wrong")
        lock.get_by_label("API key", exact=True).fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("glm4-demo")
        greedy(page)
        expect(ask(page, "Tell me about Beijing")).to_contain_text(BEIJING)
        page.reload()
        expect(page.locator("#model")).to_have_text("glm4-demo")
        with page.expect_download() as download:
            page.get_by_role("button", name="Export all").click()
        assert "secret" not in Path(download.value.path()).read_text("utf-8")
    finally:
        server.stop()


def test_light_and_dark(open_page: OpenPage) -> None:
    page = open_page(color_scheme="dark")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(paper)
    page.locator("#theme").click()
    light = page.evaluate(paper)
    assert (dark, light) == ("rgb(25, 25, 24)", "rgb(252, 251, 249)")
    page.reload()
    assert page.evaluate(paper) == light
    page.locator("#theme").click()
    assert page.evaluate(paper) == dark


def test_languages(open_page: OpenPage) -> None:
    page = open_page(locale="zh-CN")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.locator("#new")).to_have_text("新对话")
    answer_with(page, {"content": "```js\n1\n```"})
    answer = ask(page, "你好")
    expect(answer.get_by_role("button", name="重新回答")).to_be_visible()
    page.get_by_role("button", name="English").click()
    expect(page.locator("#new")).to_have_text("New conversation")
    expect(ended(page).get_by_role("button", name="Answer again")).to_be_visible()
    expect(page.locator("figcaption button")).to_have_text("Copy")
    page.reload()
    expect(page.locator("html")).to_have_attribute("lang", "en")


def test_every_language_says_everything(page: Page) -> None:
    keys = page.evaluate(
        "import('/page/words.js').then(m => Object.values(m.LANGUAGES).map(w => Object.keys(w).sort()))"
    )
    assert keys[0] == keys[1]
    folder = REPOSITORY / "src" / "glm4" / "server" / "page"
    source = "".join(file.read_text("utf-8") for file in folder.iterdir() if file.name != "words.js")
    assert [key for key in keys[0] if not re.search(rf'"{key}"|: "{key}"', source)] == []
    assert set(re.findall(r'(?:say\(|data-(?:say|label|hint)=)"(\w+)"', source)) <= set(keys[0])


def test_keyboard_alone(page: Page) -> None:
    answer_with(page, {"content": "Hello."})
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    ended(page)
    expect(page.locator(".bubble")).to_have_text("one\ntwo", use_inner_text=True)
    expect(page.locator("#message")).to_be_focused()

    names = []
    page.keyboard.press("Tab")  # from the message box, which is last but for the empty send button
    page.keyboard.press("Tab")
    for _ in range(30):
        page.keyboard.press("Tab")
        here = page.evaluate(
            """() => { const here = document.activeElement, name = here.id || here.ariaLabel || here.textContent;
                 return [name, getComputedStyle(here).outlineStyle, here.checkVisibility()] }"""
        )
        if here[0] == "message":
            break
        assert here[1:] == ["solid", True], here
        names.append(here[0])
    in_order = ["close-side", "new", "one", "import", "export-all", "language", "theme", "open-menu", "open-settings"]
    assert [name for name in names if name in in_order] == in_order
    assert names.index("Answer again") > names.index("open-settings")

    page.locator("#open-settings").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).not_to_be_visible()
    expect(page.locator("#open-settings")).to_be_focused()


def test_enter_that_picks_a_word_does_not_send(page: Page) -> None:
    page.locator("#message").fill("ni hao")
    pressed = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true})"
    assert page.locator("#message").evaluate(f"node => node.dispatchEvent({pressed})"), "nobody took it"
    expect(page.locator("article")).to_have_count(0)


def test_a_phone(open_page: OpenPage) -> None:
    page = open_page(**PHONE)
    wide = "| a | b | c | d | e |\n|---|---|---|---|---|\n| " + " | ".join(["longlonglong"] * 5) + " |"
    answer_with(page, {"content": f"`{'x' * 300}` {'y' * 300}\n\n{wide}\n\n```\n{'z' * 300}\n```"})
    ask(page, "w" * 300)
    for element in ("html", "#scroll"):
        widths = page.locator(element).evaluate("node => [node.scrollWidth, node.clientWidth]")
        assert widths[0] <= widths[1], element
    expect(page.locator("#side")).not_to_be_visible()
    page.locator("#open-side").tap()
    expect(page.locator("#side")).to_be_in_viewport()
    page.locator("#new").tap()
    expect(page.locator("#side")).not_to_be_visible()
    page.locator("#open-settings").tap()
    box = page.locator("#settings").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["width"] <= 360


def test_copy(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer_with(page, {"content": "Here:\n```py\nx = 1\n```"})
    answer = ask(page, "code")
    answer.locator("figcaption button").click()
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1"
    answer.get_by_role("button", name="Copy").last.click()
    assert page.evaluate("navigator.clipboard.readText()") == "Here:\n```py\nx = 1\n```"


def test_contrast(open_page: OpenPage) -> None:
    """WCAG 2.2, 1.4.3 and 1.4.11: at least 4.5 to 1 for text and 3 to 1 for the edges of fields, by its own formula."""
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        colours = page.evaluate(
            """names => { const probe = document.createElement('p'); document.body.append(probe);
                 return Object.fromEntries(names.map(name => { probe.style.color = `var(--${name})`;
                   return [name, getComputedStyle(probe).color.match(/\\d+/g).map(Number)] })) }""",
            [*TEXTS, *PAPERS, "accent", "on-accent", "wrong", "wrong-soft", "field"],
        )
        pairs = [(text, paper) for text in TEXTS for paper in PAPERS]
        pairs += [("accent", "paper"), ("wrong", "wrong-soft"), ("on-accent", "accent")]
        for (text, paper), least in {**dict.fromkeys(pairs, 4.5), ("field", "raised"): 3.0}.items():
            light, dark = sorted((luminance(colours[text]), luminance(colours[paper])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (scheme, text, paper)


def luminance(colour: list[int]) -> float:
    """Relative luminance by WCAG's definition."""
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (c / 255 for c in colour)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_files_and_headers(server: Server) -> None:
    response = server.request("GET", "/")
    html = response.read().decode()
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?://", html)
    for name in re.findall(r'(?:src|href)="(page/[^"]+)"', html):
        part = server.request("GET", f"/{name}")
        assert (part.status, part.headers["content-security-policy"]) == (200, policy)
        again = server.request("GET", f"/{name}", if_none_match=f'"x", W/{part.headers["etag"]}')
        assert (again.status, again.read()) == (304, b"")
    for path in ("/page/", "/page/index.html", "/page/../app.py", "/page/%2e%2e/app.py", "/page/none.js"):
        assert server.request("GET", path).status == 404, path
