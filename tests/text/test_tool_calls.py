"""Tool calls as GLM-4 writes them: a corpus, cut anywhere; and whatever text there may be, no word of it is lost."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_call_corpus import NAMED, NAMES, RUMINATION, Sample

from glm4.text.tool_calls import JsonCallParser, NamedCallParser, Part, ToolCallParser


def parser_of(sample: Sample) -> ToolCallParser:
    return JsonCallParser() if sample in RUMINATION else NamedCallParser(NAMES)


def merged(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one, where they belong to one text or one call."""
    whole: list[Part] = []
    for kind, text in parts:
        if whole and kind != "call" and whole[-1][0] == kind:
            whole[-1] = (kind, whole[-1][1] + text)
        else:
            whole.append((kind, text))
    return whole


def read(parser: ToolCallParser, pieces: list[str]) -> list[Part]:
    return merged([part for piece in pieces for part in parser.push(piece)] + parser.finish())


def test_the_corpus_is_large_enough_and_has_no_output_twice() -> None:
    assert len(NAMED) + len(RUMINATION) >= 150
    for corpus in (NAMED, RUMINATION):
        assert len({sample.output for sample in corpus}) == len(corpus)


@pytest.mark.parametrize("sample", [*NAMED, *RUMINATION], ids=lambda sample: repr(sample.output)[:60])
def test_corpus(sample: Sample) -> None:
    prose, calls = "", list[tuple[str, str]]()
    for kind, text in read(parser_of(sample), [sample.output]):
        if kind == "text":
            prose += text
        elif kind == "call":
            calls.append((text, ""))
        else:
            calls[-1] = (calls[-1][0], text)
    assert (prose, calls) == (sample.prose, sample.calls)


@pytest.mark.parametrize("sample", [*NAMED, *RUMINATION], ids=lambda sample: repr(sample.output)[:60])
def test_a_cut_changes_nothing(sample: Sample) -> None:
    """In two at every position, and into single characters."""
    text = sample.output
    whole = read(parser_of(sample), [text])
    for cut in range(1, len(text)):
        assert read(parser_of(sample), [text[:cut], text[cut:]]) == whole
    assert read(parser_of(sample), list(text)) == whole


def test_names_and_arguments_come_as_they_are_written() -> None:
    parser = NamedCallParser(["search"])
    seen = [parser.push(character) for character in 'search\n{"q": "ab"}']
    assert seen[: len("search\n{")] == [[]] * len("search\n{")
    assert seen[len("search\n{")] == [("call", "search"), ("arguments", '{"')]
    assert all(parts == [("arguments", character)] for parts, character in zip(seen[9:], 'q": "ab"}', strict=True))


PIECES = st.sampled_from(
    [
        "get_time",
        "search",
        "\n",
        " ",
        "{",
        "}",
        '"',
        "\\",
        "<|assistant|>",
        "<|assis",
        "```",
        "[",
        "]",
        '{"q": 1}',
        "词",
        "get_time\n{}",
        '{"name": "a", "arguments": {}}',
        "x",
    ]
)


@given(st.lists(PIECES, max_size=25), st.booleans())
def test_no_word_is_lost_however_it_is_cut(pieces: list[str], json_calls: bool) -> None:
    def parser() -> ToolCallParser:
        return JsonCallParser() if json_calls else NamedCallParser(["get_time", "search"])

    text = "".join(pieces)
    whole = read(parser(), [text])
    assert read(parser(), pieces) == whole
    assert read(parser(), list(text)) == whole
    assert all(value for _, value in whole)
    if not json_calls:
        kept = "".join(value for _, value in whole)
        assert re.sub(r"\s|<\|assistant\|>", "", kept) == re.sub(r"\s|<\|assistant\|>", "", text)


@given(st.text(), st.lists(st.integers(0, 200), max_size=5))
def test_prose_is_untouched(text: str, cuts: list[int]) -> None:
    marks = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(marks)]
    assert read(NamedCallParser(["get_time"]), pieces) == ([("text", text)] if text else [])
