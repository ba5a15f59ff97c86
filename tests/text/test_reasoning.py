from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4.text.reasoning import ThoughtSplitter, split_thought

FRAGMENTS = ["<think>", "</think>", "<thi", "nk>", "</", "<", "\n", "\n\n", "a", " b ", "想"]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("text", "inside", "parts"),
    [
        ("\nhmm\n</think>\n\n42", True, ("\nhmm\n", "42")),
        ("<think>hmm</think>\n42", False, ("hmm", "42")),
        ("\n<think>hmm</think>42</think>", False, ("hmm", "42</think>")),
        ("never ends", True, ("never ends", "")),
        ("<think>never ends </thin", False, ("never ends </thin", "")),
        ("\nplain <think> tag </think>", False, (None, "plain <think> tag </think>")),
        ("<thin", False, (None, "<thin")),
        ("</think>x", True, ("", "x")),
        ("", True, ("", "")),
        ("", False, (None, "")),
    ],
)
def test_the_two_parts(text: str, inside: bool, parts: tuple[str | None, str]) -> None:
    assert split_thought(text, inside) == parts


@given(text=texts, inside=st.booleans())
def test_whole_text_equals_a_regular_expression(text: str, inside: bool) -> None:
    opening = "" if inside else r"\n*<think>"
    match = re.fullmatch(rf"{opening}(?P<thought>.*?)(?:</think>\n*(?P<answer>.*))?", text, re.DOTALL)
    expected = (match["thought"], match["answer"] or "") if match else (None, text.lstrip("\n"))
    assert split_thought(text, inside) == expected


@given(text=texts, inside=st.booleans(), data=st.data())
def test_every_split_gives_the_whole(text: str, inside: bool, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    splitter = ThoughtSplitter(inside)
    parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.finish()

    thought, answer = split_thought(text, inside)
    assert "".join(part for kind, part in parts if kind == "thought") == (thought or "")
    assert "".join(part for kind, part in parts if kind == "answer") == answer
    kinds = [kind for kind, _ in parts]
    assert kinds == sorted(kinds, reverse=True)  # no thought after the answer began
    assert all(part for _, part in parts)


def test_text_is_shown_as_soon_as_it_cannot_be_a_tag() -> None:
    splitter = ThoughtSplitter(inside=True)
    assert splitter.push("so </thi") == [("thought", "so ")]
    assert splitter.push("s") == [("thought", "</this")]
    assert splitter.push("</think>\n") == []
    assert splitter.push("\n4") == [("answer", "4")]
    assert splitter.push("2") == [("answer", "2")]
