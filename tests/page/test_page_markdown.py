"""The page's Markdown, against markdown-it, and against text that wants to be more than text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from playwright.sync_api import Browser, Page, expect
from serving import Server
from talking import answer_with, ask

RENDER = """([pieces]) => import('/page/markdown.js').then(({MarkdownView}) => {
  const root = document.createElement('div'), view = new MarkdownView(root);
  let text = '';
  for (const piece of pieces) { text += piece; view.show(text); }
  return root.innerHTML })"""


@pytest.fixture(scope="module")
def renderer(browser: Browser, server: Server) -> Iterator[Page]:
    """A page that only renders."""
    page = browser.new_page()
    page.goto(server.url)
    yield page
    page.close()


ALLOWED = set(
    "a blockquote br button code del div em figcaption figure h1 h2 h3 h4 h5 h6 hr li ol p pre span strong "
    "table tbody td th thead tr ul".split()
)
DOCUMENTS = [
    "Plain words.",
    "One line\nand the next\n\nand a paragraph",
    "# One\n## Two ##\n### Three *em*\n#no heading\n####### nor this",
    "*em* **strong** ***both*** _em_ __strong__ ~~gone~~ snake_case_word 2*3*4",
    "**bold *em* bold** and *em **bold** em*",
    "* not em * nor * this *",
    "**open and *never closed",
    "`code` ``co`de`` ` `` ` `unclosed",
    r"\*no em\* \# \_x\_ a\b \\",
    "- a\n- b\n- c",
    "- a\n\n- b\n\n- c",
    "1. a\n2. b\n3. c",
    "3. three\n4. four",
    "- a\n  - b\n    - c\n- d",
    "1. a\n   - b\n   - c\n2. d",
    "1. a\n\n   paragraph\n\n2. b",
    "- a\n- b\n\nafter",
    "- a\n* other list",
    "text\n- list right after\n\ntext\n1. one",
    "text\n2. no list",
    "> quote\n> goes on\n\nafter",
    "> - list\n> - in it\n>\n> paragraph",
    "> lazy\ncontinuation",
    "```python\nprint('<b>')\n\n\n# x\n```\nafter",
    "~~~\ntilde ``` inside\n~~~",
    "````\n```\n````",
    "```\nnever closed\n\nreally",
    "1. x\n```\ncode\n```\n2. y",
    "- item\n  ```\n  code\n\n\n  more\n  ```\n- next",
    "| a | b |\n|---|:-:|\n| 1 | **2** |\n| 3 |\n\nafter",
    "a | b\n--|--:\n1 | `x \\| y`",
    "no | table\nhere",
    "---\n***\n_ _ _",
    "text\n***\ntext",
    "[link](https://example.org) and [with *em*](https://example.org/a_b 'title')",
    "[balanced](https://example.org/a_(b)) <https://example.org/x?y=1&z=2>",
    "[no link] [nor](this is) [x]",
    "[brackets [inside] here](https://example.org)",
    "[bad](javascript:alert%281%29)",
    "a **b**c d__e__f",
    "<script>alert(1)</script> <b>x</b> &amp; &lt;",
    "**一个** *词* `码` 你好**粗体**世界",
]


class _Tree(HTMLParser):
    """HTML as nested lists, of what a reader can tell apart."""

    WRAPPERS = ("figure", "div", "tbody")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root: list[object] = []
        self.open = [self.root]
        self.skipped = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "figcaption":
            self.skipped += 1
        if self.skipped or tag in self.WRAPPERS:
            return
        kept = {name: value for name, value in attrs if name in ("href", "start")}
        node: list[object] = [{"s": "del"}.get(tag, tag), kept]
        self.open[-1].append(node)
        if tag not in ("br", "hr"):
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag == "figcaption":
            self.skipped -= 1
        elif not (self.skipped or tag in (*self.WRAPPERS, "br", "hr")):
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.skipped or not self.open:
            return
        node = self.open[-1]
        is_code = any(isinstance(each, list) and each[:1] == ["pre"] for each in self.open)
        if not is_code and not data.strip("\n"):
            return
        text = data.removesuffix("\n") if is_code else data.strip("\n")
        if node and isinstance(node[-1], str):
            node[-1] += text
        else:
            node.append(text)


def tree(html: str) -> list[object]:
    return _Tree(html).root


@pytest.mark.parametrize("text", DOCUMENTS)
def test_as_markdown_it_has_it(renderer: Page, text: str) -> None:
    reference = MarkdownIt("commonmark", {"breaks": True, "html": False}).enable(["table", "strikethrough"])
    assert tree(renderer.evaluate(RENDER, [[text]])) == tree(reference.render(text))


def test_where_it_departs(renderer: Page) -> None:
    """What its head says: Chinese emphasis, formulas, addresses as they stand, breaks in tables, no images."""
    for text, html in {
        "**重点：**内容": "<p><strong>重点：</strong>内容</p>",
        r"so \(a_1 * b_1 * c\) and $x_1 + y_1$ cost $5 and $6": (
            r'<p>so <span class="math">\(a_1 * b_1 * c\)</span> and '
            '<span class="math">$x_1 + y_1$</span> cost $5 and $6</p>'
        ),
        "\\[\na * b * c\n\\]": '<div class="math">\\[\na * b * c\n\\]</div>',
        "a<br>b": "<p>a<br>b</p>",
    }.items():
        assert renderer.evaluate(RENDER, [[text]]) == html
    links = renderer.evaluate(RENDER, [["见https://example.org/a。 ![picture](https://example.org/p.png)"]])
    assert links.count("<a ") == 2
    assert 'href="https://example.org/a"' in links
    assert "<img" not in links


MARKS = """
word 重 ： ! - * 1. 2) > # ## ``` ~~~ ` `` *** ** _ __ ~~ --- \\ $ $$ \\[ \\] &lt; | [ ] ]( ( )
https://a.example/ javascript:alert(1) <br> <script> <img/src=x/onerror=alert(1)>
""".split()
SPACES = [" ", "  ", "    ", "\t", "\n", "\n\n", "\n\n\n", "\n|---|---|\n", "\n- ", "\n1. ", "\n> ", "\n```py\n"]
PIECES = st.sampled_from(MARKS + SPACES)


@settings(max_examples=250)
@given(st.lists(PIECES, max_size=40))
def test_any_text(renderer: Page, pieces: list[str]) -> None:
    """However it comes, it makes the same nodes, all harmless."""
    text = "".join(pieces)
    whole = renderer.evaluate(RENDER, [[text]])
    assert renderer.evaluate(RENDER, [pieces]) == whole
    assert renderer.evaluate(RENDER, [list(text)]) == whole
    tags: set[str] = set()

    class Seen(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.add(tag)
            for name, value in attrs:
                assert name in {"class", "href", "rel", "start", "tabindex", "target", "title", "type"}
                assert name != "href" or (value or "").startswith(("https://", "http://", "mailto:"))

    Seen().feed(whole)
    assert tags <= ALLOWED


@pytest.mark.parametrize("text", DOCUMENTS)
def test_it_may_come_in_any_pieces(renderer: Page, text: str) -> None:
    assert renderer.evaluate(RENDER, [list(text)]) == renderer.evaluate(RENDER, [[text]])


HOSTILE = {
    **dict.fromkeys(["[", "`", "> ", "- ", "~~", "_a_ ", "*a ", "$a", "a\n"], 30_000),
    **dict.fromkeys(["**a*", "[a](", "`a``b", "<a", "&a", "\\[", "1. "], 20_000),
}


@pytest.mark.parametrize(("piece", "times"), HOSTILE.items())
def test_hostile_lengths(renderer: Page, piece: str, times: int) -> None:
    """Each would take minutes if a search began again at every character."""
    assert "a" in renderer.evaluate(RENDER, [["a" + piece * times]])
    assert renderer.evaluate(RENDER, [[piece * times]])


def test_no_word_becomes_html(page: Page) -> None:
    attack = (
        '<script>document.title="owned"</script>'
        '<img src="https://evil.example/x.png" onerror="document.title=\'owned\'">'
        '<iframe src="https://evil.example"></iframe><svg onload="document.title=\'owned\'"></svg>'
        "[click](javascript:document.title='owned') [data](data:text/html,<script>1</script>) "
        "[case](JaVaScRiPt:alert`1`) [space](<java\tscript:alert(1)>) [here](/v1/models) [rel](//evil.example/x)\n\n"
        "```<img src=x>\n</code></pre><script>document.title='owned'</script>\n```\n\n"
        "| <img src=x onerror=alert(1)> | b |\n|---|---|\n| <b>x</b> | ![x](https://evil.example/y.png) |\n"
    )
    call = {"index": 0, "id": "c", "function": {"name": attack, "arguments": json.dumps(attack)}}
    answer_with(page, {"reasoning_content": attack}, {"content": attack}, {"tool_calls": [call]}, reason="tool_calls")
    answer = ask(page, attack)
    answer.locator("summary").click()
    page.reload()
    answer = page.locator(".answer")
    answer.locator("summary").click()
    for tag in ("script", "img", "iframe", "b"):
        assert page.locator(f"article {tag}").count() == 0
    links = page.locator("article a").evaluate_all("all => all.map(a => [a.protocol, a.rel])")
    assert set(map(tuple, links)) == {("https:", "noopener noreferrer")}
    expect(page.locator(".bubble")).to_contain_text("<script>document.title")
    expect(page).to_have_title("glm4 chat")
    expect(answer.locator("pre code").first).to_contain_text("</code></pre><script>")
